"""A teacher as ``fit`` holds it while a student learns from it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def frozen(model: nn.Module | None, device: torch.device) -> Iterator[None]:
    """``model`` in eval mode, without gradients, on ``device``; modes and flags are restored afterwards."""
    if model is None:
        yield
        return
    modes = {module: module.training for module in model.modules()}
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.to(device).eval().requires_grad_(False)
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
