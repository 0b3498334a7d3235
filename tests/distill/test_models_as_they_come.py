"""Outputs that are not tensors, teachers that cache tensors, parts that both models share."""

from __future__ import annotations

import functools
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastkd.distill import DHKD, KD, MHKD, RKD
from fastkd.train import fit
from tests.train.tiny import without_time

from .models import Net, batch, pair


class ModelOutput(OrderedDict):
    """Like an output of transformers: a mapping whose entries are also attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


class Wrapped(nn.Module):
    def __init__(self, model: nn.Module, form: Any) -> None:
        super().__init__()
        self.model, self.form = model, form
        self.fc = model.fc

    def forward(self, images: Tensor) -> Any:
        return self.form(self.model(images))


def kd(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(student, target) + nn.functional.mse_loss(student, teacher)


@pytest.mark.parametrize(
    "form", [lambda z: {"logits": z, "features": z}, lambda z: ModelOutput(loss=None, logits=z)]
)
def test_an_output_that_names_its_logits(form: Any) -> None:
    loader = [batch()]
    plain = [fit(*pair(), loader, loader, loss=kd, epochs=2, progress=False).history]
    named = [Wrapped(model, form) for model in pair()]
    plain.append(fit(*named, loader, loader, loss=kd, epochs=2, progress=False).history)
    assert without_time(plain[0]) == without_time(plain[1])
    DHKD(*[Wrapped(model, form) for model in pair()]).check(batch())


@pytest.mark.parametrize(
    ("form", "words"),
    [
        (lambda z: (z, z), r"a tuple of 2 \(tensor \[8, 7\], tensor \[8, 7\]\); expected logits.* wrap it"),
        (lambda z: {"output": z}, "a dict with output; expected logits"),
        (lambda z: ModelOutput(last_hidden_state=z), "a ModelOutput with last_hidden_state; expected"),
        (lambda z: None, "a NoneType; expected logits"),
        (lambda z: z[:, :, None], r"a torch.float32 tensor of shape \[8, 7, 1\]; expected logits"),
    ],
)
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_an_output_that_does_not(form: Any, words: str, role: str) -> None:
    models = dict(zip(("student", "teacher"), pair(), strict=True))
    models[role] = Wrapped(models[role], form)
    loader = [batch()]
    with pytest.raises(Exception, match=words):
        fit(**models, train_loader=loader, val_loader=loader, loss=kd, epochs=1, progress=False)
    with pytest.raises(ValueError, match=f"the {role} returns {words}"):
        KD(**models)(batch())


@functools.lru_cache(maxsize=1)
def positions(side: int) -> Tensor:
    """Caches a table for all models, as ViT and Swin do."""
    return torch.linspace(0, 1, side * side).view(1, 1, side, side)


class Positioned(Net):
    def forward(self, images: Tensor) -> Tensor:
        # Its backward needs the table.
        table = positions(images.shape[-1])
        return super().forward(images * (table * self.fc.weight.mean()).exp() * table)


@pytest.mark.parametrize(
    "make", [KD, DHKD, lambda s, t: MHKD(s, t, layers=["features.0"], example=batch()[0])]
)
def test_tensors_that_a_teacher_caches_serve_the_student(make: Any) -> None:
    positions.cache_clear()
    method = make(Positioned(4), Positioned(6))
    positions.cache_clear()  # the teacher's pass comes first and fills it
    method.train()
    terms = method(batch())
    method.backward(terms)
    assert all(p.grad is not None for p in method.student.parameters())
    assert not positions(8).is_inference()


def test_a_teacher_keeps_no_graph() -> None:
    method = KD(*pair())
    seen = []
    original = method.terms
    method.terms = lambda s: seen.append(s.teacher_logits) or original(s)
    method(batch())
    assert not seen[0].requires_grad


def test_parts_that_both_models_share() -> None:
    loader = [batch()]

    def refused(student: nn.Module, teacher: nn.Module, words: str) -> None:
        flags = [p.requires_grad for p in student.parameters()]
        with pytest.raises(ValueError, match=words):
            KD(student, teacher)
        with pytest.raises(ValueError, match=words):
            fit(student, teacher, loader, loader, loss=kd, epochs=1)
        assert [p.requires_grad for p in student.parameters()] == flags

    student, teacher = pair()
    refused(student, student, r"student and teacher share features.0.0.weight, .* and \d+ more .*deepcopy")
    teacher = Net(4)
    teacher.features[0] = student.features[0]
    refused(student, teacher, r"share features\.0\.0\.weight, features\.0\.1\.weight")
    teacher = Net(4)
    teacher.fc.weight = student.fc.weight  # tied
    refused(student, teacher, r"share fc\.weight \(of the student\)")
    teacher = Net(4)
    teacher.drop = student.drop = nn.Dropout(0.5)
    refused(student, teacher, "share drop")
    student, teacher = pair()
    teacher.features[0][2] = student.features[0][2]  # a ReLU
    teacher.stem = student.stem = nn.Linear(3, 3).requires_grad_(False)
    assert fit(student, teacher, loader, loader, loss=kd, epochs=1, progress=False).history


@pytest.mark.parametrize("compiled", ["student", "teacher"])
@pytest.mark.parametrize("make", [RKD, DHKD])
def test_a_compiled_network_that_ran_before(make: Any, compiled: str) -> None:
    """Its code was compiled without the hooks by which methods read layers."""
    student, teacher = pair()
    expected = make(student, teacher)(batch())
    if compiled == "student":
        student = torch.compile(student, backend="eager")
        student(batch()[0])
    else:
        teacher = torch.compile(teacher.eval(), backend="eager")
        with torch.no_grad():
            teacher(batch()[0])
    method = make(student, teacher)
    assert method(batch()).keys() == expected.keys()
    assert method(batch()).keys() == expected.keys()
