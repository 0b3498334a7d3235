"""Gradients and logits that are NaN though the loss is finite: nothing of it is validated or written."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastkd.errors import NonFiniteLossError
from fastkd.train import Watcher, evaluate, fit

from .tiny import CLASSES, Loader, labels_alone


class Root(nn.Module):
    """Its gradient is NaN for an image of zeros, whose logits are finite."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.fc = nn.Linear(3, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc((images * self.scale[:, None, None]).square().mean((2, 3)).sqrt())


@pytest.mark.parametrize("step", [1, 3], ids=["in between", "at the epoch's end"])
def test_a_gradient_that_is_not_finite(step: int) -> None:
    """And no other batch is blamed."""
    batches = list(Loader())
    batches[step][0][0] = 0
    written: list[int] = []

    class Saves(Watcher):
        def epoch_done(self, record: Any, state: Any) -> None:
            written.append(record["epoch"])

    student = Root()
    with pytest.raises(NonFiniteLossError, match=rf"weights are NaN.* epoch 1, step {step + 1}, ") as raised:
        fit(student, None, batches, Loader(), epochs=2, loss=labels_alone, watcher=Saves())
    assert "not-finite" not in str(raised.value)
    assert written == []

    student = Root()
    result = fit(student, None, batches, Loader(), epochs=2, loss=labels_alone, nonfinite="skip")
    assert [record["skipped"] for record in result.history] == [1, 1]
    assert all(value.isfinite().all() for value in student.parameters())
    with pytest.raises(NonFiniteLossError):  # losses that are fetched later cannot tell which step it was
        fit(Root(), None, batches, Loader(), epochs=2, loss=labels_alone, log_every=4)


def test_logits_that_are_nan_are_no_guess() -> None:
    class Unknown(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.full((len(images), 3), math.nan)

    accuracy, loss = evaluate(
        Unknown(), [(torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64))], device="cpu"
    )
    assert accuracy == 0
    assert math.isnan(loss)
