"""Writing curves for TensorBoard, if it is installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastkd.errors import RecipeError
from fastkd.train.watcher import ForwardingWatcher, Record, Watcher


def require_tensorboard() -> Any:
    """TensorBoard's writer class. Raises ``RecipeError`` if it is not installed."""
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
        self._writer: Any = require_tensorboard()(str(folder))

    def __exit__(self, *exception: object) -> None:
        self._write(lambda writer: writer.close())
        super().__exit__(*exception)

    def epoch_done(self, record: Record, state: Callable[[], dict[str, Any]]) -> None:
        def write(writer: Any) -> None:
            for group, values in (("", record), ("terms/", record["terms"]), ("seconds/", record["seconds"])):
                for name, value in values.items():
                    if isinstance(value, int | float) and name != "epoch":
                        writer.add_scalar(group + name, value, record["epoch"])

        self._write(write)
        super().epoch_done(record, state)

    def _write(self, write: Callable[[Any], None]) -> None:
        if self._writer is None:
            return
        try:
            write(self._writer)
        except Exception as error:  # the writer and its thread must not end a run
            self._writer = None
            self.note(f"TensorBoard is no longer written: {type(error).__name__}: {error}")
