"""The named scalar terms of a batch: what they are, their sum, and those of one fused loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Terms = dict[str, Tensor]
TOTAL = "loss"  # name of a term that is the whole loss; other terms beside it are only logged


class TermError(ValueError):
    """``terms`` returned something other than a dict of scalars."""


def total_of(terms: Terms) -> Tensor:
    """The sum of the terms that require grad; of all if none does. Raises ``TermError``.

    Beside a term "loss" the others are only logged, so they must be detached.
    """
    if not isinstance(terms, dict):
        raise TermError(f"terms returned a {type(terms).__name__}; expected a dict of named scalars")
    if not terms:
        raise TermError("terms is empty; expected at least one named scalar")
    for name, value in terms.items():
        if not isinstance(value, Tensor) or value.ndim != 0:
            raise TermError(
                f"the term {name!r} is {getattr(value, 'shape', value)!r}; expected a scalar tensor"
            )
    trained = [value for value in terms.values() if value.requires_grad]
    first, *rest = trained or ([terms[TOTAL]] if TOTAL in terms else list(terms.values()))
    return sum(rest, first)


def with_features(terms: Terms, features: Terms) -> Terms:
    """Both together. Beside a term "loss", those of features become part of it, and are only logged."""
    if TOTAL not in terms or not features:
        return {**terms, **features}
    logged = {name: value.detach() for name, value in features.items()}
    return {**terms, **logged, TOTAL: sum(features.values(), terms[TOTAL])}


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
            if torch.compiler.is_compiling():
                continue  # values are not known yet
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
