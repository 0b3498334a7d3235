"""Values in float32 at least: half precision is raised, float64 stays float64."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def at_least_float32(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def dtype_of_parts(model: nn.Module) -> torch.dtype:
    """The dtype of heads and projections for ``model``: float64 if it is in float64, else float32."""
    floating = (p.dtype for p in model.parameters() if p.is_floating_point())
    return torch.promote_types(next(floating, torch.float32), torch.float32)
