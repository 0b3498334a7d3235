"""Console output of training: a progress bar, one line per epoch, tables of results."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fastkd.command import discard
from fastkd.train.meters import LossMeter
from fastkd.train.watcher import Watcher

from .line import Part, ProgressLine, figures_of, fitting, joined, styled

# Refreshing more often is not visible and costs time.
_REFRESH_SECONDS = 0.25
# Without a terminal: one line per minute shows progress and speed.
_LOG_SECONDS = 60.0


class _Console(Console):
    """Becomes silent when its terminal or reader has gone, so that a run continues without it."""

    def print(self, *arguments: Any, **options: Any) -> None:
        try:
            super().print(*arguments, **options)
        except OSError:
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        self.quiet = True
        with contextlib.suppress(OSError, ValueError):  # the stream may have no file descriptor
            discard(sys.stderr if self.stderr else sys.stdout)


def make_console(*, quiet: bool = False, stderr: bool = False) -> Console:
    """A console with a fixed width for tables if the output is a file or a pipe.

    rich's markup is off: names of runs, faces and terms may contain brackets. ``stderr``: where stdout is for
    a program, as with ``--json``.
    """
    reconfigure = getattr(sys.stderr if stderr else sys.stdout, "reconfigure", None)
    if reconfigure is not None:  # an ASCII terminal shows ? for other characters
        reconfigure(errors="replace")
    options: dict[str, Any] = {"highlight": False, "emoji": False, "markup": False, "stderr": stderr}
    console = _Console(quiet=quiet, **options)
    return console if console.is_terminal else _Console(quiet=quiet, width=160, **options)


class ConsoleProgress(Watcher):
    """Shows loss terms, speed and time left during an epoch, and one line when it is done.

    During an epoch it is a progress bar on a terminal, otherwise one line per minute. On a narrow terminal
    parts are left out, loss terms first; bar, epoch, accuracy and time left remain.
    """

    def __init__(self, name: str = "", console: Console | None = None) -> None:
        self._console = console or make_console()
        self._name = f"{name} " if name else ""
        self._epochs = 0
        self._batches: int | None = None
        self._shown = time.monotonic()
        self._line = ProgressLine(self._console)
        self._progress = Progress(
            self._line, console=self._console, transient=True, disable=not self._console.is_terminal
        )
        self._task = self._progress.add_task("", visible=False)

    def __enter__(self) -> ConsoleProgress:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def epoch_started(self, epoch: int, epochs: int, batches: int | None) -> None:
        self._epochs, self._batches = epochs, batches
        self._line.parts = []
        self._progress.reset(
            self._task, total=batches, description=f"{self._name}{epoch}/{epochs}", visible=True
        )

    def batch_done(self, meter: LossMeter) -> None:
        now = time.monotonic()
        if now - self._shown < (_LOG_SECONDS if self._progress.disable else _REFRESH_SECONDS):
            return
        self._shown = now
        of = f"/{self._batches}" if self._batches else ""
        if self._progress.disable:
            speed = ", ".join(part.text for part in self._speed(meter))
            figures = joined(figures_of(meter.loss, meter.terms, meter.accuracy))
            self._console.print(
                f"{self._name}epoch {meter.epoch}/{self._epochs}, step {meter.steps}{of}  {figures}"
                + (f"  {speed}" if speed else "")
            )
            return
        steps = Part(f"{meter.steps}{of}", drop=3)
        self._line.parts = [
            steps, *figures_of(meter.loss, meter.terms, meter.accuracy), *self._speed(meter)
        ]  # fmt: skip
        self._progress.update(self._task, completed=meter.steps)

    def note(self, text: str) -> None:
        self._console.print(text, markup=False)

    def _speed(self, meter: LossMeter) -> list[Part]:
        """Images per second and share of waiting since the epoch began or was resumed; time left."""
        seconds, steps, images = meter.since_start()
        if seconds <= 0 or steps == 0:
            return []
        parts = [Part(f"{images / seconds:,.0f} img/s, data {meter.waited / seconds:.0%}", drop=5)]
        if self._batches:
            steps_left = self._batches - meter.steps + (self._epochs - meter.epoch) * self._batches
            parts.append(Part(f"{timedelta(seconds=round(steps_left * seconds / steps))} left", drop=1))
        return parts

    def epoch_done(self, record: Mapping[str, Any], state: Callable[[], dict[str, Any]]) -> None:
        width = len(str(self._epochs))
        skipped = f"{record['skipped']} steps skipped" if record.get("skipped") else ""
        accuracy, top5 = record.get("val_accuracy"), record.get("val_top5_accuracy")
        parts = [
            Part(f"{self._name}epoch {record['epoch']:{width}d}/{self._epochs}"),
            *figures_of(record["loss"], record["terms"], record["train_accuracy"], accuracy_drop=3),
            Part("" if accuracy is None else f"val {accuracy:.2%}", style="bold"),
            Part("" if top5 is None else f"top-5 {top5:.2%}", drop=2),
            Part(f"{sum(record['seconds'].values()):.1f} s", drop=2),
            Part(skipped, drop=1),
        ]
        if self._console.is_terminal:
            parts = fitting(parts, self._console.width)
        self._console.print(styled(parts))


def results_table(title: str, rows: Sequence[tuple[str, str, str, str]]) -> Table:
    """A table from rows of (label, best epoch, last epoch, top-5 of the last epoch).

    Without the last column if no row has it.
    """
    columns = 4 if any(row[3] for row in rows) else 3
    table = Table(title=title, title_justify="left")
    table.add_column("validation accuracy, %")
    for name in ("best epoch", "last epoch", "top-5, last epoch")[: columns - 1]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row[:columns])
    return table


def time_table(seconds: Mapping[str, float]) -> Table:
    """A table of seconds and shares of each part of training; validation is not part of the total."""
    table = Table(title="time of the student's training", title_justify="left")
    training = {part: value for part, value in seconds.items() if part != "validation"}
    total = sum(training.values())
    for part in (*training, "total", "validation"):
        table.add_column(part, justify="right")
    table.add_row(
        *(f"{v:.1f} s" for v in training.values()), f"{total:.1f} s", f"{seconds['validation']:.1f} s"
    )
    table.add_row(*(f"{v / max(total, 1e-9):.1%}" for v in training.values()), "", "")
    return table
