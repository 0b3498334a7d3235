"""Curves for TensorBoard, if it is installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .batches import Batch
from .errors import NonFiniteLossError, RecipeError
from .loop import Record, Watcher
from .meters import LossMeter


def require_tensorboard() -> Any:
    """TensorBoard's writer. Raises ``RecipeError`` where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise RecipeError(
            "train.tensorboard needs TensorBoard: pip install 'fastkd[tensorboard]', or leave it out"
        ) from None
    return SummaryWriter


class TensorBoard(Watcher):
    """Writes the scalars of every epoch to ``folder`` and passes everything on to ``shown``."""

    def __init__(self, folder: Path, shown: Watcher) -> None:
        self._shown = shown
        self._writer = require_tensorboard()(str(folder))

    def __enter__(self) -> TensorBoard:
        self._shown.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._writer.close()
        self._shown.__exit__(*exception)

    def note(self, text: str) -> None:
        self._shown.note(text)

    def epoch_started(self, epoch: int, epochs: int, batches: int | None) -> None:
        self._shown.epoch_started(epoch, epochs, batches)

    def batch_done(self, meter: LossMeter) -> None:
        self._shown.batch_done(meter)

    def checkpoint(self, epoch: int, step: int, state: Callable[[], dict[str, Any]]) -> None:
        self._shown.checkpoint(epoch, step, state)

    def not_finite(self, error: NonFiniteLossError, batch: Batch | None) -> None:
        self._shown.not_finite(error, batch)

    def epoch_done(self, record: Record, state: Callable[[], dict[str, Any]]) -> None:
        for group, values in (("", record), ("terms/", record["terms"]), ("seconds/", record["seconds"])):
            for name, value in values.items():
                if isinstance(value, int | float) and name != "epoch":
                    self._writer.add_scalar(group + name, value, record["epoch"])
        self._shown.epoch_done(record, state)
