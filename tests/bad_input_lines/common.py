"""Logits, losses and the collector that the lines of docs/bad-inputs.md share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

import fastkd
from tests.bad_inputs import BACKENDS, Gives, Line

_generator = torch.Generator().manual_seed(0)
S, T = (2 * torch.randn(4, 6, generator=_generator) for _ in range(2))
Y = torch.tensor([0, 5, 2, 3])
W = torch.tensor([0.5, 2.0, 1.0, 0.25])

Result = tuple[torch.Tensor, torch.Tensor]


def step(
    loss: Callable[..., Any] = fastkd.kd_loss,
    student: torch.Tensor = S,
    teacher: Any = T,
    *labels: Any,
    view: Callable[[torch.Tensor], torch.Tensor] = lambda logits: logits,
    **options: Any,
) -> Result:
    """The loss and the gradient of ``student``, of which the loss sees ``view(student)``."""
    leaf = student.detach().clone().requires_grad_()
    value = loss(view(leaf), teacher, *labels, **options)
    value = value[0] if isinstance(value, tuple) else value
    value.sum().backward()
    return value.detach(), leaf.grad


def dkd(student: Any = S, teacher: Any = T, target: Any = Y, **options: Any) -> Result:
    return step(fastkd.dkd_loss, student, teacher, target, **options)


def same_as(expected: Callable[[], Any], words: str = "its value") -> Gives:
    return Gives(words, expected)


def group(name: str, lines: list[Line]) -> Callable[..., None]:
    """A function that adds to ``lines`` one of this group: (input, call, what must happen[, backends])."""

    def add(words: str, call: Callable[[], Any], must: Any, backends: Sequence[str] = BACKENDS) -> None:
        lines.append(Line(name, words, call, must, backends))

    return add


def one_row() -> Result:
    value, gradient = step(student=S[:1], teacher=T[:1])
    return value, gradient[0]


def pairs_step(students: list[torch.Tensor], teachers: list[torch.Tensor]) -> Result:
    leaves = [one.clone().requires_grad_() for one in students]
    value = fastkd.kd_loss(leaves, teachers)
    value.sum().backward()
    return value.detach(), leaves[1].grad


def auto(call: Callable[[], Any]) -> Any:
    with fastkd.use_backend("auto"):
        return call()
