"""The torch operator: schema, dispatch to a backend, fake implementation, autograd.

``fastkd::row_loss`` computes the losses of all rows and, if the student requires it, their gradient;
``backward`` only scales that gradient by grad_output. float16 is the exception: over many classes, most of
the gradient underflows unless it is multiplied by the loss scale, which arrives in grad_output. So
``backward`` recomputes the rows, with grad_output multiplied into their weights, and rounds once.
"""

import math
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from fastkd.ops.backward import check_grad_output, is_one, must_copy, save_inputs, saved_inputs
from fastkd.ops.call import CALL_TENSORS, OPERANDS, Call, Outputs
from fastkd.ops.layout import as_rows
from fastkd.ops.tensors import TRACED, is_traced, is_transformed

_library = torch.library.Library("fastkd", "DEF")
_library.define(
    "row_loss(Tensor[] student_logits, Tensor[] teacher_logits, Tensor? target, Tensor? row_weight, "
    "SymInt divisor, str loss, float[] options, Tensor? dynamic, str backend, bool reduced, bool with_terms, "
    "bool with_gradient, Tensor? indices) "
    "-> (Tensor rows, Tensor terms, Tensor gradient)"
)
_library.define("scale_rows_(Tensor(a!) gradient, Tensor factors, str backend) -> ()")


def row_loss(
    student_logits: Sequence[Tensor], teacher_logits: Sequence[Tensor], call: Call
) -> tuple[Tensor, Tensor | None]:
    """Return weighted losses [H N], pair by pair, and their terms [K, H N], in float32.

    If ``call.reduced``, sums over the rows of each pair: [H] and [K, H], or [] and [K] for one pair. Without
    terms, None or an empty tensor.
    """
    differentiates = torch.is_grad_enabled() and any(logits.requires_grad for logits in student_logits)
    if differentiates and student_logits[0].dtype != torch.float16:
        call = Call(*call[:-3], True, *call[-2:])  # three times as fast as _replace
    if is_traced((*student_logits, *teacher_logits)):
        rows, terms, _ = torch.ops.fastkd.row_loss(student_logits, teacher_logits, *call.operands)
    elif differentiates:
        rows, terms = _RowLoss.apply(call, *student_logits, *teacher_logits)
    else:
        rows, terms, _ = _row_loss(student_logits, teacher_logits, call)
    return rows, terms


@cache
def launcher_of(backend: str) -> Any:
    if backend == "native":
        from fastkd.ops import native

        return native
    from fastkd.ops.triton import launch

    return launch


def _row_loss(
    students: Sequence[Tensor], teachers: Sequence[Tensor], call: Call
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The operator, with None for outputs that are not requested: an empty tensor costs an allocation."""
    pairs, first = len(students), students[0]
    classes = first.shape[-1]
    count = pairs * (first.numel() // classes)
    rows = first.new_empty(count, dtype=torch.float32)
    term_count = len(call.spec.terms) if call.with_terms else 0
    terms = rows.new_empty(term_count, count) if term_count else None
    gradient = first.new_empty(count, classes) if call.with_gradient else None
    outputs = Outputs(rows, terms, gradient)
    if count:
        launcher = launcher_of(call.backend)
        if call.reduced:
            outputs = launcher.with_sums(outputs, pairs, call)
        launcher.row_loss(*as_rows(students, teachers, call.indices is not None), call, outputs)
    if call.reduced:
        rows = _sum_rows(rows, pairs) if outputs.sums is None else outputs.sums
        if terms is not None:
            terms = _sum_rows(terms, pairs) if outputs.term_sums is None else outputs.term_sums
    return rows, terms, gradient


def _sum_rows(values: Tensor, pairs: int) -> Tensor:
    """Sums over the rows of each pair: [..., H N] to [..., H], or to [...] for one pair."""
    if pairs > 1:  # otherwise spares the view, which costs as much as the sum
        values = values.view(*values.shape[:-1], pairs, values.shape[-1] // pairs)
    return values.sum(-1)


@torch.library.impl("fastkd::row_loss", ("cpu", "cuda"), lib=_library)
def _row_loss_operator(
    students: Sequence[Tensor], teachers: Sequence[Tensor], *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    rows, terms, gradient = _row_loss(students, teachers, Call(*arguments))
    return (
        rows,
        rows.new_empty(0) if terms is None else terms,
        students[0].new_empty(0) if gradient is None else gradient,
    )


@torch.library.register_fake("fastkd::row_loss", lib=_library)
def _row_loss_shapes(
    students: Sequence[Tensor], teachers: Sequence[Tensor], *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    call, pairs, classes = Call(*arguments), len(students), students[0].shape[-1]
    count, terms = pairs * (students[0].numel() // classes), call.spec.terms
    shape: tuple[int, ...] = (count,)
    if call.reduced:
        shape = (pairs,) if pairs > 1 else ()
    rows = students[0].new_empty(shape, dtype=torch.float32)
    return (
        rows,
        rows.new_empty((len(terms), *shape) if call.with_terms and terms else 0),
        students[0].new_empty((count, classes) if call.with_gradient else 0),
    )


# ---- autograd: of the operator, and of the same function without the dispatcher -----------------------


def _save(
    ctx: Any, students: Sequence[Tensor], teachers: Sequence[Tensor], call: Call, gradient: Tensor | None
) -> None:
    """Save for backward: the gradient, or the inputs that it is computed from."""
    ctx.set_materialize_grads(False)
    ctx.pairs, ctx.shape = len(students), students[0].shape
    ctx.backend, ctx.recompute = call.backend, None
    if call.with_gradient:
        ctx.save_for_backward(gradient)
    else:
        ctx.recompute = call.of([None] * CALL_TENSORS)
        save_inputs(ctx, (*call.tensors, *students, *teachers))


def _gradients(ctx: Any, grad_output: Tensor | None) -> Sequence[Tensor | None]:
    """The gradients of each student's logits."""
    saved = ctx.saved_tensors  # raises if an earlier backward has freed them
    if grad_output is None:
        return [None] * ctx.pairs
    traced = check_grad_output(grad_output, recomputes=ctx.recompute is not None)
    grad_output = grad_output.resolve_neg()  # Triton reads memory, in which a lazy sign is not
    if ctx.recompute is None:
        gradient = _scaled(saved[0], grad_output, ctx.pairs, ctx.backend, traced)
    else:
        inputs = saved_inputs(ctx, saved)
        call, logits = ctx.recompute.of(inputs[:CALL_TENSORS]), inputs[CALL_TENSORS:]
        factors = _row_factors(call.row_weight, grad_output, ctx.pairs, ctx.shape)
        call = call._replace(row_weight=factors, reduced=False, with_terms=False, with_gradient=True)
        students, teachers = logits[: ctx.pairs], logits[ctx.pairs :]
        if traced:
            gradient = torch.ops.fastkd.row_loss(students, teachers, *call.operands)[2]
        else:
            gradient = cast(Tensor, _row_loss(students, teachers, call)[2])
    if ctx.pairs == 1:
        return [gradient if gradient.shape == ctx.shape else gradient.view(ctx.shape)]
    return gradient.view(ctx.pairs, *ctx.shape).unbind()


def _row_factors(row_weight: Tensor | None, grad_output: Tensor, pairs: int, shape: Sequence[int]) -> Tensor:
    """grad_output, one value per pair or per row, times the weights: [N], or [H, N] for several pairs."""
    factors = _per_row(grad_output.float(), pairs, math.prod(shape[:-1]))
    if row_weight is not None:
        factors = factors * row_weight
    return (factors[0] if pairs == 1 else factors).contiguous()


def _per_row(grad_output: Tensor, pairs: int, rows: int) -> Tensor:
    """grad_output, one value per pair or per row, as a view [H, N] wherever strides allow it."""
    return grad_output.reshape(pairs, -1).expand(pairs, rows)


def _scaled(gradient: Tensor, grad_output: Tensor, pairs: int, backend: str, traced: bool) -> Tensor:
    """The gradient computed with the loss, times grad_output."""
    rows_per_pair = gradient.shape[0] // pairs
    copies = must_copy(traced)
    if not copies and is_one(grad_output):  # on a GPU the kernel tests the factor
        return gradient
    if not rows_per_pair:
        return gradient
    factors = _per_row(grad_output, pairs, rows_per_pair)
    if isinstance(grad_output, TRACED) and _scales_in_place(grad_output):
        torch.ops.fastkd.scale_rows_(gradient, factors, backend)
        return gradient
    if copies:
        return (gradient * factors.reshape(-1, 1)).to(gradient.dtype)
    launcher_of(backend).scale_rows_(gradient, factors)
    return gradient


def _scales_in_place(grad_output: Tensor) -> bool:
    """Whether Inductor compiles with the pass for it, which a program that uses it has imported."""
    module = sys.modules.get("fastkd.ops.inductor")
    return module is not None and module.is_used() and not is_transformed(grad_output)


@torch.library.impl("fastkd::scale_rows_", ("cpu", "cuda"), lib=_library)
def _scale_rows(gradient: Tensor, factors: Tensor, backend: str) -> None:
    launcher_of(backend).scale_rows_(gradient, factors)


@torch.library.register_fake("fastkd::scale_rows_", lib=_library)
def _scale_rows_shapes(gradient: Tensor, factors: Tensor, backend: str) -> None:
    return None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, terms, gradient = output
    ctx.mark_non_differentiable(terms, gradient)
    students, teachers, *arguments = inputs
    _save(ctx, students, teachers, Call(*arguments), gradient)


def _backward(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Any, ...]:
    return list(_gradients(ctx, grad_output)), [None] * ctx.pairs, *(None,) * OPERANDS


torch.library.register_autograd("fastkd::row_loss", _backward, setup_context=_setup_context, lib=_library)


class _RowLoss(torch.autograd.Function):
    """The operator without the dispatcher, whose overhead exceeds the time of a small loss."""

    @staticmethod
    def forward(ctx: Any, call: Call, *logits: Tensor) -> tuple[Tensor, Tensor | None]:
        pairs = len(logits) // 2
        students, teachers = logits[:pairs], logits[pairs:]
        rows, terms, gradient = _row_loss(students, teachers, call)
        if terms is not None:
            ctx.mark_non_differentiable(terms)
        _save(ctx, students, teachers, call, gradient)
        return rows, terms

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Any, ...]:
        return None, *_gradients(ctx, grad_output), *(None,) * ctx.pairs
