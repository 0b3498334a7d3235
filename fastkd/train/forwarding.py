"""A watcher before another one: what it sees, it passes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .batches import Batch
from .errors import NonFiniteLossError
from .loop import Record, Watcher
from .meters import LossMeter


class ForwardingWatcher(Watcher):
    """Passes everything on to ``shown``; a subclass does its own part in some of it."""

    def __init__(self, shown: Watcher) -> None:
        self._shown = shown

    def __enter__(self) -> Watcher:
        self._shown.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._shown.__exit__(*exception)

    def note(self, text: str) -> None:
        self._shown.note(text)

    def epoch_started(self, epoch: int, epochs: int, batches: int | None) -> None:
        self._shown.epoch_started(epoch, epochs, batches)

    def batch_done(self, meter: LossMeter) -> None:
        self._shown.batch_done(meter)

    def epoch_done(self, record: Record, state: Callable[[], dict[str, Any]]) -> None:
        self._shown.epoch_done(record, state)

    def checkpoint(self, epoch: int, step: int, state: Callable[[], dict[str, Any]]) -> None:
        self._shown.checkpoint(epoch, step, state)

    def not_finite(self, error: NonFiniteLossError, batch: Batch | None) -> None:
        self._shown.not_finite(error, batch)
