"""Number formats of networks: autocast, float16's loss scaling; and compilation."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.amp import GradScaler

from fastkd.distill.method import Method
from fastkd.errors import TrainError
from fastkd.messages import first_line, one_line

from .preflight import check_channels_last

DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_of(precision: str) -> torch.dtype | None:
    """The dtype for autocast; None for float32, which uses none. Raises ``ValueError``."""
    if precision not in DTYPES:
        raise ValueError(f"precision must be one of {', '.join(map(repr, DTYPES))}, got {precision!r}")
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
        method.teacher_dtype = dtype_of(teacher_precision) or torch.float32


def make_scaler(device: torch.device, precision: str, optimizer: torch.optim.Optimizer) -> GradScaler | None:
    """The loss scaler for float16, whose small gradients underflow otherwise; None for other formats.

    Steps that it leaves out do not reach a ``torch.optim.SGD`` from then on, fused or not.
    """
    if precision != "float16":
        return None
    if isinstance(optimizer, torch.optim.SGD):
        # Fused, it leaves a step with infinite gradients out itself. If that is the first, as often, the
        # next takes momentum from memory that was never written (torch 2.11, 2.14). Now the scaler does it.
        optimizer._step_supports_amp_scaling = False
    return GradScaler(device.type)


def check_compiler(device: torch.device) -> None:
    """Raise ``TrainError`` if ``torch.compile`` cannot compile here, for example without a C++ compiler."""
    now = time.time()  # a number that no code was compiled with before
    try:
        torch.compile(lambda x: x * now)(torch.ones(2, device=device))
    except Exception as error:  # torch's, a compiler's or Triton's
        raise TrainError(
            f"train.compile: torch.compile does not work on this machine's {device.type}: {first_line(error)}"
        ) from None


@contextlib.contextmanager
def compiled_networks(method: Method, backend: str | None) -> Iterator[list[str]]:
    """Student and teacher are compiled in place within the block, which gets notes on those that stay eager.

    Only ``forward`` is compiled, so that state dicts, hooks on the network and the exported student do not
    change. Methods read inner layers by hooks that exist for one pass, which would recompile at each step.
    The network's own ``forward`` is put back afterwards: a copy of the network would compute with the
    weights of the original, and ``torch.save`` of it fails. ``backend`` None: nothing is compiled.
    Raises ``ValueError`` for a backend that torch does not know.
    """
    notes = []
    with contextlib.ExitStack() as undo:
        for role, network, taps in (
            ("student", method.student, method.student_taps),
            ("teacher", method.teacher, method.teacher_taps),
        ):
            if network is None or backend is None:
                continue
            if taps.paths:
                notes.append(
                    f"train.compile: the {role} stays eager, {method.name} reads {', '.join(taps.paths)}"
                )
            elif not hasattr(network.forward, "get_compiler_config"):
                own = vars(network).get("forward")
                network.forward = _compiled(network.forward, backend)
                undo.callback(_put_back, network, own)
        yield notes


def _compiled(forward: Any, backend: str) -> Any:
    try:
        return torch.compile(forward, backend=backend)
    except Exception as error:
        raise ValueError(f"compile is {backend!r}: {one_line(error)}") from None


def _put_back(network: nn.Module, forward: Any) -> None:
    """``forward``: what the owner had set on the instance; None: the class's."""
    del network.forward
    if forward is not None:
        network.forward = forward
