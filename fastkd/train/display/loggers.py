"""Loggers of a run: watchers that write each epoch's record elsewhere and pass everything on.

TensorBoard, Weights & Biases and CSV. A logger that fails (a full disk, a lost connection) says so once and
stops; the run continues.
"""

from __future__ import annotations

import csv
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from fastkd.errors import RecipeError
from fastkd.files.atomic import write_atomically
from fastkd.files.paths import user_path
from fastkd.recipe.sections import Train
from fastkd.train.watcher import ForwardingWatcher, Record, Watcher


def require_loggers(train: Train) -> None:
    """Raise ``RecipeError`` if a logger that the recipe asks for is not installed."""
    if train.tensorboard:
        require_tensorboard()
    if train.wandb:
        require_wandb()


def with_loggers(
    shown: Watcher, train: Train, folder: Path, run: Mapping[str, Any], history: Sequence[Record]
) -> Watcher:
    """``shown``, and before it the loggers that ``train`` asks for. ``history``: of a resumed run."""
    if train.tensorboard:
        shown = TensorBoard(folder / "tensorboard", shown)
    if train.csv:
        shown = CSVFile(folder / "metrics.csv", shown, history=history)
    if train.wandb:
        shown = WandB(folder, shown, run=run)
    return shown


def scalars_of(record: Record) -> Iterator[tuple[str, float]]:
    """The numbers of an epoch's record: ``val_accuracy``, ``terms/kd``, ``seconds/loss``, …"""
    for group, values in (("", record), ("terms/", record["terms"]), ("seconds/", record["seconds"])):
        for name, value in values.items():
            if isinstance(value, int | float) and name != "epoch":
                yield group + name, value


class Logger(ForwardingWatcher):
    """Subclasses define ``write``, and ``start`` and ``close`` if they need them; all may fail."""

    title = ""

    def __init__(self, shown: Watcher | None = None) -> None:
        super().__init__(shown or Watcher())
        self._failed = False

    def start(self) -> None: ...

    def write(self, record: Record) -> None:
        raise NotImplementedError

    def close(self) -> None: ...

    def __enter__(self) -> Watcher:
        super().__enter__()
        self._try(self.start)
        return self

    def __exit__(self, *exception: object) -> None:
        self._try(self.close)
        super().__exit__(*exception)

    def epoch_done(self, record: Record, state: Callable[[], dict[str, Any]]) -> None:
        self._try(lambda: self.write(record))
        super().epoch_done(record, state)

    def _try(self, do: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            do()
        except Exception as error:  # a logger and its threads must not end a run
            self._failed = True
            self.note(f"{self.title} is no longer written: {type(error).__name__}: {error}")


def require_tensorboard() -> Any:
    """TensorBoard's writer class. Raises ``RecipeError`` if it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise RecipeError(
            "train.tensorboard needs TensorBoard: pip install 'fastkd[tensorboard]', or leave it out"
        ) from None
    return SummaryWriter


class TensorBoard(Logger):
    """Writes the scalars of every epoch to ``folder``."""

    title = "TensorBoard"

    def __init__(self, folder: Path | str, shown: Watcher | None = None) -> None:
        super().__init__(shown)
        self._make = require_tensorboard()
        self._folder = user_path(folder)
        self._writer: Any = None

    def start(self) -> None:
        self._writer = self._make(str(self._folder))

    def write(self, record: Record) -> None:
        for name, value in scalars_of(record):
            self._writer.add_scalar(name, value, record["epoch"])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def require_wandb() -> Any:
    """The module wandb. Raises ``RecipeError`` if it is not installed."""
    try:
        import wandb
    except ImportError:
        raise RecipeError(
            "train.wandb needs Weights & Biases: pip install 'fastkd[wandb]', or leave it out"
        ) from None
    return wandb


class WandB(Logger):
    """Logs the scalars of every epoch to Weights & Biases; a resumed run continues the same curves.

    wandb's own variables apply: ``WANDB_MODE=offline`` writes to ``folder`` only, ``WANDB_PROJECT`` names the
    project. ``run``: its name, folder and recipe.
    """

    title = "Weights & Biases"

    def __init__(
        self, folder: Path | str, shown: Watcher | None = None, *, run: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(shown)
        self._wandb = require_wandb()
        self._folder = user_path(folder)
        self._about = run or {}
        self._run: Any = None

    def start(self) -> None:
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "fastkd",
            name=self._about.get("folder", self._folder.name),
            config=dict(self._about.get("recipe", {})),
            dir=str(self._folder),
            id=self._identity(),
            resume="allow",
        )

    def write(self, record: Record) -> None:
        self._run.log({"epoch": record["epoch"], **dict(scalars_of(record))}, step=record["epoch"])

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()

    def _identity(self) -> str:
        """Kept in the folder; drawn at random, since the same path may later hold another run."""
        path = self._folder / "wandb-id.txt"
        if not path.exists():
            text = secrets.token_hex(8)
            write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        return path.read_text(encoding="utf-8").strip()


class CSVFile(Logger):
    """Writes one line per epoch to ``path``, with a column for each number of the records.

    The whole file is written again after each epoch, since terms may come and go during training.
    ``history``: earlier records of a resumed run, whose file is continued; without them an existing file is
    not overwritten.
    """

    title = "metrics.csv"

    def __init__(
        self, path: Path | str, shown: Watcher | None = None, *, history: Sequence[Record] = ()
    ) -> None:
        super().__init__(shown)
        self._path = user_path(path)
        self.title = self._path.name
        self._history = list(history)

    def start(self) -> None:
        if not self._history and self._path.exists():
            raise FileExistsError(f"{self._path} already exists and is not overwritten")

    def write(self, record: Record) -> None:
        self._history.append(record)
        rows = [{"epoch": one["epoch"], **dict(scalars_of(one))} for one in self._history]
        text = StringIO()
        columns = dict.fromkeys(name for row in rows for name in row)
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(
            self._path, lambda temporary: temporary.write_text(text.getvalue(), encoding="utf-8")
        )
