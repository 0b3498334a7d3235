"""Trial steps without side effects, which show early whether a network accepts a batch size."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastkd.distill.method import Method
from fastkd.distill.terms import total_of
from fastkd.errors import TrainError
from fastkd.messages import kind_and_text

from . import distributed
from .batches import Batch, micro_batches
from .precision import autocast
from .random_state import get_random_state, set_random_state


class Snapshot:
    """Buffers and extra states of networks as they are now, to be put back bit by bit."""

    def __init__(self, *networks: nn.Module | None) -> None:
        modules = [module for network in networks if network is not None for module in network.modules()]
        self._buffers = [
            (module, name, buffer, None if is_lazy(buffer) else buffer.clone())
            for module in modules
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self._extras = [
            (module, copy.deepcopy(module.get_extra_state()))
            for module in modules
            if type(module).get_extra_state is not nn.Module.get_extra_state
            and type(module).set_extra_state is not nn.Module.set_extra_state
        ]

    @torch.no_grad()
    def restore(self) -> None:
        for module, name, buffer, before in self._buffers:
            module._buffers[name] = buffer
            if before is not None:
                buffer.copy_(before)
        for module, extra in self._extras:
            module.set_extra_state(extra)


@contextlib.contextmanager
def unchanged(*networks: nn.Module | None) -> Iterator[None]:
    """Restore buffers, extra states, modes and random generators bit by bit after the block."""
    modules = [module for network in networks if network is not None for module in network.modules()]
    modes = [module.training for module in modules]
    before, randoms = Snapshot(*networks), get_random_state()
    try:
        yield
    finally:
        set_random_state(randoms)
        before.restore()
        for module, training in zip(modules, modes, strict=True):
            module.training = training


def try_step(method: Method, batch: Batch, precision: str, accumulate: int = 1) -> bool:
    """Forward and backward in train mode, without side effects. Raises whatever the step raises.

    Returns whether every trained parameter got a gradient.
    """
    images, complete = batch[0], True
    with unchanged(method, method.teacher):
        method.train()
        for part, _ in micro_batches(batch, accumulate):
            with autocast(images.device, precision):
                loss = total_of(method(part))
            if not loss.requires_grad:
                raise TrainError("the loss does not depend on the parameters that are trained")
            wanted = [p for p in method.parameters() if p.requires_grad and not is_lazy(p)]
            # Not backward(), which would change .grad and run DDP's hooks.
            if wanted:
                gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
                complete = complete and all(gradient is not None for gradient in gradients)
    return complete


def leaves_parameters_out(method: Method, batch: Batch, precision: str, accumulate: int) -> bool:
    """Whether DDP must expect parameters without gradient: of the method, or in a step of any rank."""
    complete = True
    # The step itself raises what the trial does, after the ranks have agreed.
    with contextlib.suppress(Exception):
        complete = try_step(method, batch, precision, accumulate)
    return any(distributed.any_over_ranks(method.leaves_parameters_out() or not complete))


class Sizes:
    """Decides which batches to train on. A size smaller than all before is first tried on repeated rows.

    So a size that the network cannot take (one row with batch normalisation) is left out, while an error
    caused by the batch's data still ends the run.
    """

    def __init__(self, method: Method, precision: str, accumulate: int, note: Callable[[str], None]) -> None:
        self._try = lambda batch: try_step(method, batch, precision, accumulate)
        self._note = note
        self._smallest: int | None = None
        self._refused: set[int] = set()
        self._rows: Batch | None = None

    def take(self, batch: Batch, *, resumed: bool = False) -> bool:
        """Whether to train on ``batch``. ``resumed``: earlier batches of the epoch are unknown."""
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
        if self._rows is None:  # two rows, which take little memory
            self._rows = tuple(part[:2].clone() for part in batch)
        return True

    def _reason(self, batch: Batch) -> str | None:
        try:
            self._try(batch)
        except Exception as error:  # layers can raise anything
            return kind_and_text(error)
        return None


def left_out(rows: int, reason: str) -> str:
    """The note about a last batch that cannot be trained on."""
    images = "1 image" if rows == 1 else f"{rows} images"
    return f"a batch of {images} cannot be trained on and is left out in each epoch: {reason}"


def repeated(part: Tensor, rows: int) -> Tensor:
    """``rows`` rows, repeating those of ``part``."""
    return part[torch.arange(rows, device=part.device) % len(part)]
