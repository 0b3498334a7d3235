"""Cross-entropy with probabilities in place of labels, as MixUp, CutMix and label refinement make them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd.ops.spec import SoftmaxOptions
from fastkd.ops.tensors import as_ordinary, check_ordinary, is_readable

from . import arguments
from .rows import Rows, eager_rows, rows_of


def is_soft(target: Any) -> bool:
    """Whether it holds probabilities rather than labels."""
    return isinstance(target, Tensor) and target.is_floating_point()


def check_soft(options: SoftmaxOptions, target: Tensor, student: Any, ignore_index: int) -> None:
    """Raise TypeError or ValueError for what is not defined with probabilities, and for their shape."""
    arguments.check_ignore_index(ignore_index)
    for name in ("tckd_weight", "nckd_weight"):
        if value := getattr(options, name):
            raise ValueError(
                f"{name} is {value!r}, but target holds probabilities, and TCKD and NCKD tell one label from "
                "the other classes; expected 0, or int64 class indices"
            )
    if ignore_index >= 0:
        raise ValueError(
            f"ignore_index is {ignore_index}, but target holds probabilities, of which none is an index; "
            "give the rows to ignore weight=0"
        )
    if not isinstance(student, Tensor):
        raise TypeError(
            f"target holds probabilities [..., C], as many numbers as {type(student).__name__}, "
            "student_logits, never stores; expected int64 class indices: the cross-entropy with a mixture of "
            "two labels is the same mixture of two losses"
        )
    check_ordinary("target", target)
    if target.shape != student.shape:
        raise ValueError(
            f"target has dtype {target.dtype} and shape {list(target.shape)}; expected int64 class indices "
            f"{list(student.shape[:-1])}, or probabilities {list(student.shape)}"
        )
    if target.device != student.device:
        raise ValueError(
            f"target is on {target.device} and student_logits on {student.device}; expected one device"
        )
    if target.requires_grad:
        raise ValueError(
            "target requires grad, but it is a constant of every fastkd loss; pass target.detach()"
        )


def soft_cross_entropy(
    options: SoftmaxOptions,
    students: Sequence[Tensor],
    target: Tensor,
    *,
    weight: Tensor | None,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """w_ce CE of each pair and CE alone, in plain torch: [H], or [H, N] without a reduction.

    A row whose probabilities are negative, or do not sum to 1, is an error on a CPU, and elsewhere a NaN:
    reading it back would wait for the device.
    """
    rows = rows_of(students[0], None, weight, reduction)
    p = as_ordinary("target", target).reshape(-1, target.shape[-1])
    rows = rows._replace(label=_checked(p, rows))
    students = [as_ordinary("student_logits", logits) for logits in students]
    options = SoftmaxOptions(1.0, ce_weight=options.ce_weight, label_smoothing=options.label_smoothing)
    constants = [logits.detach() for logits in students]  # no teacher is read
    losses, terms = eager_rows("softmax", options, students, constants, rows)
    return losses, terms[0].detach()


def _checked(p: Tensor, rows: Rows) -> Tensor:
    sums = p.sum(-1, dtype=torch.float64 if p.dtype == torch.float64 else torch.float32)
    # A comparison with NaN is false, so that NaN is wrong.
    wrong = ~((p.amin(-1) >= 0) & ((sums - 1).abs() <= arguments.SUM_TOLERANCE))
    if rows.weight is not None:
        wrong = wrong & (rows.weight != 0)
        p = p.masked_fill((rows.weight == 0)[:, None], 0.0)  # such a row may hold anything
    if not is_readable(p):
        return p.masked_fill(wrong[:, None], torch.nan)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0, 0])
        values = p[row]
        if bool((values < 0).any()):
            fault = f"has {float(values.min()):g}; expected probabilities, from 0 to 1"
        else:
            fault = f"sums to {float(sums[row]):.4g}; expected 1, or weight=0 for a row to ignore"
        raise ValueError(f"row {row} of target {fault}")
    return p
