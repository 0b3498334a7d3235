"""From logits to a loss: check, choose a backend, run it over the rows, reduce. All losses take this path."""

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastkd.ops import operators
from fastkd.ops.backend import faster_for
from fastkd.ops.call import Call
from fastkd.ops.plan import NATIVE_ROWS
from fastkd.ops.spec import LOSSES
from fastkd.ops.tensors import as_ordinary, is_traced
from fastkd.reference import centered

from . import arguments, sharded
from .form_rows import form_rows
from .forms import Form
from .rows import Rows, backend_for, can_check, eager_rows, numbers_of, rows_of

Logits: TypeAlias = Form | Sequence[Form]


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
    try:
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
            target = target if target.dim() == 1 else target.reshape(-1)
            readable = can_check(target, weight)
            none_ignored = readable and arguments.check_labels(
                target, student.shape[-1], ignore_index, weight=weight
            )
    except (TypeError, ValueError) as error:
        sharded.tell_error(error, student_logits, teacher_logits)
        raise

    if not all([isinstance(value, float | int) for value in options]):  # noqa: C419  # traced
        make: Any = type(options)
        options = make(*[arguments.plain(value) for value in options])
    marks = None if none_ignored else target
    dense = all(isinstance(logits, Tensor) for logits in (*students, *teachers))
    label = target if uses_label else None
    rows = rows_of(student, label, weight, reduction, marks, ignore_index, in_kernel=dense)
    compute = _dense_rows if dense else form_rows
    values, terms = compute(loss, options, students, teachers, rows, center_teacher, with_terms)
    of_pairs = () if isinstance(student_logits, arguments.ONE) else (len(students),)
    shape = of_pairs if rows.reduced else of_pairs + rows.leading
    if values.shape != shape:
        values = values.view(shape)
    if not with_terms or terms is None:
        return values, ()
    terms = terms.detach()
    return values, (terms if terms.shape[1:] == shape else terms.view(terms.shape[0], *shape)).unbind()


def _dense_rows(
    loss: str,
    options: tuple[float, ...],
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    rows: Rows,
    center_teacher: bool,
    with_terms: bool,
) -> tuple[Tensor, Tensor | None]:
    """Of logits in memory: [H N], or their sums, and terms."""
    student = students[0]
    chosen = backend_for((*students, *teachers, rows.weight, rows.label), student, teachers[0])
    if chosen == "triton" and all(logits.dtype == student.dtype for logits in (*students, *teachers)):
        classes = student.shape[-1]
        # While torch.compile traces, a condition on the rows would compile again for other batch sizes.
        count = NATIVE_ROWS if torch.compiler.is_compiling() else len(students) * rows.leading.numel()
        labelled = rows.label is not None
        family = LOSSES[loss].family
        chosen = faster_for(chosen, student.device, family, labelled, count, classes, student.dtype)
    students = [as_ordinary("student_logits", logits) for logits in students]
    teachers = [as_ordinary("teacher_logits", logits) for logits in teachers]
    if center_teacher:
        teachers = [centered(logits) for logits in teachers]
    if rows.marks is not None and not _applies_marks(chosen, (*students, *teachers)):
        rows = rows.marked()
    if chosen == "eager":
        return eager_rows(loss, options, students, teachers, rows)
    numbers, dynamic = numbers_of(loss, options, student)
    call = Call(
        rows.label, rows.weight, rows.divisor, loss, numbers, dynamic, chosen, rows.reduced, with_terms,
        marks=rows.marks,
    )  # fmt: skip
    return operators.row_loss(students, teachers, call)


def _applies_marks(chosen: str, logits: Sequence[Tensor]) -> bool:
    """Whether the launch does. The operator has no argument for it, and in float16 backward needs weights."""
    return chosen == "triton" and logits[0].dtype != torch.float16 and not is_traced(logits)
