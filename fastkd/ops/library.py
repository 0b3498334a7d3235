"""The torch operators: schema, dispatch to a backend, shapes for the compiler, autograd. All in one place.

``fastkd::row_loss`` computes the losses of all rows and, when the student needs it, the gradient with them.
``backward`` then only has to scale that gradient by what comes from upstream.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

TERMS = {"softmax": 4}

_library = torch.library.Library("fastkd", "DEF")
_library.define(
    "row_loss(Tensor[] student_logits, Tensor[] teacher_logits, Tensor? target, Tensor? row_weight, "
    "SymInt divisor, str loss, float[] options, str backend, bool reduced, bool with_terms, "
    "bool with_gradient) "
    "-> (Tensor rows, Tensor terms, Tensor gradient)"
)


def row_loss(
    student_logits: Sequence[Tensor],
    teacher_logits: Sequence[Tensor],
    target: Tensor | None,
    row_weight: Tensor | None,
    divisor: int,
    loss: str,
    options: Sequence[float],
    backend: str,
    *,
    reduced: bool,
    with_terms: bool,
) -> tuple[Tensor, Tensor | None]:
    """Losses [H N] of the rows of H pairs of logits [N, C], pair by pair, and their terms [K, H N], in
    float32, times ``row_weight`` [N] and divided by ``divisor``; ``reduced``, each pair's sums over its rows:
    [H] and [K, H], or [] and [K] for one pair. Terms that are not asked for, or that the loss has not, are
    None or an empty tensor.

    ``target`` [N] names the label of each row, where the loss uses one; a label out of range gives a NaN
    row. A row of weight 0 is not read. ``options`` are those of the loss in ``fastkd.reference``.
    """
    with_gradient = torch.is_grad_enabled() and any(logits.requires_grad for logits in student_logits)
    settings = (target, row_weight, divisor, loss, options, backend, reduced, with_terms, with_gradient)
    if torch.compiler.is_compiling():
        rows, terms, _ = torch.ops.fastkd.row_loss(student_logits, teacher_logits, *settings)
    elif with_gradient:
        rows, terms = _RowLoss.apply(settings, *student_logits, *teacher_logits)
    else:
        rows, terms, _ = _row_loss(student_logits, teacher_logits, *settings)
    return rows, terms


@cache
def _launcher(backend: str) -> Any:
    if backend == "native":
        from fastkd.ops import native

        return native
    from fastkd.ops.triton import launch

    return launch


def _dense_rows(logits: Sequence[Tensor]) -> Sequence[Tensor]:
    """Kernels take any row stride, the same for all pairs; only a row that is not dense is copied."""
    stride = logits[0].stride()
    if stride[1] == 1 and all(other.stride() == stride for other in logits[1:]):
        return logits
    return [one.contiguous() for one in logits]


def _row_loss(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    target: Tensor | None,
    row_weight: Tensor | None,
    divisor: int,
    loss: str,
    options: Sequence[float],
    backend: str,
    reduced: bool,
    with_terms: bool,
    with_gradient: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What the operator gives, with None for what is not asked for: an empty tensor costs a call as well."""
    count, classes = students[0].shape
    count *= len(students)
    rows = students[0].new_empty(count, dtype=torch.float32)
    terms = rows.new_empty(TERMS[loss], count) if with_terms and loss in TERMS else None
    gradient = students[0].new_empty(count, classes) if with_gradient else None
    students, teachers = _dense_rows(students), _dense_rows(teachers)
    sums: tuple[Tensor, ...] = ()
    if reduced and count and backend == "native" and rows.is_cpu:
        # Along with the rows: to start torch's own sum takes as long as a small loss.
        sums = (rows.new_empty(() if len(students) == 1 else len(students)),)
    if count:
        _launcher(backend).row_loss(
            students, teachers, target, row_weight, 1.0 / divisor, loss, options, rows, terms, gradient, *sums
        )
    if reduced:
        rows = sums[0] if sums else _sum_rows(rows, len(students))
        terms = None if terms is None else _sum_rows(terms, len(students))
    return rows, terms, gradient


def _sum_rows(values: Tensor, pairs: int) -> Tensor:
    """[..., H N] to [..., H], or [...] for one pair: the sums over the rows of each."""
    if pairs > 1:  # a view costs as much as the sum
        values = values.view(*values.shape[:-1], pairs, values.shape[-1] // pairs)
    return values.sum(-1)


@torch.library.impl("fastkd::row_loss", ("cpu", "cuda"), lib=_library)
def _row_loss_operator(students: Sequence[Tensor], *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows, terms, gradient = _row_loss(students, *arguments)
    return (
        rows,
        rows.new_empty(0) if terms is None else terms,
        students[0].new_empty(0) if gradient is None else gradient,
    )


@torch.library.register_fake("fastkd::row_loss", lib=_library)
def _row_loss_shapes(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    target: Tensor | None,
    row_weight: Tensor | None,
    divisor: int,
    loss: str,
    options: Sequence[float],
    backend: str,
    reduced: bool,
    with_terms: bool,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    count, classes = students[0].shape
    count *= len(students)
    of_rows: tuple[int, ...] = (count,)
    if reduced:
        of_rows = (len(students),) if len(students) > 1 else ()
    rows = students[0].new_empty(of_rows, dtype=torch.float32)
    return (
        rows,
        rows.new_empty((TERMS[loss], *of_rows) if with_terms and loss in TERMS else 0),
        students[0].new_empty((count, classes) if with_gradient else 0),
    )


def _keep_gradient(ctx: Any, gradient: Tensor | None, pairs: int, backend: str) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(gradient)
    ctx.pairs = pairs
    ctx.backend = backend


def _gradients(ctx: Any, upstream: Tensor | None) -> Sequence[Tensor | None]:
    """Of each student's logits: the gradient computed with the loss, times what comes from upstream."""
    (gradient,) = ctx.saved_tensors
    if upstream is None:
        return [None] * ctx.pairs
    traced = torch.compiler.is_compiling() or type(gradient) is not Tensor
    if torch.is_grad_enabled() and not traced:
        raise RuntimeError(
            "fastkd computes the gradient with the loss and does not differentiate it again "
            "(create_graph=True); use fastkd.set_backend('eager') for second derivatives"
        )
    of_pair = gradient.shape[0] // ctx.pairs
    kept = not traced and torch._C._autograd._get_current_graph_task_keep_graph()
    # A number on the CPU is read without waiting for anything; on a GPU the kernel decides.
    one = not traced and upstream.dim() == 0 and upstream.is_cpu and upstream.item() == 1.0
    if kept or not one:
        factors = upstream
        if upstream.numel() != gradient.shape[0]:  # one number a pair
            factors = upstream.expand(of_pair) if ctx.pairs == 1 else upstream.repeat_interleave(of_pair)
        # In place where the saved gradient is ours alone. Whoever keeps the graph may come again, and a
        # compiler fuses a plain product with what follows.
        if traced or kept:
            gradient = (gradient * factors.unsqueeze(-1)).to(gradient.dtype)
        elif of_pair:
            _launcher(ctx.backend).scale_rows_(gradient, factors)
    return [gradient] if ctx.pairs == 1 else gradient.split(of_pair)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, terms, gradient = output
    ctx.mark_non_differentiable(terms, gradient)
    _keep_gradient(ctx, gradient, len(inputs[0]), inputs[7])


def _backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Any, ...]:
    return list(_gradients(ctx, upstream)), [None] * ctx.pairs, *(None,) * 9


torch.library.register_autograd("fastkd::row_loss", _backward, setup_context=_setup_context, lib=_library)


class _RowLoss(torch.autograd.Function):
    """The operator without the dispatcher, which outside of a compiler costs more than a small loss."""

    @staticmethod
    def forward(ctx: Any, settings: tuple[Any, ...], *logits: Tensor) -> tuple[Tensor, Tensor | None]:
        pairs = len(logits) // 2
        rows, terms, gradient = _row_loss(logits[:pairs], logits[pairs:], *settings)
        if terms is not None:
            ctx.mark_non_differentiable(terms)
        _keep_gradient(ctx, gradient, pairs, settings[5])
        return rows, terms

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Any, ...]:
        return None, *_gradients(ctx, upstream), *(None,) * ctx.pairs
