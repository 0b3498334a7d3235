"""The torch operator of losses of a linear layer's output: schema, fake implementation, autograd.

``fastkd::linear_loss`` computes the loss and, if asked for, the gradients of the student's tensors;
``backward`` scales them by grad_output and rounds once. A student given as float16 logits is the exception,
as in ``operators``: ``backward`` computes its gradient with grad_output multiplied into the row weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd.ops.backward import check_grad_output, is_one, must_copy, save_inputs, saved_inputs
from fastkd.ops.call import CALL_TENSORS, OPERANDS, Call
from fastkd.ops.chunks import LinearCall, compute, count_rows, new_gradients
from fastkd.ops.tensors import as_ordinary, is_traced

_library = torch.library.Library("fastkd", "FRAGMENT")
_library.define(
    "linear_loss(Tensor[] student, Tensor[] teacher, bool[] wanted, Tensor? target, Tensor? row_weight, "
    "SymInt divisor, str loss, float[] options, Tensor? dynamic, str backend, bool reduced, bool with_terms, "
    "bool with_gradient, Tensor? indices, SymInt classes, SymInt chunk_rows, bool center_teacher, "
    "float[] student_numbers, float[] teacher_numbers) "
    "-> (Tensor rows, Tensor terms, Tensor first, Tensor second, Tensor third)"
)
_MOST_TENSORS = 3  # hidden, weight, bias


def linear_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], options: LinearCall
) -> tuple[Tensor, Tensor | None]:
    """Weighted losses [N] and terms [K, N] in float32, or with ``call.reduced`` their sums.

    ``student`` and ``teacher`` are (logits [..., C],), or (hidden [N, H], weight [C or more, H]) of a linear
    layer, with its bias as a third. Without terms, None or an empty tensor.
    """
    enabled = torch.is_grad_enabled()
    wanted = [enabled and tensor.requires_grad for tensor in student]
    differentiates = any(wanted)
    if len(student) == 1 and student[0].dtype == torch.float16:
        wanted = [False]  # backward computes it
    assert options.shard is None or not is_traced((*student, *teacher))
    if is_traced((*student, *teacher)):
        rows, terms, *_ = torch.ops.fastkd.linear_loss(student, teacher, wanted, *_flat(options))
    elif differentiates:
        rows, terms = _LinearLoss.apply(options, wanted, *student, *teacher)
    else:
        rows, terms, _ = compute(student, teacher, options, wanted)
    return rows, terms


def _flat(options: LinearCall) -> tuple[Any, ...]:
    call, classes, chunk_rows, center_teacher, student, teacher, _ = options  # a shard is never traced
    return *call.operands, classes, chunk_rows, center_teacher, list(student), list(teacher)


def _unflat(arguments: Sequence[Any]) -> LinearCall:
    classes, chunk_rows, center_teacher, student, teacher = arguments[OPERANDS:]
    return LinearCall(
        Call(*arguments[:OPERANDS]), classes, chunk_rows, center_teacher, tuple(student), tuple(teacher)
    )


@torch.library.impl("fastkd::linear_loss", ("cpu", "cuda"), lib=_library)
def _operator(
    student: Sequence[Tensor], teacher: Sequence[Tensor], wanted: Sequence[bool], *arguments: Any
) -> tuple[Tensor, ...]:
    rows, terms, gradients = compute(student, teacher, _unflat(arguments), wanted)
    return rows, *_present(rows, terms, gradients)


def _present(rows: Tensor, terms: Tensor | None, gradients: Sequence[Tensor | None]) -> list[Tensor]:
    """Terms and three gradients; empty tensors for absent ones."""
    outputs = [terms, *gradients, None, None][: 1 + _MOST_TENSORS]
    return [rows.new_empty(0) if output is None else output for output in outputs]


@torch.library.register_fake("fastkd::linear_loss", lib=_library)
def _shapes(
    student: Sequence[Tensor], teacher: Sequence[Tensor], wanted: Sequence[bool], *arguments: Any
) -> tuple[Tensor, ...]:
    options = _unflat(arguments)
    call, names = options.call, options.call.spec.terms
    shape = () if call.reduced else (count_rows(student),)
    rows = student[0].new_empty(shape, dtype=torch.float32)
    terms = rows.new_empty((len(names), *shape)) if call.with_terms and names else None
    return rows, *_present(rows, terms, new_gradients(student, wanted, zeros=False))


# ---- autograd: of the operator, and of the same function without the dispatcher -----------------------


def _save(
    ctx: Any,
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    options: LinearCall,
    wanted: Sequence[bool],
    gradients: Sequence[Tensor | None],
) -> None:
    """Save for backward: the gradients, or the inputs that they are computed from."""
    ctx.set_materialize_grads(False)
    ctx.wanted, ctx.teachers = wanted, len(teacher)
    ctx.dtypes = [tensor.dtype for tensor in student]
    ctx.recompute = None
    if any(wanted):
        ctx.save_for_backward(*gradients)
        return
    ctx.recompute = options._replace(call=options.call.of([None] * CALL_TENSORS))
    save_inputs(ctx, (*options.call.tensors, *student, *teacher))


def _gradients(ctx: Any, grad_output: Tensor | None) -> Sequence[Tensor | None]:
    """Of each of the student's tensors."""
    saved = ctx.saved_tensors  # raises if an earlier backward has freed them
    if grad_output is None:
        return [None] * len(ctx.dtypes)
    traced = check_grad_output(grad_output, recomputes=ctx.recompute is not None)
    if ctx.recompute is None:
        return [
            _scaled(gradient, grad_output, dtype, traced) if wanted else None
            for gradient, dtype, wanted in zip(saved, ctx.dtypes, ctx.wanted, strict=False)
        ]
    inputs = saved_inputs(ctx, saved)
    call = ctx.recompute.call.of(inputs[:CALL_TENSORS])
    student, *teacher = inputs[CALL_TENSORS:]
    if not traced:  # since the forward, FSDP may have freed a teacher's weight
        teacher = [as_ordinary("teacher_logits", tensor) for tensor in teacher]
    count = count_rows([student])
    factors = grad_output.float().reshape(-1).expand(count)
    factors = factors.contiguous() if call.row_weight is None else factors * call.row_weight
    call = call._replace(row_weight=factors, reduced=False, with_terms=False)
    options = ctx.recompute._replace(call=call)
    if traced:
        return [torch.ops.fastkd.linear_loss([student], teacher, [True], *_flat(options))[2]]
    return compute([student], teacher, options, [True])[2]


def _scaled(gradient: Tensor, grad_output: Tensor, dtype: torch.dtype, traced: bool) -> Tensor:
    """Times grad_output, one value or one per row, rounded to ``dtype`` once."""
    factor = grad_output
    if factor.numel() != 1:
        factor = factor.reshape(*gradient.shape[:-1], 1)
    if must_copy(traced):
        return (gradient * factor).to(dtype)
    if is_one(factor):
        return gradient.to(dtype)
    return gradient.mul_(factor).to(dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, terms, *gradients = output
    ctx.mark_non_differentiable(terms, *gradients)
    student, teacher, wanted, *arguments = inputs
    _save(ctx, student, teacher, _unflat(arguments), wanted, gradients)


def _backward(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Any, ...]:
    rest = (None,) * (1 + OPERANDS + 5)
    return list(_gradients(ctx, grad_output)), [None] * ctx.teachers, *rest


torch.library.register_autograd("fastkd::linear_loss", _backward, setup_context=_setup, lib=_library)


class _LinearLoss(torch.autograd.Function):
    """The operator without the dispatcher, so that gradients can be scaled in place."""

    @staticmethod
    def forward(
        ctx: Any, options: LinearCall, wanted: Sequence[bool], *tensors: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        student, teacher = tensors[: len(wanted)], tensors[len(wanted) :]
        rows, terms, gradients = compute(student, teacher, options, wanted)
        if terms is not None:
            ctx.mark_non_differentiable(terms)
        _save(ctx, student, teacher, options, wanted, gradients)
        return rows, terms

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Any, ...]:
        return None, None, *_gradients(ctx, grad_output), *(None,) * ctx.teachers
