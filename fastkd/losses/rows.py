"""What a call asks of each row, whatever form its logits have; the backend; the rows in plain torch."""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastkd.ops import backend
from fastkd.ops.call import Marks
from fastkd.ops.spec import LOSSES, Loss
from fastkd.ops.tensors import is_readable, is_traced, transform_of
from fastkd.reference import known_classes

from .forms import Form


class Rows(NamedTuple):
    """N rows of logits [..., C]."""

    label: Tensor | None  # int64 [N], for a loss that uses labels; in plain torch also probabilities [N, C]
    weight: Tensor | None  # [N], the factor of each row's loss, 0 where the label is ignored; None: 1
    divisor: int  # of all rows
    reduced: bool  # to their sum
    leading: torch.Size  # the shape of one value per row
    marks: Marks | None = None  # not yet in the weights: a kernel applies them

    def marked(self) -> "Rows":
        """With the marks in the weights."""
        if self.marks is None:
            return self
        from fastkd.ops.triton.row_weights import row_weights

        return self._replace(weight=row_weights(self.marks, self.weight), marks=None)


def rows_of(
    student: Form,
    label: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    marks: Tensor | None = None,
    ignore_index: int = -100,
    in_kernel: bool = False,
) -> Rows:
    """``marks`` [N]: labels of which some may be ``ignore_index``; None: no row is ignored.

    With ``in_kernel`` they may be left to a kernel, see ``Rows.marks``.
    """
    leading, reduced, mean = student.shape[:-1], reduction != "none", reduction == "batchmean"
    weight = None if weight is None else weight.reshape(-1)
    if marks is not None and _by_kernel(marks, weight, student.dtype):
        rows = Rows(label, weight, 1, reduced, leading, Marks(marks, int(ignore_index), mean))
        return rows if in_kernel else rows.marked()
    row_weight, divisor = _row_weight(weight, marks, ignore_index, math.prod(leading), mean, student.dtype)
    return Rows(label, row_weight, divisor, reduced, leading)


def backend_for(tensors: Sequence[Tensor | None], student: Tensor, teacher: Tensor) -> str:
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


def numbers_of(
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


def known_rows(
    spec: Loss, indices: Tensor, student: Tensor, teacher: Tensor, label: Tensor | None, *options: float
) -> tuple[Tensor, Tensor]:
    """``Loss.rows`` for a teacher [N, K + 1] that is known at the classes ``indices`` [N, K]."""
    named = spec.options(*options)
    position = None if label is None or not spec.labelled_at_k(named) else positions(indices, label)
    known = known_classes(student, indices, spec.temperatures(named)[0])
    losses, terms = spec.rows(known, teacher, position, *spec.at_k(options))
    if any(getattr(named, name) for name in spec.of_student):
        of_student = spec.rows(student, student.detach(), label, *spec.of_student_only(options))
        losses, terms = losses + of_student[0], terms + of_student[1]
    return losses, terms


def positions(indices: Tensor, label: Tensor) -> Tensor:
    """Where each row has its label; a row without it has a NaN teacher, and any position."""
    return (indices == label[:, None]).long().argmax(-1)


def _row_weight(
    weight: Tensor | None,
    marks: Tensor | None,
    ignore_index: int,
    rows: int,
    mean: bool,
    dtype: torch.dtype,
) -> tuple[Tensor | None, int]:
    """The factor of each row's loss [N], or None if it is 1 for all, and the divisor of all rows.

    The kernels apply both as they write the gradient, so that the reduction needs no extra pass.
    """
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    row_weight = None if weight is None else weight.to(precision).contiguous()
    if marks is None:
        return row_weight, max(rows, 1) if mean else 1
    valid = marks != ignore_index
    present = valid.to(precision)
    row_weight = present if row_weight is None else row_weight.masked_fill(~valid, 0.0)
    return (row_weight / present.sum().clamp_min(1.0) if mean else row_weight), 1


def _by_kernel(marks: Tensor, weight: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether a Triton kernel computes the weights: on a GPU, also for the native backend.

    A compiler fuses torch's operators itself, and transforms know no others.
    """
    tensors = (marks,) if weight is None else (marks, weight)
    if dtype not in backend.FUSED_DTYPES or is_traced(tensors):
        return False
    device = marks.device.type
    chosen = backend.resolve(backend.get_backend(), device, dtype)
    if chosen == "eager" or (chosen == "native" and device == "cpu"):
        return False
    if transform_of(tensors) is not None or backend.missing("triton", device) is not None:
        return False
    from fastkd.ops.triton.row_weights import takes

    return takes(marks, weight)


def _savable(tensor: Tensor | None) -> Tensor | None:
    """A copy of what was made in inference mode, which autograd does not save; the kernels save nothing."""
    if tensor is None or torch.compiler.is_compiling() or not tensor.is_inference():
        return tensor
    return tensor.clone()


def can_check(label: Tensor, weight: Tensor | None) -> bool:
    """Whether the labels of the rows that count can be read, so that ``reduced_loss`` has checked them."""
    return is_readable(label) and (weight is None or is_readable(weight))


def eager_rows(
    loss: str,
    options: tuple[float, ...],
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    rows: Rows,
    indices: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``operators.row_loss`` in plain torch: rows [H, N] and terms [K, H, N], or their sums over N."""
    students, teachers = (
        [one.reshape(-1, one.shape[-1]) for one in logits] for logits in (students, teachers)
    )
    label, row_weight, indices = (_savable(one) for one in (rows.label, rows.weight, indices))
    if row_weight is not None:
        # A row of weight 0 may hold anything, including values for which 0 * gradient is NaN.
        unread = row_weight == 0
        students, teachers = (
            [one.masked_fill(unread[:, None], 0.0) for one in logits] for logits in (students, teachers)
        )
        if label is not None and label.dim() == 1:
            label = label.masked_fill(unread, 0)
    if label is not None and label.dim() == 1 and not can_check(label, row_weight):
        # Torch's gather would stop at such a label, on a GPU with an error that ends the process.
        wrong = (label < 0) | (label >= students[0].shape[-1])
        factor = torch.ones_like(wrong, dtype=students[0].dtype).masked_fill(wrong, torch.nan)
        students = [one * factor[:, None] for one in students]
        label = label.masked_fill(wrong, 0)
    row_loss = LOSSES[loss].rows if indices is None else partial(known_rows, LOSSES[loss], indices)
    pairs = [row_loss(s, t, label, *options) for s, t in zip(students, teachers, strict=True)]
    losses = torch.stack([values for values, _ in pairs])
    terms = torch.stack([terms for _, terms in pairs], 1)
    if row_weight is not None:
        losses, terms = losses * row_weight, terms * row_weight
    losses, terms = losses / rows.divisor, terms / rows.divisor
    return (losses.sum(-1), terms.sum(-1)) if rows.reduced else (losses, terms)
