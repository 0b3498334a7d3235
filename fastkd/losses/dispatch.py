"""From logits to a loss: check, choose a backend, run it over the rows, reduce. All losses take this path."""

import math
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from fastkd.ops import backend, operators
from fastkd.ops.call import Call
from fastkd.ops.spec import LOSSES
from fastkd.ops.tensors import as_ordinary, is_readable, transform_of
from fastkd.reference import centered

from . import arguments

Logits: TypeAlias = Tensor | Sequence[Tensor]


def reduced_loss(
    loss: str,
    options: tuple[float, ...],
    student_logits: Logits,
    teacher_logits: Logits,
    target: Tensor | None = None,
    *,
    uses_label: bool = False,
    center_teacher: bool = False,
    ignore_index: int = -100,
    weight: Tensor | None,
    reduction: str,
    with_terms: bool = False,
) -> tuple[Tensor, Iterable[Tensor]]:
    """A loss of ``ops.spec`` and, if asked for, its terms; conventions of ``fastkd.losses``.

    ``options`` is the loss's NamedTuple. Its numbers may be symbolic while torch.compile traces. Without
    ``uses_label`` the target only marks the rows to ignore. ``center_teacher``: see ``reference.centered``.
    """
    arguments.check_reduction(reduction)
    arguments.check_ignore_index(ignore_index)
    students, teachers = arguments.check_pairs(student_logits, teacher_logits)
    student = students[0]
    if target is None and uses_label:
        raise TypeError("target is None; expected an int64 tensor of labels")
    if weight is not None:
        arguments.check_row_weight(weight, student)
        weight = as_ordinary("weight", weight)
    none_ignored = True
    if target is not None:
        arguments.check_target(target, student)
        target = as_ordinary("target", target)
        none_ignored = is_readable(target) and arguments.check_labels(target, student.shape[-1], ignore_index)

    chosen = _backend_for((*students, *teachers, weight, target), student, teachers[0])
    students = [as_ordinary("student_logits", logits) for logits in students]
    teachers = [as_ordinary("teacher_logits", logits) for logits in teachers]
    if center_teacher:
        teachers = [centered(logits) for logits in teachers]

    reduced = reduction != "none"
    leading, classes = student.shape[:-1], student.shape[-1]
    count = student.numel() // classes
    labels = None if target is None else target.reshape(-1)
    valid = None if labels is None or none_ignored else labels != ignore_index
    row_weight, divisor = _row_weight(weight, valid, count, reduction, student.dtype)
    label = labels if uses_label else None
    terms: Tensor | None
    if chosen == "eager":
        rows, terms = _eager(loss, options, students, teachers, label, valid, row_weight, divisor, reduced)
    else:
        numbers, dynamic = _numbers(loss, options, student)
        call = Call(label, row_weight, divisor, loss, numbers, dynamic, chosen, reduced, with_terms)
        rows, terms = operators.row_loss(students, teachers, call)
    of_pairs = () if isinstance(student_logits, Tensor) else (len(students),)
    shape = of_pairs if reduced else of_pairs + leading
    if rows.shape != shape:
        rows = rows.view(shape)
    if not with_terms or terms is None:
        return rows, ()
    return rows, terms.detach().view(terms.shape[0], *shape)


def _backend_for(tensors: Sequence[Tensor | None], student: Tensor, teacher: Tensor) -> str:
    name = backend.get_backend()
    chosen = backend.resolve(name, student.device.type, student.dtype, teacher.dtype)
    transform = None if chosen == "eager" else transform_of(tensors)
    if transform is None:
        return chosen
    if name == "auto":
        return "eager"  # plain torch, which every transform knows
    raise backend.BackendUnavailable(
        f"backend {name!r} does not run inside {transform}, whose tensors do not hold their own values; use "
        "set_backend('auto') or 'eager', which computes such a call in plain torch"
    )


def _numbers(
    loss: str, options: tuple[float, ...], student: Tensor
) -> tuple[tuple[float, ...], Tensor | None]:
    """``Call.options`` and ``Call.dynamic``.

    While torch.compile traces, a number is symbolic once it has changed. Passed to an operator as a number
    it would be compiled in, and compiled again for every value; so it is passed in a tensor. Whether it
    equals the value that selects code is decided by a comparison, at the cost of one compilation for each
    outcome. A bool always selects code.
    """
    if not torch.compiler.is_compiling():
        return tuple(map(float, options)), None
    one = student.new_ones((), dtype=torch.float32)
    dynamic = torch.stack([one * value for value in options if not isinstance(value, bool)])
    choices = LOSSES[loss].code_values
    known = [
        float(value)
        if isinstance(value, bool) or (index < len(choices) and value == choices[index])
        else math.nan
        for index, value in enumerate(options)
    ]
    return tuple(known), dynamic


def _row_weight(
    weight: Tensor | None, valid: Tensor | None, rows: int, reduction: str, dtype: torch.dtype
) -> tuple[Tensor | None, int]:
    """The factor of each row's loss [N], or None if it is 1 for all, and the divisor of all rows.

    The kernels apply both as they write the gradient, so that the reduction needs no extra pass.
    """
    mean = reduction == "batchmean"
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    row_weight = None if weight is None else weight.to(precision).reshape(-1).contiguous()
    if valid is None:
        return row_weight, max(rows, 1) if mean else 1
    present = valid.to(precision)
    row_weight = present if row_weight is None else row_weight.masked_fill(~valid, 0.0)
    return (row_weight / present.sum().clamp_min(1.0) if mean else row_weight), 1


def _eager(
    loss: str,
    options: tuple[float, ...],
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    label: Tensor | None,
    valid: Tensor | None,
    row_weight: Tensor | None,
    divisor: int,
    reduced: bool,
) -> tuple[Tensor, Tensor]:
    """``operators.row_loss`` in plain torch: rows [H, N] and terms [K, H, N], or their sums over N."""
    classes = students[0].shape[-1]
    students, teachers = ([one.reshape(-1, classes) for one in logits] for logits in (students, teachers))
    if row_weight is not None:
        # A row of weight 0 may hold anything, including values for which 0 * gradient is NaN.
        unread = (row_weight == 0)[:, None]
        students, teachers = (
            [one.masked_fill(unread, 0.0) for one in logits] for logits in (students, teachers)
        )
        if label is not None and valid is not None:
            label = label.masked_fill(~valid, 0)
    row_loss = LOSSES[loss].rows
    pairs = [row_loss(s, t, label, *options) for s, t in zip(students, teachers, strict=True)]
    rows, terms = torch.stack([rows for rows, _ in pairs]), torch.stack([terms for _, terms in pairs], 1)
    rows, terms = (
        (values if row_weight is None else values * row_weight) / divisor for values in (rows, terms)
    )
    return (rows.sum(-1), terms.sum(-1)) if reduced else (rows, terms)
