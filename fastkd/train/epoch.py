"""One epoch as it is trained: what it measures, and the position in it that a checkpoint keeps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from . import distributed
from .batches import Batch, Batches
from .meters import LossMeter, Stopwatch
from .random_state import get_random_state, set_random_state
from .state import of_this_rank
from .watcher import Record


class Epoch:
    """The epoch after ``trained`` epochs, from its first batch or from the ``position`` of a stopped one."""

    def __init__(
        self,
        trained: int,
        device: torch.device,
        log_every: int | None,
        position: dict[str, Any] | None,
        generators: list[torch.Generator],
    ) -> None:
        self.number = trained + 1
        self.meter = LossMeter(device, self.number, log_every)
        self.watch = Stopwatch(device, position["seconds"] if position else None)
        self._start = position
        self._generators = generators
        self._random_at_start = get_random_state(generators)

    @property
    def resumed(self) -> bool:
        """Whether some of its batches were trained on before the run was stopped."""
        return self._start is not None

    def batches(self, train: Batches) -> Iterator[Batch | None]:
        """The batches that are left; None for those that are left out."""
        if self._start is None:
            return train.start()
        # A loader that draws its order from the global generator, or its own, must draw the same order again.
        now = self._random_at_start
        self._random_at_start = of_this_rank(self._start["random"], self._generators)
        set_random_state(self._random_at_start, self._generators)
        batches = train.start(self._start["meter"]["steps"])
        self.meter.load_state(self._start["meter"])
        set_random_state(now, self._generators)
        return batches

    def whole(self, train: Batches, step: int) -> Batch | None:
        """The batch of all ranks of a step of this epoch, from 1, loaded again; None if it cannot be."""
        set_random_state(self._random_at_start, self._generators)  # as in ``batches``
        return train.whole(step - 1)

    def position(self) -> dict[str, Any]:
        """Where a resumed run continues; called on every rank."""
        measured = {"meter": self.meter.state(), "seconds": self.watch.seconds()}
        return {**measured, "random": distributed.of_all_ranks(self._random_at_start)}

    def record(self, validated: dict[str, Any], lr: float) -> Record:
        """The epoch's entry in the history."""
        meter = self.meter
        return {
            "epoch": self.number,
            "loss": meter.loss,
            "terms": meter.terms,
            "train_accuracy": meter.accuracy,
            "rows": meter.rows,
            "skipped": meter.skipped,
            **validated,
            "lr": lr,
            "seconds": self.watch.seconds(),
        }
