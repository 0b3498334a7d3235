"""What the backward passes of the operators have in common: saved tensors, and what they refuse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd.ops.tensors import TRACED, is_traced, is_transformed


def save_inputs(ctx: Any, tensors: Sequence[Tensor | None]) -> None:
    """Save the inputs that ``backward`` recomputes from; see ``saved_inputs``.

    Autograd cannot save inference tensors, which a teacher's may be: they are constants, and kept on ``ctx``.
    """
    ctx.constants = {i: x for i, x in enumerate(tensors) if x is not None and x.is_inference()}
    ctx.save_for_backward(*(None if i in ctx.constants else x for i, x in enumerate(tensors)))


def saved_inputs(ctx: Any, saved: Sequence[Any]) -> list[Any]:
    """``saved`` is ``ctx.saved_tensors``, which hooks such as a checkpoint's allow to be read once."""
    return [ctx.constants.get(i, x) for i, x in enumerate(saved)]


def check_grad_output(grad_output: Tensor, recomputes: bool) -> bool:
    """Whether a compiler or a transform traces this backward. Raises ``RuntimeError`` for what it lacks.

    ``recomputes``: from the inputs, for this one grad_output.
    """
    batched = is_transformed(grad_output)
    traced = batched or is_traced((grad_output,))
    # A compiler traces backward with gradients enabled, whether it will be differentiated or not.
    compiling = torch.compiler.is_compiling() or isinstance(grad_output, TRACED)
    if torch.is_grad_enabled() and not compiling:
        raise RuntimeError(
            "fastkd computes the gradient with the loss and does not differentiate it again "
            "(create_graph=True); use fastkd.set_backend('eager') for second derivatives"
        )
    if recomputes and batched:
        raise RuntimeError(
            "fastkd computes float16 gradients in backward, for one grad_output and not for a batch "
            "(is_grads_batched=True); use fastkd.set_backend('eager')"
        )
    return traced


def must_copy(traced: bool) -> bool:
    """Whether a saved gradient must not be scaled in place.

    A retained graph may use it again, and a compiler can fuse the product.
    """
    return traced or torch._C._autograd._get_current_graph_task_keep_graph()


def is_one(grad_output: Tensor) -> bool:
    """Whether it is known to be 1: reading a CPU scalar needs no synchronisation."""
    return grad_output.dim() == 0 and grad_output.is_cpu and grad_output.item() == 1.0
