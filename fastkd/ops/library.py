"""The torch operators: schema, dispatch to a backend, shapes for the compiler, autograd. All in one place.

``fastkd::row_loss`` computes the losses of all rows and, when the student needs it, the gradient with them.
``backward`` then only has to scale that gradient by what comes from upstream.
"""

from collections.abc import Sequence
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
) -> tuple[Tensor, Tensor]:
    """Losses [H N] of the rows of H pairs of logits [N, C], pair by pair, and their terms [K, H N], in
    float32, times ``row_weight`` [N] and divided by ``divisor``; ``reduced``, each pair's sums over its rows:
    [H] and [K, H], or [] and [K] for one pair.

    ``target`` [N] names the label of each row, where the loss uses one; a label out of range gives a NaN
    row. A row of weight 0 is not read. ``options`` are those of the loss in ``fastkd.reference``.
    """
    with_gradient = torch.is_grad_enabled() and any(logits.requires_grad for logits in student_logits)
    settings = (target, row_weight, divisor, loss, options, backend, reduced, with_terms, with_gradient)
    if torch.compiler.is_compiling():
        rows, terms, _ = torch.ops.fastkd.row_loss(student_logits, teacher_logits, *settings)
    else:
        rows, terms, _ = _RowLoss.apply(*settings, *student_logits, *teacher_logits)
    return rows, terms


def _allocate(
    students: Sequence[Tensor], loss: str, with_terms: bool, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows, classes = students[0].shape
    rows = rows * len(students)
    return (
        students[0].new_empty(rows, dtype=torch.float32),
        students[0].new_empty((TERMS.get(loss, 0) if with_terms else 0, rows), dtype=torch.float32),
        students[0].new_empty((rows, classes) if with_gradient else (0, classes)),
    )


def _reduce(rows: Tensor, terms: Tensor, pairs: int, with_terms: bool) -> tuple[Tensor, Tensor]:
    """Sums over the rows of each pair."""
    if pairs == 1:  # without a view, which costs as much as the sum
        return rows.sum(), terms.sum(-1) if with_terms else terms
    rows = rows.view(pairs, rows.shape[0] // pairs)
    return rows.sum(-1), terms.view(terms.shape[0], *rows.shape).sum(-1) if with_terms else terms


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
) -> tuple[Tensor, Tensor, Tensor]:
    rows, terms, gradient = _allocate(students, loss, with_terms, with_gradient)
    students, teachers = _dense_rows(students), _dense_rows(teachers)
    if rows.shape[0]:
        _launcher(backend).row_loss(
            students, teachers, target, row_weight, 1.0 / divisor, loss, options, rows, terms, gradient
        )
    if reduced:
        rows, terms = _reduce(rows, terms, len(students), with_terms)
    return rows, terms, gradient


torch.library.impl("fastkd::row_loss", ("cpu", "cuda"), _row_loss, lib=_library)


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
    rows, terms, gradient = _allocate(students, loss, with_terms, with_gradient)
    if reduced:
        of_pairs = (len(students),) if len(students) > 1 else ()
        rows = rows.new_empty(of_pairs)
        terms = terms.new_empty(terms.shape[0], *of_pairs) if with_terms else terms
    return rows, terms, gradient


def _keep_gradient(ctx: Any, pairs: int, backend: str, output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, terms, gradient = output
    ctx.mark_non_differentiable(terms, gradient)
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
    factors = upstream
    if upstream.numel() != gradient.shape[0]:  # one number a pair
        factors = upstream.expand(of_pair) if ctx.pairs == 1 else upstream.repeat_interleave(of_pair)
    # In place where the saved gradient is ours alone. Whoever keeps the graph may come again, and a compiler
    # fuses a plain product with what follows.
    if traced or torch._C._autograd._get_current_graph_task_keep_graph():
        gradient = (gradient * factors.unsqueeze(-1)).to(gradient.dtype)
    # A number on the CPU is read without waiting for anything; on a GPU the kernel decides.
    elif of_pair and not (upstream.dim() == 0 and upstream.device.type == "cpu" and float(upstream) == 1.0):
        _launcher(ctx.backend).scale_rows_(gradient, factors)
    return [gradient] if ctx.pairs == 1 else gradient.split(of_pair)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _keep_gradient(ctx, len(inputs[0]), inputs[7], output)


def _backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Any, ...]:
    return list(_gradients(ctx, upstream)), [None] * ctx.pairs, *(None,) * 9


torch.library.register_autograd("fastkd::row_loss", _backward, setup_context=_setup_context, lib=_library)


class _RowLoss(torch.autograd.Function):
    """The operator without the dispatcher, which outside of a compiler costs more than a small loss."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        settings, logits = inputs[:9], inputs[9:]
        pairs = len(logits) // 2
        output = _row_loss(logits[:pairs], logits[pairs:], *settings)
        _keep_gradient(ctx, pairs, settings[5], output)
        return output

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Any, ...]:
        return *(None,) * 9, *_gradients(ctx, upstream), *(None,) * ctx.pairs
