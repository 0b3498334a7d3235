"""Console output of training: a progress bar, one line per epoch, tables of results."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fastkd.command import discard
from fastkd.train.meters import LossMeter
from fastkd.train.watcher import Watcher

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
        with contextlib.suppress(OSError, ValueError):  # stdout may have no file descriptor
            discard(sys.stdout)


def make_console(*, quiet: bool = False) -> Console:
    """A console with a fixed width for tables if the output is a file or a pipe.

    rich's markup is off: names of runs, faces and terms may contain brackets.
    """
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:  # an ASCII terminal shows ? for other characters
        reconfigure(errors="replace")
    console = _Console(highlight=False, emoji=False, markup=False, quiet=quiet)
    if not console.is_terminal:
        console = _Console(highlight=False, emoji=False, markup=False, quiet=quiet, width=160)
    return console


class ConsoleProgress(Watcher):
    """Shows loss terms, speed and time left during an epoch, and one line when it is done.

    During an epoch it is a progress bar on a terminal, otherwise one line per minute.
    """

    def __init__(self, name: str = "", console: Console | None = None) -> None:
        self._console = console or make_console()
        self._name = f"{name} " if name else ""
        self._epochs = 0
        self._batches: int | None = None
        self._shown = time.monotonic()
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("", figures="", visible=False)

    def __enter__(self) -> ConsoleProgress:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def epoch_started(self, epoch: int, epochs: int, batches: int | None) -> None:
        self._epochs, self._batches = epochs, batches
        self._progress.reset(
            self._task,
            total=batches,
            description=f"{self._name}{epoch}/{epochs}",
            figures="",
            visible=True,
        )

    def batch_done(self, meter: LossMeter) -> None:
        now = time.monotonic()
        if now - self._shown < (_LOG_SECONDS if self._progress.disable else _REFRESH_SECONDS):
            return
        self._shown = now
        figures = _figures(meter.loss, meter.terms, meter.accuracy) + self._speed(meter)
        if self._progress.disable:
            of = f"/{self._batches}" if self._batches else ""
            self._console.print(
                f"{self._name}epoch {meter.epoch}/{self._epochs}, step {meter.steps}{of}  {figures}"
            )
        else:
            self._progress.update(self._task, completed=meter.steps, figures=figures)

    def note(self, text: str) -> None:
        self._console.print(text, markup=False)

    def _speed(self, meter: LossMeter) -> str:
        """Images per second and share of waiting since the epoch began or was resumed; time left."""
        seconds, steps, images = meter.since_start()
        if seconds <= 0 or steps == 0:
            return ""
        text = f"  {images / seconds:,.0f} img/s, data {meter.waited / seconds:.0%}"
        if self._batches:
            steps_left = self._batches - meter.steps + (self._epochs - meter.epoch) * self._batches
            text += f", {timedelta(seconds=round(steps_left * seconds / steps))} left"
        return text

    def epoch_done(self, record: Mapping[str, Any], state: Callable[[], dict[str, Any]]) -> None:
        figures = _figures(record["loss"], record["terms"], record["train_accuracy"])
        seconds = sum(record["seconds"].values())
        width = len(str(self._epochs))
        skipped = f"  {record['skipped']} steps skipped" if record.get("skipped") else ""
        self._console.print(
            Text.assemble(
                f"{self._name}epoch {record['epoch']:{width}d}/{self._epochs}  {figures}  ",
                (f"val {record['val_accuracy']:.2%}", "bold"),
                f"  {seconds:.1f} s{skipped}",
            )
        )


def _figures(loss: float, terms: Mapping[str, float], accuracy: float) -> str:
    parts = [f"loss {loss:.3f}"]
    if len(terms) > 1:
        parts.append("(" + ", ".join(f"{name} {value:.3f}" for name, value in terms.items()) + ")")
    return " ".join([*parts, f" train {accuracy:.2%}"])


def results_table(title: str, rows: Sequence[tuple[str, str, str]]) -> Table:
    """A table from rows of (label, best epoch, last epoch)."""
    table = Table(title=title, title_justify="left")
    table.add_column("validation accuracy, %")
    table.add_column("best epoch", justify="right")
    table.add_column("last epoch", justify="right")
    for row in rows:
        table.add_row(*row)
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
