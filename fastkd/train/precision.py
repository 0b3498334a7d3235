"""Number formats of networks: autocast, float16's loss scaling; and compilation."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.amp import GradScaler

from fastkd.distill.method import Method

from .preflight import check_channels_last

DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_of(precision: str, name: str = "precision") -> torch.dtype | None:
    """The dtype for autocast; None for float32, which uses none. Raises ``ValueError``."""
    if precision not in DTYPES:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, DTYPES))}, got {precision!r}")
    return DTYPES[precision]


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    dtype = dtype_of(precision)
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


@dataclass(frozen=True)
class Numerics:
    """Where networks are computed, in which number format and in which memory format."""

    device: torch.device
    precision: str = "float32"
    channels_last: bool = False

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return autocast(self.device, self.precision)


def place(method: Method, numerics: Numerics, teacher_precision: str | None) -> None:
    """Move the method's networks to their device and formats; ``teacher_precision`` None: as the student."""
    method.to(numerics.device)
    if numerics.channels_last:
        check_channels_last(method)
        method.to(memory_format=torch.channels_last)
    if teacher_precision is not None:
        method.teacher_dtype = dtype_of(teacher_precision, "teacher_precision") or torch.float32


def make_scaler(device: torch.device, precision: str) -> GradScaler | None:
    """The loss scaler for float16, whose small gradients underflow otherwise."""
    return GradScaler(device.type) if precision == "float16" else None


def compile_networks(method: Method, backend: str) -> list[str]:
    """Compile student and teacher in place; returns notes on those that stay eager.

    Only ``forward`` is compiled, so that state dicts, hooks on the network and the exported student do not
    change. Methods read inner layers by hooks that exist for one pass, which would recompile at each step.
    """
    notes = []
    for role, network, taps in (
        ("student", method.student, method.student_taps),
        ("teacher", method.teacher, method.teacher_taps),
    ):
        if network is None:
            continue
        if taps.paths:
            notes.append(
                f"train.compile: the {role} stays eager, {method.name} reads {', '.join(taps.paths)}"
            )
        elif not hasattr(network.forward, "get_compiler_config"):
            _compile(network, backend)
    return notes


def _compile(network: nn.Module, backend: str) -> None:
    network.forward = torch.compile(network.forward, backend=backend)
