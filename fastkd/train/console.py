"""What a person sees while training: a progress bar, a line an epoch, the table at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .loop import Watcher
from .meters import LossMeter

# Each value fetched from a GPU would be a wait; the eye needs no more than this.
_REFRESH_SECONDS = 0.25


def make_console() -> Console:
    """A console that keeps tables whole when the output is a file or a pipe."""
    console = Console(highlight=False, emoji=False)
    if not console.is_terminal:
        console = Console(highlight=False, emoji=False, width=160)
    return console


class ConsoleProgress(Watcher):
    """A bar with loss terms and accuracy while an epoch runs (on a terminal), one line when it is done."""

    def __init__(self, name: str = "", console: Console | None = None) -> None:
        self._console = console or make_console()
        self._name = f"{name} " if name else ""
        self._epochs = 0
        self._shown = 0.0
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
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
        self._epochs = epochs
        self._progress.reset(
            self._task,
            total=batches,
            description=f"{self._name}{epoch}/{epochs}",
            figures="",
            visible=True,
        )

    def batch_done(self, meter: LossMeter) -> None:
        now = time.monotonic()
        if self._progress.disable or now - self._shown < _REFRESH_SECONDS:
            return
        self._shown = now
        self._progress.update(
            self._task, completed=meter.steps, figures=_figures(meter.loss, meter.terms, meter.accuracy)
        )

    def epoch_done(self, record: Mapping[str, Any], state: Callable[[], dict[str, Any]]) -> None:
        figures = _figures(record["loss"], record["terms"], record["train_accuracy"])
        seconds = sum(record["seconds"].values())
        width = len(str(self._epochs))
        self._console.print(
            f"{self._name}epoch {record['epoch']:{width}d}/{self._epochs}  {figures}  "
            f"[bold]val {record['val_accuracy']:.2%}[/bold]  {seconds:.1f} s"
        )


def _figures(loss: float, terms: Mapping[str, float], accuracy: float) -> str:
    parts = [f"loss {loss:.3f}"]
    if len(terms) > 1:
        parts.append("(" + ", ".join(f"{name} {value:.3f}" for name, value in terms.items()) + ")")
    return " ".join([*parts, f" train {accuracy:.2%}"])


def results_table(title: str, rows: Sequence[tuple[str, str, str]]) -> Table:
    """Rows of (what, best epoch, last epoch)."""
    table = Table(title=title, title_justify="left")
    table.add_column("validation accuracy, %")
    table.add_column("best epoch", justify="right")
    table.add_column("last epoch", justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def time_table(seconds: Mapping[str, float]) -> Table:
    """Seconds and share of each part of training; validation stands beside, it is no part of a step."""
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
