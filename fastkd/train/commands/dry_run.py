"""`fastkd train … --dry-run`: build everything, try one step of each training, write no run folder."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from fastkd.distill import CrossEntropy, Method, options_of
from fastkd.errors import RecipeError
from fastkd.files.sealed import short_digest_of
from fastkd.recipe.files import dump_scalar
from fastkd.recipe.sections import Model, Optimization, Recipe
from fastkd.train import distributed
from fastkd.train.batches import Batch, Batches
from fastkd.train.evaluation import evaluate_rows
from fastkd.train.random_state import get_random_state, set_random_state
from fastkd.train.run.build import build_method, build_network, tried, with_given
from fastkd.train.run.fitting import read_state
from fastkd.train.run.folder import next_run_folder
from fastkd.train.run.resume import check_recipe, identity
from fastkd.train.run.run import Prepared, prepare
from fastkd.train.run.seeds import check_cache_of_seeds
from fastkd.train.run.teachers import described, folder_of, teacher_hash
from fastkd.train.trial import try_step


def dry_run(
    name: str, recipe: Recipe, runs: Path, console: Console, *, seeds: int = 1, folder: Path | None = None
) -> dict[str, Any]:
    """Try ``recipe`` and print what training would do; returns the same as plain values.

    Raises ``TrainError`` for whatever would stop training early.
    """
    if distributed.world() > 1:
        raise RecipeError("--dry-run needs a single process: start it without torchrun")
    check_cache_of_seeds(recipe, seeds)
    ready = prepare(name, recipe, console)
    done = 0 if folder is None else _epochs_done(ready, recipe, folder, console)
    randoms = get_random_state()
    try:
        tries = _Tries(recipe, ready, runs)
        teacher = tries.teacher()
        student = tries.student(recipe.train.epochs - done)
    finally:
        set_random_state(randoms)
    seconds = (teacher or {}).get("seconds", 0.0) + seeds * student["seconds"]
    place = str(folder or next_run_folder(runs, name))
    lines = []
    if teacher is not None:
        lines.append(f"teacher: {teacher['network']}; {teacher['plan']}")
    lines += [
        f"student: {student['network']}",
        f"method: {student['method']}",
        f"one step, untrained: {student['terms']}",
        f"training: {student['plan']}" + (f", {seeds} seeds" if seeds > 1 else ""),
        f"validation: the first batch works, of {student['validation_batches']}",
        f"time: about {timedelta(seconds=round(seconds))} on this machine, from a step's "
        f"{1e3 * student['step_seconds']:,.0f} ms",
        f"it would {'resume' if folder else 'create'} {place}; nothing was written there",
    ]
    for line in lines:
        console.print(line, soft_wrap=True)
    return {
        "name": name, "data": ready.data.describe(), "teacher": teacher, "student": student, "seeds": seeds,
        "seconds": seconds, "folder": place,
    }  # fmt: skip


def _epochs_done(ready: Prepared, recipe: Recipe, folder: Path, console: Console) -> int:
    """Epochs that the resumed run has; raises ``CheckpointError`` if it cannot be resumed."""
    state = read_state(folder, "student", console)
    if state is None:
        return 0
    made_by = teacher_hash(recipe, ready.data, ready.teacher, ready.cache)
    known_as = identity(recipe, short_digest_of(ready.data.fingerprint), made_by)
    for note in check_recipe(state, known_as, recipe, folder):
        console.print(note)
    return len(state["history"])


class _Tries:
    """The two trainings of a recipe, each described and measured by a step on its first batch."""

    def __init__(self, recipe: Recipe, ready: Prepared, runs: Path) -> None:
        self._recipe, self._ready, self._runs = recipe, ready, runs
        self._network: nn.Module | None = None

    def teacher(self) -> dict[str, Any] | None:
        config, ready = self._recipe.teacher, self._ready
        if config is None:
            return None
        if ready.teacher is not None:
            self._network = ready.teacher.model
            return {"network": _described(config, self._network), "plan": described(ready.teacher)}
        self._network = build_network(config, ready.data).to(ready.device)
        network = _described(config, self._network)
        path = folder_of(config, ready.data, self._runs) / "teacher.pt"
        if path.exists():
            return {"network": network, "plan": f"trained already, {path}"}
        measured = self._measured(CrossEntropy(self._network), config, config.epochs, "float32", 1)
        return {"network": network, **measured, "plan": f"would be trained first: {measured['plan']}"}

    def student(self, epochs: int) -> dict[str, Any]:
        recipe, ready = self._recipe, self._ready
        student = build_network(recipe.student, ready.data).to(ready.device)
        method = build_method(recipe, student, self._network, ready.data, ready.device)
        # What is off by default, as most is, is left out.
        defaults = {key: option.default for key, option in options_of(type(method)).items()}
        options = {
            key: value
            for key, value in recipe.options.items()
            if value not in (None, 0, False) or value != defaults.get(key)
        }
        words = ", ".join(f"{key} {dump_scalar(value)}" for key, value in options.items())
        parts = sum(p.numel() for p in method.parameters()) - sum(p.numel() for p in student.parameters())
        heads = f"; {parts:,} parameters of its own" if parts else ""
        train = recipe.train
        measured = self._measured(method, train, max(epochs, 0), train.precision, train.accumulate)
        return {
            "network": _described(recipe.student, student),
            "method": f"{recipe.method}, {words}{heads}",
            **measured,
        }

    def _measured(
        self, method: Method, config: Optimization, epochs: int, precision: str, accumulate: int
    ) -> dict[str, Any]:
        """One step and one batch of validation, timed, and what the whole training would be."""
        ready, recipe = self._ready, self._recipe
        device, layout = ready.device, recipe.train.channels_last
        loader = ready.data.train_loader(config.batch_size, config.seed, device)
        batch = _first(Batches(loader, device, even=True, channels_last=layout), "the first training batch")
        batch = with_given(batch, method.teacher)
        with torch.no_grad():
            terms = tried("one step", method.loss, batch)
        shown = ", ".join(f"{name} {value.item():.3f}" for name, value in terms.items())
        step = _timed(lambda: tried("one step", try_step, method, batch, precision, accumulate), device)
        size = recipe.train.val_batch_size or config.batch_size
        val_loader = ready.data.val_loader(device, size)
        val_batch = _first(
            Batches(val_loader, device, even=False, name="val_loader"), "the first validation batch"
        )
        student = method.student
        validation = _timed(
            lambda: tried(
                "validation", evaluate_rows, student, [val_batch], device=device, precision=precision
            ),
            device,
        )
        steps, batches = len(loader), len(val_loader)
        how = f"{config.optimizer}, lr {config.lr:g}, {config.schedule}, {precision} on {device}"
        return {
            "terms": shown,
            "steps": epochs * steps,
            "step_seconds": step,
            "validation_batches": batches,
            "seconds": epochs * (steps * step + batches * validation),
            "plan": f"{epochs} epochs of {steps:,} steps, {config.batch_size} images each; {how}",
        }


def _described(config: Model, network: nn.Module) -> str:
    width = f", width {config.width}" if config.width else ""
    count = sum(parameter.numel() for parameter in network.parameters())
    return f"{config.name}{width}" + (f", {count:,} parameters" if count else "")


def _first(batches: Batches, what: str) -> Batch:
    def read() -> Batch | None:
        return next((batch for batch in batches.start() if batch is not None), None)

    batch: Batch | None = tried(what, read)
    if batch is None:
        raise RecipeError(f"{what}: the loader yielded none")
    return batch


def _timed(do: Callable[[], object], device: torch.device) -> float:
    """Seconds of the second call; the first one allocates and chooses kernels."""
    for _ in range(2):
        began = time.perf_counter()
        do()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return time.perf_counter() - began
