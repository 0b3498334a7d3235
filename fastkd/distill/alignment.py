"""Gradient alignment of DHKD: removes the conflict of the KD gradient with the cross-entropy's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler

from fastkd.reference import at_least_float32


class GradientAlignment:
    """Adds max(0, -<g1, g0> / |g0|^2) g0 to the gradient g0 + g1 of two losses (Yang et al. 2024).

    g0 is the gradient of the ``first`` loss, g1 that of the rest. On conflict, the component of g1 along g0
    is removed. ``.grad`` has g0 + g1 as after any backward pass; g0 is computed separately, by one more
    backward pass through the student. The order is ``add``, backward, ``check``, ``apply``: so torch
    accumulates, unscales and reduces ``.grad`` as usual; ``add`` accumulates and unscales g0, and ``apply``
    averages it over the ranks.

    Args:
        scope: "all", as released: one vector over all parameters that the first loss reaches. It includes the
            main classifier, whose share of |g0|^2 makes the correction of the backbone too small. "shared":
            over the parameters that both losses reach.
    """

    def __init__(self, scope: str = "all") -> None:
        if scope not in ("all", "shared"):
            raise ValueError(f"scope is {scope!r}; expected 'all' or 'shared'")
        self.scope = scope
        self._parameters: list[nn.Parameter] = []
        self._reached: list[nn.Parameter] = []  # by the first loss, in the last micro-batch
        self._first: list[Tensor] | None = None  # g0 so far in this step

    def add(self, first: Tensor, rest: Sequence[Tensor], scaler: GradScaler | None = None) -> None:
        """Accumulate g0, before the backward pass of the sum. ``first`` and the stored g0 are unscaled."""
        if self._first is None:  # each step anew: a layer may have been frozen, unfrozen or replaced
            reached = parameters_of([first])
            wanted = set(parameters_of(rest)) if self.scope == "shared" else set(reached)
            self._parameters = [parameter for parameter in reached if parameter in wanted]
        if not self._parameters:
            return
        loss = first if scaler is None else scaler.scale(first)
        found = torch.autograd.grad(loss, self._parameters, retain_graph=True, allow_unused=True)
        pairs = list(zip(self._parameters, found, strict=True))
        self._reached = [parameter for parameter, gradient in pairs if gradient is not None]
        gradients = [torch.zeros_like(p) if gradient is None else gradient for p, gradient in pairs]
        if scaler is not None:
            # Scaling 1 gives the scale without a synchronisation.
            scale = scaler.scale(torch.ones_like(first))
            gradients = [gradient / scale.to(gradient.dtype) for gradient in gradients]
        if self._first is None:
            self._first = gradients
        else:
            self._first = [total + gradient for total, gradient in zip(self._first, gradients, strict=True)]

    def check(self) -> None:
        """Raise ``RuntimeError`` if the backward pass has left no ``.grad`` to correct."""
        for parameter in self._reached:
            if parameter.grad is None:
                raise RuntimeError(
                    f"a parameter of shape {list(parameter.shape)} has no .grad to align: it is sharded "
                    "(FSDP), or an optimizer has stepped in the backward pass; use DDP, or align='none'"
                )

    @torch.no_grad()
    def apply(self) -> None:
        """Correct ``.grad``, which must be reduced over ranks and unscaled, and reset g0."""
        if self._first is None:
            return
        first = torch.cat([at_least_float32(gradient.flatten()) for gradient in self._first])
        self._first = None
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(first)
            first /= dist.get_world_size()
        # It can overflow in float16 where the sum of both does not, which is all that a GradScaler looks at.
        first = torch.where(first.isfinite().all(), first, 0.0)
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self._parameters]
        both = torch.cat([at_least_float32(gradient.flatten()) for gradient in gradients])
        square = first.dot(first)
        # -<g1, g0> / |g0|^2 with g1 = both - first; no correction where g0 = 0.
        correction = torch.where(square > 0, 1 - both.dot(first) / square, 0.0).clamp_min(0)
        for gradient, part in zip(
            gradients, (correction * first).split([g.numel() for g in gradients]), strict=True
        ):
            gradient += part.view_as(gradient)


def parameters_of(losses: Iterable[Tensor]) -> list[nn.Parameter]:
    """The parameters that a backward pass from the losses would give a gradient."""
    found: dict[nn.Parameter, None] = {}
    nodes = [loss.grad_fn for loss in losses if loss.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found[leaf] = None
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)
    return list(found)
