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
    "row_loss(Tensor student_logits, Tensor teacher_logits, Tensor? target, Tensor? row_weight, "
    "SymInt divisor, str loss, float[] options, str backend, bool reduced, bool with_terms, "
    "bool with_gradient) "
    "-> (Tensor rows, Tensor terms, Tensor gradient)"
)


def row_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
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
    """Row losses [N] and their terms [K, N] in float32, times ``row_weight`` [N] and divided by ``divisor``;
    ``reduced``, their sums over the rows.

    ``target`` [N] names the label of each row, where the loss uses one; a label out of range gives a NaN
    row. A row of weight 0 is not read. ``options`` are those of the loss in ``fastkd.reference``.
    """
    with_gradient = torch.is_grad_enabled() and student_logits.requires_grad
    run = torch.ops.fastkd.row_loss if torch.compiler.is_compiling() else _RowLoss.apply
    rows, terms, _ = run(
        student_logits,
        teacher_logits,
        target,
        row_weight,
        divisor,
        loss,
        options,
        backend,
        reduced,
        with_terms,
        with_gradient,
    )
    return rows, terms


def _allocate(
    student: Tensor, loss: str, with_terms: bool, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows, classes = student.shape
    return (
        student.new_empty(rows, dtype=torch.float32),
        student.new_empty((TERMS.get(loss, 0) if with_terms else 0, rows), dtype=torch.float32),
        student.new_empty((rows, classes) if with_gradient else (0, classes)),
    )


def _launcher(backend: str) -> Any:
    if backend == "native":
        from fastkd.ops import native

        return native
    from fastkd.ops.triton import launch

    return launch


def _row_loss(
    student: Tensor,
    teacher: Tensor,
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
    rows, terms, gradient = _allocate(student, loss, with_terms, with_gradient)
    # Kernels take any row stride; only a row that is not dense is copied.
    student, teacher = (
        logits if logits.stride(1) == 1 else logits.contiguous() for logits in (student, teacher)
    )
    if student.shape[0]:
        _launcher(backend).row_loss(
            student, teacher, target, row_weight, 1.0 / divisor, loss, options, rows, terms, gradient
        )
    if reduced:
        return rows.sum(), terms.sum(-1) if with_terms else terms, gradient
    return rows, terms, gradient


torch.library.impl("fastkd::row_loss", ("cpu", "cuda"), _row_loss, lib=_library)


@torch.library.register_fake("fastkd::row_loss", lib=_library)
def _row_loss_shapes(
    student: Tensor,
    teacher: Tensor,
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
    rows, terms, gradient = _allocate(student, loss, with_terms, with_gradient)
    if reduced:
        return rows.new_empty(()), terms.new_empty(terms.shape[0]) if with_terms else terms, gradient
    return rows, terms, gradient


def _keep_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, terms, gradient = output
    ctx.mark_non_differentiable(terms, gradient)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(gradient)
    ctx.backend = inputs[7]


def _backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    (gradient,) = ctx.saved_tensors
    nothing = (None,) * 10
    if upstream is None:
        return None, *nothing
    traced = torch.compiler.is_compiling() or type(gradient) is not Tensor
    if torch.is_grad_enabled() and not traced:
        raise RuntimeError(
            "fastkd computes the gradient with the loss and does not differentiate it again "
            "(create_graph=True); use fastkd.set_backend('eager') for second derivatives"
        )
    # In place where the saved gradient is ours alone. Whoever keeps the graph may come again, and a compiler
    # fuses a plain product with what follows.
    if traced or torch._C._autograd._get_current_graph_task_keep_graph():
        return (gradient * upstream.unsqueeze(-1)).to(gradient.dtype), *nothing
    # A number on the CPU is read without waiting for anything; on a GPU the kernel decides.
    unscaled = upstream.dim() == 0 and upstream.device.type == "cpu" and float(upstream) == 1.0
    if gradient.shape[0] and not unscaled:
        _launcher(ctx.backend).scale_rows_(gradient, upstream.expand(gradient.shape[0]))
    return gradient, *nothing


torch.library.register_autograd("fastkd::row_loss", _backward, setup_context=_keep_gradient, lib=_library)


class _RowLoss(torch.autograd.Function):
    """The operator without the dispatcher, which outside of a compiler costs more than a small loss."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        output = _row_loss(*inputs)
        _keep_gradient(ctx, inputs, output)
        return output

    backward = staticmethod(_backward)
