"""Targets of mixed images: probabilities over the classes instead of labels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

import fastkd
from fastkd.distill import Method, find_method
from fastkd.models import SmallCNN

CLASSES = 5
DEFINED: dict[str, dict[str, Any]] = {
    "cross_entropy": {},
    "kd": {"warmup_epochs": 4},
    "lskd": {},
    "binary_kl": {},
    "binary_kl_norm": {},
    "dhkd": {"hidden": 8},
    "mhkd": {"layers": ["stages.0"], "head_width": 4},
    "fitnets": {"hint_layer": "stages.1"},
    "rkd": {},
}


def make(name: str, **options: Any) -> tuple[Method, Tensor]:
    torch.manual_seed(0)
    student, teacher = SmallCNN(CLASSES, width=2), SmallCNN(CLASSES, width=3)
    images = torch.randn(6, 1, 16, 16)
    return find_method(name)(student, teacher, example=images[:2], **options).eval(), images


@pytest.mark.parametrize("name", DEFINED)
def test_labels_as_probabilities_give_the_same_terms(name: str) -> None:
    method, images = make(name, **DEFINED[name])
    labels = torch.arange(6) % CLASSES
    expected = method.loss((images, labels))
    got = method.loss((images, F.one_hot(labels, CLASSES).float()))
    for term in got:
        torch.testing.assert_close(got[term], expected[term], rtol=1e-4, atol=1e-6)
    assert sum(got.values()).item() == pytest.approx(
        (expected.get("loss") if "loss" in expected else sum(expected.values())).item(), rel=1e-4
    )


@pytest.mark.parametrize("name", DEFINED)
def test_the_loss_is_linear_in_the_labels_and_trains(name: str) -> None:
    method, images = make(name, **DEFINED[name])
    one, two = (F.one_hot(torch.randint(0, CLASSES, (6,)), CLASSES).float() for _ in range(2))
    total = [sum(method.loss((images, target)).values()) for target in (one, two, 0.3 * one + 0.7 * two)]
    torch.testing.assert_close(total[2], 0.3 * total[0] + 0.7 * total[1], rtol=1e-4, atol=1e-5)
    method.train()
    method.backward(method((images, 0.3 * one + 0.7 * two)))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.student.parameters())


@pytest.mark.parametrize("name", ["dkd", "dckd", "nkd"])
def test_losses_of_one_label_refuse_them_with_the_reason(name: str) -> None:
    method, images = make(name)
    method.check((images, torch.arange(6) % CLASSES))
    with pytest.raises(ValueError, match=f"soft targets are not defined for {name}: .* one label"):
        method.check((images, torch.full((6, CLASSES), 1 / CLASSES)))


def test_fit_with_a_loader_that_mixes() -> None:
    """MixUp in a loop of one's own: batches of images and probabilities, validated on labels."""
    torch.manual_seed(0)
    student, teacher = SmallCNN(CLASSES, width=2), SmallCNN(CLASSES, width=3)
    images, labels = torch.randn(8, 1, 16, 16), torch.arange(8) % CLASSES
    mixed = [v2.MixUp(num_classes=CLASSES)(images, labels) for _ in range(3)]
    loss = fastkd.DistillLoss(ce_weight=0.5, kd_weight=0.5)
    result = fastkd.fit(student, teacher, mixed, [(images, labels)], loss=loss, epochs=2, progress=False)
    assert set(result.last["terms"]) == {"ce", "kd"}
    assert result.last["loss"] < result.history[0]["loss"]
    with pytest.raises(TypeError, match="only distill_loss takes probabilities"):
        fastkd.fit(student, teacher, mixed, loss=fastkd.DKDLoss(), epochs=1, progress=False)


def test_logits_that_come_with_the_batch_stand_for_the_teacher() -> None:
    method, images = make("dkd")
    labels = torch.arange(6) % CLASSES
    with torch.no_grad():
        logits = method.teacher(images)
    expected = method.loss((images, labels))
    method.teacher.forward = None  # it must not run
    got = method.loss((images, labels, logits))
    assert {name: value.item() for name, value in got.items()} == {
        name: value.item() for name, value in expected.items()
    }
