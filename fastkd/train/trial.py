"""A training step that leaves no trace: whether a network takes batches of some size is seen early."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.distill.method import Method, total_of
from fastkd.messages import kind_and_text

from . import distributed
from .batches import Batch, micro_batches
from .precision import autocast
from .random_state import get_random_state, set_random_state


@contextlib.contextmanager
def unchanged(*networks: nn.Module | None) -> Iterator[None]:
    """Inside, buffers, modes and random generators may change; afterwards they are as before, to the bit."""
    modules = [module for network in networks if network is not None for module in network.modules()]
    modes = [module.training for module in modules]
    buffers = [
        (module, name, buffer, None if _lazy(buffer) else buffer.clone())
        for module in modules
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    randoms = get_random_state()
    try:
        yield
    finally:
        set_random_state(randoms)
        with torch.no_grad():
            for module, name, buffer, before in buffers:
                module._buffers[name] = buffer
                if before is not None:
                    buffer.copy_(before)
        for module, training in zip(modules, modes, strict=True):
            module.training = training


def try_step(method: Method, batch: Batch, precision: str, accumulate: int = 1) -> None:
    """A step in train mode, forward and backward, without effect. Raises whatever the step raises."""
    images = batch[0]
    with unchanged(method, method.teacher):
        method.train()
        for part, _ in micro_batches(batch, accumulate):
            with autocast(images.device, precision):
                loss = total_of(method(part))
            wanted = [p for p in method.parameters() if p.requires_grad and not _lazy(p)]
            # Not backward(): .grad, and DDP's hooks on it, are for real steps.
            if loss.requires_grad and wanted:
                torch.autograd.grad(loss, wanted, allow_unused=True)


class Sizes:
    """Which batches the step takes. A size smaller than those before is tried on rows of the first one.

    So a fault of its own data still ends the run, while a size that the network cannot take (batch
    normalisation of one row) is left out.
    """

    def __init__(self, method: Method, precision: str, accumulate: int, note: Callable[[str], None]) -> None:
        self._try = lambda batch: try_step(method, batch, precision, accumulate)
        self._note = note
        self._smallest: int | None = None
        self._refused: set[int] = set()
        self._rows: Batch | None = None

    def take(self, batch: Batch, *, resumed: bool = False) -> bool:
        """Whether to train on ``batch``. ``resumed``: nothing is known of the batches before it."""
        rows = len(batch[0])
        new = (self._smallest is None and resumed) or (self._smallest is not None and rows < self._smallest)
        if new and rows not in self._refused:
            probe = batch if self._rows is None else tuple(repeated(part, rows) for part in self._rows)
            reason = self._reason(probe)
            if any(distributed.any_over_ranks(reason is not None)):
                self._refused.add(rows)
                self._note(left_out(rows, reason or "another rank cannot take it"))
        if rows in self._refused:
            return False
        self._smallest = rows if self._smallest is None else min(rows, self._smallest)
        if self._rows is None:  # two, which take no memory worth the name
            self._rows = tuple(part[:2].clone() for part in batch)
        return True

    def _reason(self, batch: Batch) -> str | None:
        try:
            self._try(batch)
        except Exception as error:  # of any layer
            return kind_and_text(error)
        return None


def left_out(rows: int, reason: str) -> str:
    """What is said of a last batch that cannot be trained on."""
    images = "1 image" if rows == 1 else f"{rows} images"
    return f"a batch of {images} cannot be trained on and is left out in each epoch: {reason}"


def _lazy(value: Any) -> bool:
    return torch.nn.parameter.is_lazy(value)


def repeated(part: Tensor, rows: int) -> Tensor:
    """``rows`` rows: those of ``part`` again and again."""
    return part[torch.arange(rows, device=part.device) % len(part)]
