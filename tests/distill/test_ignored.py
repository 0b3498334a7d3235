"""Rows labelled -100, batches of nothing else, and labels that are refused."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fastkd.distill.logits import cross_entropy
from fastkd.distill.terms import total_of

from .models import CLASSES, METHODS, batch
from .test_methods import build

# Their loss beside the cross-entropy reads no label.
DISTILS_ALL = ("binary_kl", "binary_kl_norm", "dhkd", "mhkd", "fitnets", "rkd")
NO_LAYERS = {"hint_weight": 0.0, "distance_weight": 0.0, "angle_weight": 0.0}


@pytest.mark.parametrize("name", METHODS)
def test_a_row_labelled_as_ignored(name: str) -> None:
    """Which methods still distil it; docs/methods.md says the same."""
    method = build(name, **(NO_LAYERS if name == "dckd" else {})).eval()
    images, target = batch()
    target[3] = -100
    other = images.clone()
    other[3] = -images[3]
    one, two = (total_of(method((seen, target))) for seen in (images, other))
    assert one.isfinite()
    assert torch.equal(one, two) != (name in DISTILS_ALL)


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_without_a_label_trains_on_no_label(name: str) -> None:
    method = build(name, **(NO_LAYERS if name == "dckd" else {})).train()
    images, target = batch()
    terms = method((images, torch.full_like(target, -100)))
    of_labels = [term for term in terms if term in ("ce", "head_ce", "teacher_head_ce")]
    assert all(terms[term].item() == 0.0 for term in of_labels)
    assert total_of(terms).isfinite()
    # The terms of a fused loss have one gradient.
    trained = [terms[term] for term in of_labels] if name in DISTILS_ALL else list(terms.values())
    parameters = list(method.parameters())
    gradients = torch.autograd.grad(sum(trained), parameters, allow_unused=True, retain_graph=True)
    assert not any(gradient is not None and gradient.any() for gradient in gradients)
    method.backward(terms)
    method.finish_gradients()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in parameters)
    assert any(p.grad is not None and bool(p.grad.any()) for p in parameters) == (name in DISTILS_ALL)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_the_cross_entropy_is_torchs(dtype: torch.dtype, label_smoothing: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, CLASSES, generator=generator).to(dtype).requires_grad_()
    target = torch.randint(0, CLASSES, (50,), generator=generator)
    some = target.masked_fill(torch.arange(50) % 3 == 0, -100)
    soft = torch.rand(50, CLASSES, generator=generator).softmax(1)
    wide = logits if dtype == torch.float64 else logits.float()
    for labels in (target, some, soft):
        found = cross_entropy(logits, labels, label_smoothing)
        expected = F.cross_entropy(wide, labels, label_smoothing=label_smoothing)
        assert found.dtype == wide.dtype
        gradients = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (found, expected)]
        if label_smoothing and not labels.is_floating_point():  # torch divides two sums, this their sum
            torch.testing.assert_close(found, expected)
            torch.testing.assert_close(*gradients)
        else:
            assert torch.equal(found, expected)
            assert torch.equal(*gradients)


@pytest.mark.parametrize("name", METHODS)
def test_labels_of_another_integer_type(name: str) -> None:
    images, target = batch()
    with pytest.raises(TypeError, match=r"target has dtype torch\.int32; expected int64 class indices"):
        build(name)((images, target.int()))


@pytest.mark.parametrize("name", [name for name in METHODS if name not in DISTILS_ALL])
def test_micro_batches_by_their_labelled_rows(name: str) -> None:
    """As docs/methods.md says, for the methods that leave the other rows out."""
    images, target = batch()
    target[:3] = -100
    gradients = []
    for parts in ([slice(0, 8)], [slice(0, 4), slice(4, 8)]):
        method = build(name, **(NO_LAYERS if name == "dckd" else {})).eval()
        for part in parts:
            labelled = (target != -100).sum() / (target[part] != -100).sum()
            method.backward(method((images[part], target[part])), micro_batches=labelled.item())
        gradients.append([parameter.grad for parameter in method.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
