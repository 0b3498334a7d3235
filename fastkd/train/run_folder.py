"""Run folders: one a run, numbered, never written over, valid at every moment.

recipe.yaml     the resolved recipe; `fastkd train FOLDER/recipe.yaml` runs it again
run.json        the recipe's name
last.pt         all that `--resume` needs, after every epoch
best.pt         the weights of the best epoch
metrics.jsonl   one line an epoch
curves.png      accuracy, loss terms, time
summary.json    written when the run is finished
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .checkpoint import load_checkpoint, save_checkpoint, write_atomically
from .curves import plot_curves
from .loop import Record, Watcher
from .meters import LossMeter
from .recipe import Recipe
from .recipe_files import dump_flat_yaml


def create_run_folder(runs: Path, name: str) -> Path:
    """A new folder ``runs/NAME-NNN``, numbered after those that exist."""
    stem = re.sub(r"[^\w.-]+", "-", name)
    runs.mkdir(parents=True, exist_ok=True)
    taken = [
        int(match.group(1))
        for path in runs.iterdir()
        if (match := re.fullmatch(re.escape(stem) + r"-(\d+)", path.name))
    ]
    number = max(taken, default=0) + 1
    while True:
        folder = runs / f"{stem}-{number:03d}"
        try:
            folder.mkdir()
        except FileExistsError:  # another process took it since
            number += 1
        else:
            return folder


def write_recipe(folder: Path, name: str, recipe: Recipe) -> None:
    write_text(folder / "recipe.yaml", dump_flat_yaml(recipe.flat()))
    write_json(folder / "run.json", {"name": name})


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """The content, or None if the file is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def read_resume_state(folder: Path) -> dict[str, Any] | None:
    """The state after the last finished epoch; None if none was finished."""
    path = folder / "last.pt"
    if not path.exists():
        return None
    return load_checkpoint(path, remedy="delete it to start this run from its first epoch")


class RunRecorder(Watcher):
    """Writes checkpoints and metrics after every epoch, the curves at the end (however it comes).

    Everything is passed on to ``shown``. ``facts`` go into the checkpoints beside the weights.
    """

    def __init__(
        self,
        folder: Path,
        shown: Watcher,
        *,
        facts: dict[str, Any],
        title: str,
        teacher_accuracy: float | None = None,
    ) -> None:
        self._folder = folder
        self._shown = shown
        self._facts = facts
        self._title = title
        self._teacher_accuracy = teacher_accuracy
        self._history: list[Record] = []

    def __enter__(self) -> RunRecorder:
        self._shown.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._shown.__exit__(*exception)
        if self._history:
            picture = self._folder / "curves.png"
            plot_curves(self._history, picture, title=self._title, teacher_accuracy=self._teacher_accuracy)

    def epoch_started(self, epoch: int, epochs: int, batches: int | None) -> None:
        self._shown.epoch_started(epoch, epochs, batches)

    def batch_done(self, meter: LossMeter) -> None:
        self._shown.batch_done(meter)

    def epoch_done(self, record: Record, state: Callable[[], dict[str, Any]]) -> None:
        resume = state()
        self._history = history = list(resume["history"])
        # Best before last: an interrupt in between repeats the epoch, which gives the same weights again.
        if all(record["val_accuracy"] > earlier["val_accuracy"] for earlier in history[:-1]):
            best = {"model": resume["student"], "epoch": record["epoch"], **self._facts}
            save_checkpoint(self._folder / "best.pt", {**best, "val_accuracy": record["val_accuracy"]})
        save_checkpoint(self._folder / "last.pt", resume)
        # Whole, from the history: a line that an interrupt left out or doubled would stay so.
        write_text(self._folder / "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in history))
        self._shown.epoch_done(record, state)
