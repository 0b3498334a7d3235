"""From logits to a loss: check, flatten to rows, run a backend, reduce. Every loss goes this way."""

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from fastkd import backend, checks, reference
from fastkd.ops import library

Logits: TypeAlias = Tensor | Sequence[Tensor]


def reduced_loss(
    loss: str,
    options: tuple[float, ...],
    student_logits: Logits,
    teacher_logits: Logits,
    target: Tensor | None,
    *,
    uses_label: bool,
    ignore_index: int = -100,
    weight: Tensor | None,
    reduction: str,
    with_terms: bool = False,
) -> tuple[Tensor, Iterable[Tensor]]:
    """A loss of ``fastkd.reference`` and, if asked for, its terms; arguments as in ``fastkd.functional``."""
    checks.check_temperature(options[0])
    options = tuple(map(float, options))
    checks.check_reduction(reduction)
    students, teachers = checks.check_pairs(student_logits, teacher_logits)
    student = students[0]
    if target is None and uses_label:
        raise TypeError("target is None; expected an int64 tensor of labels")
    if weight is not None:
        checks.check_row_weight(weight, student)
    all_count = target is None or checks.check_target(target, student, ignore_index)

    reduced = reduction != "none"
    leading, classes = student.shape[:-1], student.shape[-1]
    labels = target
    if student.dim() != 2:
        students = [logits.reshape(-1, classes) for logits in students]
        teachers = [logits.reshape(-1, classes) for logits in teachers]
        labels = None if target is None else target.reshape(-1)
        weight = None if weight is None else weight.reshape(-1)
    counted = None if labels is None or all_count else labels != ignore_index
    row_weight, divisor = _row_weight(weight, counted, students[0].shape[0], reduction)
    label = labels if uses_label else None
    chosen = backend.resolve(backend.get_backend(), student.device.type, student.dtype, teachers[0].dtype)
    terms: Tensor | None
    if chosen == "eager":
        rows, terms = _eager(loss, options, students, teachers, label, counted, row_weight, divisor, reduced)
    else:
        rows, terms = library.row_loss(
            students, teachers, label, row_weight, divisor, loss, options, chosen,
            reduced=reduced, with_terms=with_terms,
        )  # fmt: skip
    of_pairs = () if isinstance(student_logits, Tensor) else (len(students),)
    shape = of_pairs if reduced else of_pairs + leading
    if rows.shape != shape:
        rows = rows.view(shape)
    if not with_terms or terms is None:
        return rows, ()
    return rows, terms.detach().view(terms.shape[0], *shape)


def _row_weight(
    weight: Tensor | None, counted: Tensor | None, rows: int, reduction: str
) -> tuple[Tensor | None, int]:
    """What each row's loss is multiplied by, where rows differ in it [N], and what all are divided by.

    The kernels apply it as they write the gradient, so that the reduction costs no pass of its own.
    """
    mean = reduction == "batchmean"
    row_weight = None if weight is None else weight.float()
    if counted is None:
        return row_weight, max(rows, 1) if mean else 1
    present = counted.float()
    row_weight = present if row_weight is None else torch.where(counted, row_weight, 0.0)
    return (row_weight / present.sum().clamp_min(1.0) if mean else row_weight), 1


def _eager(
    loss: str,
    options: tuple[float, ...],
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    label: Tensor | None,
    counted: Tensor | None,
    row_weight: Tensor | None,
    divisor: int,
    reduced: bool,
) -> tuple[Tensor, Tensor]:
    """``library.row_loss`` in plain torch: rows [H, N] and terms [K, H, N], or their sums over N."""
    if counted is not None:
        # A row left out may hold anything, also what would make 0 * its gradient NaN.
        students, teachers = (
            [torch.where(counted[:, None], one, 0.0) for one in logits] for logits in (students, teachers)
        )
        label = None if label is None else torch.where(counted, label, 0)
    row_loss = reference.ROW_LOSSES[loss]
    pairs = [row_loss(s, t, label, *options) for s, t in zip(students, teachers, strict=True)]
    rows, terms = torch.stack([rows for rows, _ in pairs]), torch.stack([terms for _, terms in pairs], 1)
    rows, terms = (
        (values if row_weight is None else values * row_weight) / divisor for values in (rows, terms)
    )
    return (rows.sum(-1), terms.sum(-1)) if reduced else (rows, terms)
