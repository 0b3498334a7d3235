"""Curves for TensorBoard, if it is installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import RecipeError
from .forwarding import ForwardingWatcher
from .loop import Record, Watcher


def require_tensorboard() -> Any:
    """TensorBoard's writer. Raises ``RecipeError`` where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise RecipeError(
            "train.tensorboard needs TensorBoard: pip install 'fastkd[tensorboard]', or leave it out"
        ) from None
    return SummaryWriter


class TensorBoard(ForwardingWatcher):
    """Writes the scalars of every epoch to ``folder`` and passes everything on to ``shown``."""

    def __init__(self, folder: Path, shown: Watcher) -> None:
        super().__init__(shown)
        self._writer = require_tensorboard()(str(folder))

    def __exit__(self, *exception: object) -> None:
        self._writer.close()
        super().__exit__(*exception)

    def epoch_done(self, record: Record, state: Callable[[], dict[str, Any]]) -> None:
        for group, values in (("", record), ("terms/", record["terms"]), ("seconds/", record["seconds"])):
            for name, value in values.items():
                if isinstance(value, int | float) and name != "epoch":
                    self._writer.add_scalar(group + name, value, record["epoch"])
        super().epoch_done(record, state)
