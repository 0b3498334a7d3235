"""The line on the teacher's offset, for teachers that give no tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastkd import LinearLogits
from fastkd.distill import find_method
from fastkd.distill.centering import describe_offset
from fastkd.distill.given import GivenFeatures, GivenTopK

from .models import CLASSES, batch, pair

METHODS = ("binary_kl", "binary_kl_norm", "dhkd")


class Largest(TorchDispatchMode):
    """Records the elements of the largest result."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", METHODS)
def test_a_teacher_known_at_k_classes_is_refused_by_name(name: str, training: bool) -> None:
    images, target = batch()
    teacher = GivenTopK(CLASSES, 3, 4.0)
    method = find_method(name)(pair()[0], teacher).train(training)
    with pytest.raises(ValueError, match=r"TopKLogits, for which binary_kl\w* is not defined because"):
        method((images, target, *teacher.example(target)))


@pytest.mark.parametrize("name", METHODS)
def test_a_teacher_given_as_features(name: str) -> None:
    images, target = batch()
    layer = pair()[1].fc
    features = torch.randn(len(target), layer.in_features)
    method = find_method(name)(pair()[0], GivenFeatures(layer.weight, layer.bias))
    method((images, target, features))
    (found,) = method.take_notes()
    assert found == describe_offset(layer(features), True)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_large_head_is_not_made_dense(softcap: float | None) -> None:
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(64, 8), torch.randn(1000, 8), torch.randn(1000) - 16
    for offset in (bias, None):
        logits = LinearLogits(hidden, weight, offset, softcap=softcap)
        expected = describe_offset(logits.dense(), False)
        with Largest() as largest:
            assert describe_offset(logits, False) == expected
        assert largest.elements == 16 * 1000
    assert "row mean -16" in describe_offset(LinearLogits(hidden, weight, bias), False)


def test_an_offset_far_above_the_spread() -> None:
    torch.manual_seed(0)
    spread = torch.randn(16, 1000)
    logits = (spread - spread.mean(1, keepdim=True)) / spread.std(1, keepdim=True) + 1000
    said = describe_offset(logits, False)
    assert "row mean +1000.00, standard deviation within a row 1.00" in said
    assert "100% of the squared logits" in said


@pytest.mark.parametrize(("share", "warned"), [(0.05, False), (0.15, True)])
def test_from_which_share_of_the_squares_an_offset_is_warned_of(share: float, warned: bool) -> None:
    """It is that of each row's own mean: such means may cancel over the rows."""
    torch.manual_seed(0)
    spread = torch.randn(16, 1000)
    spread = (spread - spread.mean(1, keepdim=True)) / spread.std(1, keepdim=True)
    means = (share / (1 - share)) ** 0.5 * torch.tensor([1.0, -1.0]).repeat(8)
    said = describe_offset(spread + means[:, None], False)
    assert "row mean +0.00, standard deviation within a row 1.00" in said.replace("-0.00", "+0.00")
    assert (f"{share:.0%} of the squared logits" in said) == warned
