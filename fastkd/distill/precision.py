"""The dtype of what a method adds to a model."""

from __future__ import annotations

import torch
from torch import nn


def dtype_of_parts(model: nn.Module) -> torch.dtype:
    """The dtype of heads and projections for ``model``: float64 if it is in float64, else float32."""
    floating = (p.dtype for p in model.parameters() if p.is_floating_point())
    return torch.promote_types(next(floating, torch.float32), torch.float32)
