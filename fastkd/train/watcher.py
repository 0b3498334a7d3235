"""Watchers: objects that ``fit`` reports to while it runs."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

from fastkd.errors import NonFiniteLossError

from .batches import Batch
from .meters import LossMeter

Record = dict[str, Any]


class Watcher:
    """Receives the progress of ``fit``; subclasses override the methods that they need.

    Each rank has its own watcher; only the first rank's should write files and print.
    """

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *exception: object) -> None: ...

    def note(self, text: str) -> None: ...

    def epoch_started(self, epoch: int, epochs: int, batches: int | None) -> None: ...

    def batch_done(self, meter: LossMeter) -> None: ...

    def epoch_done(self, record: Record, state: Callable[[], dict[str, Any]]) -> None:
        """``state()`` returns the state with which ``fit(resume=…)`` continues after this epoch.

        Its tensors are those in training: write them, or copy them with ``copy.deepcopy``, before returning.
        """

    def checkpoint(self, epoch: int, step: int, state: Callable[[], dict[str, Any]]) -> None:
        """In the middle of an epoch, after ``step`` of it; ``state()`` as in ``epoch_done``."""

    def not_finite(self, error: NonFiniteLossError, batch: Batch | None) -> None:
        """Training stops because the loss of a batch, that of all ranks, was not finite."""


class ForwardingWatcher(Watcher):
    """Passes everything on to ``shown``; subclasses add to some of it."""

    def __init__(self, shown: Watcher) -> None:
        self._shown: Watcher | None = shown

    def _pass_on(self, name: str, *arguments: Any) -> None:
        getattr(self._shown, name)(*arguments)

    def __enter__(self) -> Watcher:
        self._pass_on("__enter__")
        return self

    def __exit__(self, *exception: object) -> None:
        self._pass_on("__exit__", *exception)

    def note(self, text: str) -> None:
        self._pass_on("note", text)

    def epoch_started(self, epoch: int, epochs: int, batches: int | None) -> None:
        self._pass_on("epoch_started", epoch, epochs, batches)

    def batch_done(self, meter: LossMeter) -> None:
        self._pass_on("batch_done", meter)

    def epoch_done(self, record: Record, state: Callable[[], dict[str, Any]]) -> None:
        self._pass_on("epoch_done", record, state)

    def checkpoint(self, epoch: int, step: int, state: Callable[[], dict[str, Any]]) -> None:
        self._pass_on("checkpoint", epoch, step, state)

    def not_finite(self, error: NonFiniteLossError, batch: Batch | None) -> None:
        self._pass_on("not_finite", error, batch)


class Shielded(ForwardingWatcher):
    """Passes everything on until ``shown`` fails; a failing display must not end a run.

    The failure (a closed terminal, an unsupported encoding, a full disk) is warned of once, and ``shown`` is
    dropped.
    """

    def _pass_on(self, name: str, *arguments: Any) -> None:
        if self._shown is None:
            return
        try:
            super()._pass_on(name, *arguments)
        except (Exception, SystemExit) as error:  # rich raises SystemExit when its reader has gone
            shown, self._shown = self._shown, None
            with contextlib.suppress(Exception, SystemExit):  # stops the thread of a progress bar
                shown.__exit__(None, None, None)
            text = f"training continues without progress display: {type(error).__name__}: {error}"
            warnings.warn(text, stacklevel=2)
