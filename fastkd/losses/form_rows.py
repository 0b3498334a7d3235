"""Losses of logits in other forms than a tensor: the backend, and the call of the operator, pair by pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import overload

import torch
from torch import Tensor

from fastkd.ops.call import Call
from fastkd.ops.chunks import LinearCall
from fastkd.ops.linear import linear_loss
from fastkd.ops.operators import row_loss
from fastkd.ops.spec import LOSSES, Needs
from fastkd.ops.tensors import as_ordinary
from fastkd.reference import centered

from .forms import Form, LinearLogits, ShardedLogits, TopKLogits
from .known import check_defined, known_of
from .rows import Rows, backend_for, eager_rows, numbers_of
from .sharded import agree, check_runs


def form_rows(
    loss: str,
    options: tuple[float, ...],
    students: Sequence[Form],
    teachers: Sequence[Form],
    rows: Rows,
    center_teacher: bool,
    with_terms: bool,
) -> tuple[Tensor, Tensor | None]:
    """[H N] values, or their sums, and terms, pair by pair: pairs have no memory traffic in common."""
    for index, teacher in enumerate(teachers):
        if isinstance(teacher, TopKLogits):
            which = f"teacher_logits[{index}]" if len(teachers) > 1 else "teacher_logits"
            check_defined(loss, options, which, teacher)
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
    if isinstance(student, ShardedLogits):
        assert isinstance(teacher, ShardedLogits)  # checked
        arguments = loss, options, student, teacher, rows, center_teacher, with_terms
        if not torch.compiler.is_compiling():
            return _sharded_pair(*arguments)
        from .uncompiled import uncompiled

        found: tuple[Tensor, Tensor | None] = uncompiled(_sharded_pair, *arguments)
        return found
    student = _ready("student_logits", student)
    ours = _tensors(student)
    teacher, indices = _known(loss, options, student, _ready("teacher_logits", teacher), rows, ours[0].dtype)
    theirs = _tensors(teacher)
    chosen = backend_for((*ours, *theirs, rows.weight, rows.label), ours[0], theirs[0])
    if chosen == "eager":
        dense = _dense(student, rows), _dense(teacher, rows)
        teachers = [centered(dense[1])] if center_teacher else [dense[1]]
        return eager_rows(loss, options, [dense[0]], teachers, rows, indices)
    numbers, dynamic = numbers_of(loss, options, ours[0])
    call = Call(
        rows.label, rows.weight, rows.divisor, loss, numbers, dynamic, chosen, rows.reduced, with_terms,
        indices=indices,
    )  # fmt: skip
    layers = LinearLogits in (type(student), type(teacher))
    if not layers:
        return row_loss(ours, theirs, call)
    _check_reduced(student, rows)
    return linear_loss(
        ours,
        theirs,
        LinearCall(
            call,
            student.shape[-1],
            _chunk_rows(student, teacher),
            center_teacher,
            _numbers(student),
            _numbers(teacher),
        ),
    )


def _sharded_pair(
    loss: str,
    options: tuple[float, ...],
    student: ShardedLogits,
    teacher: ShardedLogits,
    rows: Rows,
    center_teacher: bool,
    with_terms: bool,
) -> tuple[Tensor, Tensor | None]:
    student = replace(student, local=_ready("student_logits.local", student.local))
    teacher = replace(teacher, local=_ready("teacher_logits.local", teacher.local))
    if isinstance(student.local, Tensor) and student.dtype == torch.float16:
        # So that backward scales a float32 gradient; float16 ones are computed in backward, with collectives.
        student = replace(student, local=student.local.float())
    ours, theirs = _tensors(student.local), _tensors(teacher.local)
    _check_reduced(student.local, rows)
    check_runs((*ours, *theirs), rows)
    chunk_rows = _chunk_rows(student.local, teacher.local)
    shard = agree(loss, options, student, teacher, rows, chunk_rows, center_teacher, with_terms)
    numbers = tuple(map(float, options))
    call = Call(
        rows.label, rows.weight, rows.divisor, loss, numbers, None, "eager", rows.reduced, with_terms
    )  # fmt: skip
    options_of_layers = _numbers(student.local), _numbers(teacher.local)
    return linear_loss(
        ours,
        theirs,
        LinearCall(call, student.local.shape[-1], chunk_rows, center_teacher, *options_of_layers, shard),
    )


def _check_reduced(student: Form, rows: Rows) -> None:
    if (
        isinstance(student, LinearLogits)
        and not rows.reduced
        and torch.is_grad_enabled()
        and student.requires_grad
    ):
        raise ValueError(
            "reduction='none' has no gradient with LinearLogits, whose gradient is computed with the "
            "loss, summed over the rows; give each row's factor as weight=, with 'sum' or 'batchmean'"
        )


def _known(
    loss: str, options: tuple[float, ...], student: Form, teacher: Form, rows: Rows, dtype: torch.dtype
) -> tuple[Form, Tensor | None]:
    """The teacher as a loss takes it: of ``TopKLogits`` the logits [N, K + 1], beside the classes [N, K]."""
    if not isinstance(teacher, TopKLogits):
        return teacher, None
    spec = LOSSES[loss]
    named = spec.options(*options)
    if not spec.needs(named) & Needs.DISTILLS:
        return student.detach(), None  # the teacher is not read
    label = rows.label if spec.labelled_at_k(named) else None
    return known_of(teacher, label, rows.weight, dtype)


@overload
def _ready(name: str, form: Tensor | LinearLogits) -> Tensor | LinearLogits: ...


@overload
def _ready(name: str, form: Form) -> Form: ...


def _ready(name: str, form: Form) -> Form:
    if isinstance(form, Tensor):
        return as_ordinary(name, form)
    if isinstance(form, LinearLogits):
        form = form.under_autocast()
    assert not isinstance(form, ShardedLogits)  # its ``local`` is made ready
    return form.of([as_ordinary(f"{name}.{field}", tensor) for field, tensor in form.tensors.items()])


def _tensors(form: Form) -> list[Tensor]:
    """Of ``ops.linear.linear_loss``."""
    if isinstance(form, Tensor):
        return [form]
    assert not isinstance(form, ShardedLogits)
    hidden, *layer = form.tensors.values()
    return [hidden.reshape(-1, hidden.shape[-1]), *layer]


def _dense(form: Form, rows: Rows) -> Tensor:
    if not isinstance(form, LinearLogits):
        assert isinstance(form, Tensor)  # TopKLogits have become one
        return form
    if rows.weight is not None:
        # A row of weight 0 may hold anything, and 0 * NaN would be part of the weight's gradient.
        unread = (rows.weight == 0).view(rows.leading)[..., None]
        form = form.of([form.hidden.masked_fill(unread, 0.0), *list(form.tensors.values())[1:]])
    return form.dense()


def _numbers(form: Form) -> tuple[float, float]:
    """Scale and softcap, 0 for none."""
    if not isinstance(form, LinearLogits):
        return 1.0, 0.0
    return float(form.scale), 0.0 if form.softcap is None else float(form.softcap)


def _chunk_rows(*forms: Form) -> int:
    """The smaller one, or 0 if none is given."""
    chosen = [
        form.chunk_rows for form in forms if isinstance(form, LinearLogits) and form.chunk_rows is not None
    ]
    return min(chosen, default=0)
