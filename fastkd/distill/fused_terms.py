"""Named terms of one fused loss, for methods to return."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _FusedTerms(torch.autograd.Function):
    """Terms of one fused loss, whose common gradient is that of the loss."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(value.clone() for value in values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [gradient for gradient in gradients if gradient is not None]
        if len(given) < len(gradients):
            raise RuntimeError("terms of a fused loss are trained together: take the gradient of their sum")
        first, *rest = given
        for gradient in rest:
            if first.device.type == "cpu" and not torch.equal(first, gradient):
                raise RuntimeError("terms of a fused loss must be weighted by its options, not afterwards")
            if first.device.type == "cuda":  # without waiting for the device
                torch._assert_async(
                    torch.eq(first, gradient), "terms of a fused loss are weighted by its options"
                )
        return first, *(None for _ in gradients)


def fused_terms(loss: Tensor, terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """Attach the gradient of ``loss`` to detached ``terms`` that sum to it.

    A fused loss has one gradient for all terms. Backward raises for a single term, or if terms are weighted
    again.
    """
    return dict(zip(terms, _FusedTerms.apply(loss, *terms.values()), strict=True))
