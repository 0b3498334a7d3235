"""What all launches of the Triton kernels have in common: the call, compile options, the device, strides."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import JITFunction, driver

from fastkd.ops.plan import Plan

# Releases whose specialisation is known: ``key_of`` has all of it (tools/jit_launches.py compares). Not on
# AMD GPUs, where it includes the size of a tensor.
_KNOWN = torch.version.hip is None and triton.__version__.startswith(("3.6.", "3.8.", "3.9."))
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def launch(
    kernel: Any, grid: tuple[int, int, int], arguments: tuple[Any, ...], named: dict[str, Any]
) -> None:
    """``kernel[grid](*arguments, **named)``; ``named`` are constants and compile options.

    A compiled kernel is launched without the JIT, whose binder, and check that no constant of a module has
    changed, take most of a launch's time.
    """
    if not _KNOWN or not isinstance(kernel, JITFunction):
        kernel[grid](*arguments, **named)
        return
    key = key_of(kernel, arguments, named)
    found = _compiled.get(key)
    if found is not None:
        compiled, constants = found
        compiled[grid](*arguments, *constants)
        return
    compiled = kernel[grid](*arguments, **named)
    if compiled is not None:
        _compiled[key] = compiled, tuple(named[name] for name in kernel.arg_names[len(arguments) :])


def key_of(kernel: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
    """All on which the compiled kernel depends: other calls with the same key may use it."""
    device = driver.active.get_current_device()
    return (kernel.fn, device, *_kinds(arguments), *named, *named.values())


def _kinds(arguments: Iterable[Any]) -> list[Any]:
    """Pointers by dtype and alignment, whole numbers by width: no kernel is specialised on their values."""
    kinds: list[Any] = []
    for argument in arguments:
        kind = type(argument)
        if kind is int:
            kinds.append(-(2**31) <= argument < 2**31)
        elif kind is float:
            kinds.append(float)
        elif kind is tuple:
            kinds.append(tuple(_kinds(argument)))
        else:
            kinds.append(argument.dtype)
            kinds.append(argument.data_ptr() % 16 == 0)
    return kinds


def compile_options(plan: Plan) -> dict[str, Any]:
    # A fused multiply-add would leave a rounding error where two equal products must cancel to 0. Triton's
    # default differs between versions.
    options = {"num_warps": plan.warps, "enable_fp_fusion": False}
    if plan.registers is not None and torch.version.hip is None:
        options["maxnreg"] = plan.registers
    return options


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def row_strides(logits: Tensor) -> tuple[int, int]:
    """Strides of the leading dimensions of [M, K, C]; [N, C] counts as [N, 1, C]."""
    return (logits.stride(0), 0 if logits.dim() == 2 else logits.stride(1))


def common_vector(tensors: Iterable[Tensor], *numbers: int) -> int:
    """8 if it divides all numbers and the tensors are aligned, else 1: enables 16-byte loads and stores.

    A single compile-time constant: Triton's own specialisation distinguishes 1 and multiples of 16 for each
    number, and would recompile for other strides.
    """
    divides = all(number % 8 == 0 for number in numbers)
    return 8 if divides and all(tensor.data_ptr() % 16 == 0 for tensor in tensors) else 1
