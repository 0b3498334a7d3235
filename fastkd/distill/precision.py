"""The dtype of what a method adds to a model, and of what it gets from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from fastkd.reference import at_least_float32


def dtype_of_parts(model: nn.Module) -> torch.dtype:
    """The dtype of heads and projections for ``model``: float64 if it is in float64, else float32."""
    floating = (p.dtype for p in model.parameters() if p.is_floating_point())
    return torch.promote_types(next(floating, torch.float32), torch.float32)


def in_dtype_of_parts(features: Mapping[str, Tensor], parts: Iterable[nn.Module]) -> dict[str, Tensor]:
    """Features for heads and projections, which take float32 where no autocast converts what they get.

    If their user has moved them to half precision, they take that.
    """
    dtype = next((p.dtype for part in parts for p in part.parameters()), torch.float32)
    half = dtype in (torch.bfloat16, torch.float16)
    converted = {}
    for path, value in features.items():
        if not torch.is_autocast_enabled(value.device.type):
            value = value.to(dtype) if half else at_least_float32(value)
        converted[path] = value
    return converted
