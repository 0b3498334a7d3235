"""Run folders: one per run, numbered, never overwritten, valid at every moment.

recipe.yaml     the resolved recipe; `fastkd train FOLDER/recipe.yaml` runs it again
run.json        the recipe's name, the teacher's accuracy
last.pt         the state for `--resume`, written after every epoch and every `train.checkpoint_every`
previous.pt     the state before, in case last.pt is damaged
epoch-NNNN.pt   every `train.keep_every` epochs
best.pt         the weights of the best epoch (their average, with `train.ema`), and what `fastkd.load` needs
metrics.jsonl   one line per epoch; metrics.csv too, with `train.csv`
curves.png      accuracy, loss terms, time
summary.json    written when the run is finished

A group of seeds is a folder of run folders, with a recipe.yaml and a run.json of its own, and seeds.json.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fastkd.errors import CheckpointError, NonFiniteLossError, StorageError
from fastkd.files.atomic import write_atomically
from fastkd.files.regular import read_regular
from fastkd.recipe.files import dump_flat_yaml
from fastkd.recipe.sections import Recipe
from fastkd.train.batches import Batch
from fastkd.train.display.curves import plot_curves
from fastkd.train.evaluation import ACCURACIES, best_of
from fastkd.train.watcher import ForwardingWatcher, Record, Watcher

from .checkpoint import load_checkpoint, save_checkpoint
from .weights import averaged_weights

_PREVIOUS = "previous.pt"
GROUP = "seeds.json"


def is_seed_group(folder: Path) -> bool:
    return (folder / GROUP).exists()


def create_run_folder(runs: Path, name: str) -> Path:
    """Create ``runs/NAME-NNN`` with the next free number. Raises ``StorageError``."""
    try:
        runs.mkdir(parents=True, exist_ok=True)
        while True:
            folder = next_run_folder(runs, name)
            with contextlib.suppress(FileExistsError):  # another process was faster
                folder.mkdir()
                return folder
    except OSError as error:
        raise StorageError(
            f"cannot create a run folder in {runs}: {error.strerror}; --runs FOLDER chooses another place"
        ) from None


def next_run_folder(runs: Path, name: str) -> Path:
    """The path that ``create_run_folder`` would take."""
    number = max(folders_of(runs, name), default=0) + 1
    return runs / f"{_stem(name)}-{number:03d}"


def _stem(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name)


def folders_of(runs: Path, name: str) -> dict[int, Path]:
    """Run folders by number."""
    if not runs.is_dir():
        return {}
    named = re.compile(re.escape(_stem(name)) + r"-(\d+)")
    return {int(match.group(1)): path for path in runs.iterdir() if (match := named.fullmatch(path.name))}


def write_recipe(folder: Path, name: str, recipe: Recipe) -> None:
    write_text(folder / "recipe.yaml", dump_flat_yaml(recipe.flat()))
    write_facts(folder, name)


def write_facts(folder: Path, name: str, teacher_accuracy: float | None = None) -> None:
    """``teacher_accuracy``: for `fastkd plot`, before there is a summary."""
    known = {} if teacher_accuracy is None else {"teacher_accuracy": teacher_accuracy}
    write_json(folder / "run.json", {"name": name, **known})


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """The content, or None if the file is missing or damaged."""
    try:
        return json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError):
        return None


def is_summary(content: Any) -> bool:
    """Whether a summary.json has every entry that other commands read."""
    try:
        numbers = [content[which]["val_accuracy"] for which in ("best", "last")]
        numbers += [content["seed"], *content["seconds"].values()]
        return all(isinstance(number, int | float) for number in numbers) and all(
            isinstance(content[name], str) for name in ("name", "method", "comparison")
        )
    except (AttributeError, KeyError, TypeError):
        return False


def _kept_states(folder: Path) -> list[Path]:
    """Those of ``keep_every``, the newest first."""
    return sorted(folder.glob("epoch-*.pt"), reverse=True)


def read_resume_state(folder: Path, note: Callable[[str], None]) -> dict[str, Any] | None:
    """The newest readable state; None if there are no states. Damaged ones are reported to ``note``.

    Raises ``CheckpointError`` if there are states but none can be read.
    """
    states = (folder / "last.pt", folder / _PREVIOUS, *_kept_states(folder))
    paths = [path for path in states if path.exists()]
    remedy = "delete it to start this run from its first epoch"
    for path in paths:
        try:
            state = load_checkpoint(path, remedy=remedy)
            missing = [key for key in ("student", "optimizer", "history", "random") if key not in state]
            if missing:
                raise CheckpointError(f"checkpoint {path} is not a state of a run: {missing[0]} is missing")
        except CheckpointError as error:
            if path == paths[-1]:
                raise
            note(f"{str(error).removesuffix('; ' + remedy)}; using the previous one")
            continue
        if isinstance(state["random"], dict):  # written by a version without ranks
            state["random"] = [state["random"]]
        return state
    return None


class RunRecorder(ForwardingWatcher):
    """Writes checkpoints and metrics after every epoch, and the curves when training ends for any reason.

    Passes everything on to ``shown``. ``facts`` are added to checkpoints of weights, ``known_as`` to states;
    ``keep_every``: epochs between states that are never deleted; ``history``: of the resumed run.
    """

    def __init__(
        self,
        folder: Path,
        shown: Watcher,
        *,
        facts: dict[str, Any],
        title: str,
        teacher_accuracy: float | None = None,
        keep_every: int | None = None,
        known_as: Mapping[str, Any] = MappingProxyType({}),
        history: Sequence[Record] = (),
    ) -> None:
        super().__init__(shown)
        self._folder = folder
        self._facts = facts
        self._title = title
        self._teacher_accuracy = teacher_accuracy
        self._keep_every = keep_every
        self._known_as = known_as
        self._history = list(history)

    def __enter__(self) -> Watcher:
        if self._history:  # the run may have been killed after writing the state
            self._write_metrics()
            last, kept = self._folder / "last.pt", _kept_states(self._folder)
            if kept and not last.exists():  # or between the first kept state and the newest, which it is too
                write_atomically(last, lambda temporary: shutil.copyfile(kept[0], temporary))
        return super().__enter__()

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        if self._history:
            picture = self._folder / "curves.png"
            try:
                plot_curves(
                    self._history, picture, title=self._title, teacher_accuracy=self._teacher_accuracy
                )
            except Exception as error:  # full disk, settings, fonts: must not end the run
                self.note(f"{picture} could not be drawn: {type(error).__name__}: {error}")

    def epoch_done(self, record: Record, state: Callable[[], dict[str, Any]]) -> None:
        resume = {**state(), **self._known_as}
        self._history = history = list(resume["history"])
        # best.pt before last.pt: if killed in between, the epoch is repeated and gives the same weights.
        if best_of(history) is record:
            weights = resume["student"] if resume["ema"] is None else averaged_weights(resume["ema"])
            best = {"model": weights, "epoch": record["epoch"], **self._facts}
            measured: dict[str, Any] = {key: record[key] for key in ACCURACIES if key in record}
            save_checkpoint(self._folder / "best.pt", {**best, **measured})
        if self._keep_every is not None and record["epoch"] % self._keep_every == 0:
            save_checkpoint(self._folder / f"epoch-{record['epoch']:04d}.pt", resume)
        self._save(resume)
        self._write_metrics()
        super().epoch_done(record, state)

    def checkpoint(self, epoch: int, step: int, state: Callable[[], dict[str, Any]]) -> None:
        self._save({**state(), **self._known_as})
        super().checkpoint(epoch, step, state)

    def not_finite(self, error: NonFiniteLossError, batch: Batch | None) -> None:
        if batch is None:
            return
        path = self._folder / f"not-finite-epoch-{error.epoch:04d}-step-{error.step:06d}.pt"
        images, target = batch[:2]
        content = {"epoch": error.epoch, "step": error.step, "terms": dict(error.terms)}
        try:
            save_checkpoint(path, {**content, "images": images.cpu(), "target": target.cpu()})
        except StorageError as full:  # must not hide the cause
            error.args = (f"{error}; its batch could not be saved: {full}",)
            return
        error.args = (f"{error}; its batch is in {path}",)

    def _write_metrics(self) -> None:
        # Rewritten from the history, so that an interrupt leaves no missing or duplicate line.
        lines = "".join(json.dumps(record) + "\n" for record in self._history)
        write_text(self._folder / "metrics.jsonl", lines)

    def _save(self, state: dict[str, Any]) -> None:
        save_checkpoint(self._folder / "last.pt", state, keep_as=self._folder / _PREVIOUS)
