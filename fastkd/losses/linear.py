"""Losses of ``LinearLogits``: the rows that count, the backend, chunks of rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd.ops import linear
from fastkd.ops.call import Call
from fastkd.ops.tensors import as_ordinary, is_traced
from fastkd.reference import centered

from .forms import LinearLogits
from .rows import Rows, backend_for, eager_rows, numbers_of

Form = Tensor | LinearLogits


def linear_rows(
    loss: str,
    options: tuple[float, ...],
    students: Sequence[Form],
    teachers: Sequence[Form],
    rows: Rows,
    center_teacher: bool,
    with_terms: bool,
) -> tuple[Tensor, Tensor | None]:
    """[H N] values, or their sums, and terms, pair by pair: pairs have no memory traffic in common."""
    pairs = [
        _pair(loss, options, student, teacher, rows, center_teacher, with_terms)
        for student, teacher in zip(students, teachers, strict=True)
    ]
    if len(pairs) == 1:
        return pairs[0]
    terms = [terms for _, terms in pairs if terms is not None]
    return torch.stack([values for values, _ in pairs]), torch.stack(terms, 1) if terms else None


def _pair(
    loss: str,
    options: tuple[float, ...],
    student: Form,
    teacher: Form,
    rows: Rows,
    center_teacher: bool,
    with_terms: bool,
) -> tuple[Tensor, Tensor | None]:
    student, teacher = _ready("student_logits", student), _ready("teacher_logits", teacher)
    ours, theirs = _tensors(student), _tensors(teacher)
    chosen = backend_for((*ours, *theirs, rows.weight, rows.label), ours[0], theirs[0])
    if chosen == "eager":
        dense = [one.dense() if isinstance(one, LinearLogits) else one for one in (student, teacher)]
        teachers = [centered(dense[1])] if center_teacher else [dense[1]]
        return eager_rows(loss, options, [dense[0]], teachers, rows)
    if not rows.reduced and torch.is_grad_enabled() and any(part.requires_grad for part in ours):
        raise ValueError(
            "reduction='none' has no gradient with LinearLogits, whose gradient is computed with the "
            "loss, summed over the rows; give each row's factor as weight=, with 'sum' or 'batchmean'"
        )
    ours, theirs, counted, kept = _counted(ours, theirs, rows)
    numbers, dynamic = numbers_of(loss, options, ours[0])
    call = Call(
        counted.label, counted.weight, rows.divisor, loss, numbers, dynamic, chosen, rows.reduced, with_terms
    )
    linear_call = linear.LinearCall(
        call,
        student.shape[-1],
        _chunk_rows(student, teacher),
        center_teacher,
        _numbers(student),
        _numbers(teacher),
    )
    values, terms = linear.linear_loss(ours, theirs, linear_call)
    if kept is None or rows.reduced:
        return values, terms
    return _spread(values, kept, rows), None if terms is None else _spread(terms, kept, rows)


def _ready(name: str, form: Form) -> Form:
    if not isinstance(form, LinearLogits):
        return as_ordinary(name, form)
    return form.under_autocast().of([as_ordinary(name, tensor) for tensor in form.under_autocast().tensors])


def _tensors(form: Form) -> list[Tensor]:
    """With one leading dimension, the rows."""
    if not isinstance(form, LinearLogits):
        return [form.reshape(-1, form.shape[-1])]
    hidden, *layer = form.tensors
    return [hidden.reshape(-1, hidden.shape[-1]), *layer]


def _numbers(form: Form) -> tuple[float, float]:
    if not isinstance(form, LinearLogits):
        return 1.0, 0.0
    return float(form.scale), 0.0 if form.softcap is None else float(form.softcap)


def _chunk_rows(*forms: Form) -> int:
    chosen = [
        form.chunk_rows for form in forms if isinstance(form, LinearLogits) and form.chunk_rows is not None
    ]
    return min(chosen, default=0)


def _counted(
    ours: list[Tensor], theirs: list[Tensor], rows: Rows
) -> tuple[list[Tensor], list[Tensor], Rows, Tensor | None]:
    """The rows of a weight other than 0, which alone cost a matmul, and their indices; None: all.

    Rows that are not read may hold anything, so where they cannot be left out (while a compiler traces, their
    number is not known), they are zeros.
    """
    if rows.weight is None:
        return ours, theirs, rows, None
    counts = rows.weight != 0
    if is_traced((*ours, *theirs, rows.weight)) or _is_capturing(ours[0]):
        unread = ~counts[:, None]
        ours, theirs = ([first.masked_fill(unread, 0.0), *layer] for first, *layer in (ours, theirs))
        return ours, theirs, rows, None
    kept = counts.nonzero().squeeze(1)
    if len(kept) == len(counts):
        return ours, theirs, rows, None
    ours, theirs = ([first.index_select(0, kept), *layer] for first, *layer in (ours, theirs))
    label = None if rows.label is None else rows.label[kept]
    return ours, theirs, rows._replace(label=label, weight=rows.weight[kept]), kept


def _is_capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _spread(values: Tensor, kept: Tensor, rows: Rows) -> Tensor:
    """Values of the rows ``kept`` among all rows; 0 elsewhere."""
    assert rows.weight is not None
    return values.new_zeros(*values.shape[:-1], len(rows.weight)).index_copy(-1, kept, values)
