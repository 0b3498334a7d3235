"""One loss of many heads: the one place that knows whether the fused losses take lists of logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# True: the losses take lists of logits of equal shape and give one value a pair, in one launch.
_LISTS = False


def loss_of_pairs(
    loss: Callable[..., Tensor], students: Sequence[Tensor], teachers: Sequence[Tensor], **options: Any
) -> Tensor:
    """``loss(student, teacher, **options)`` of every pair of logits, as a tensor ``[pairs]``."""
    if len({logits.dtype for logits in (*students, *teachers)}) > 1:  # as where only some ran under autocast
        students, teachers = [s.float() for s in students], [t.float() for t in teachers]
    if _LISTS:
        return loss(list(students), list(teachers), **options)
    return torch.stack([loss(s, t, **options) for s, t in zip(students, teachers, strict=True)])
