"""What all launches of the Triton kernels have in common: compile options, the device, strides."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fastkd.ops.plan import Plan


def compile_options(plan: Plan) -> dict[str, Any]:
    # A fused multiply-add would leave a rounding error where two equal products must cancel to 0. Triton's
    # default differs between versions.
    options = {"num_warps": plan.warps, "enable_fp_fusion": False}
    if plan.registers is not None and torch.version.hip is None:
        options["maxnreg"] = plan.registers
    return options


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def row_strides(logits: Tensor) -> tuple[int, int]:
    """Strides of the leading dimensions of [M, K, C]; [N, C] counts as [N, 1, C]."""
    return (logits.stride(0), 0 if logits.dim() == 2 else logits.stride(1))


def common_vector(*numbers: int) -> int:
    """8 if it divides all numbers, else 1: enables 16-byte loads and stores.

    A single compile-time constant: Triton's own specialisation distinguishes 1 and multiples of 16 for each
    number, and would recompile for other strides.
    """
    return 8 if all(number % 8 == 0 for number in numbers) else 1
