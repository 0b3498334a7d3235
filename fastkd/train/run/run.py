"""Running a recipe: data, teacher, student, summary."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastkd.data.data import Data, load_data
from fastkd.errors import DataError, NonFiniteLossError, Preempted, RecipeError, Stopped, StorageError
from fastkd.files.sealed import short_digest_of
from fastkd.messages import resume_command
from fastkd.recipe.sections import Recipe
from fastkd.train import distributed
from fastkd.train.display.loggers import require_loggers
from fastkd.train.precision import check_compiler
from fastkd.train.random_state import seed_generators
from fastkd.train.signals import StopSignals

from .agreement import check_content, check_folder, check_state
from .build import build_method, build_network, prepare_device, synchronised, try_method
from .fitting import fit_in_folder, owned, read_state
from .folder import create_run_folder, write_facts, write_json, write_recipe
from .resume import check_recipe, identity
from .teacher_cache import TeacherCache
from .teachers import (
    ACCURACIES,
    TeacherInUse,
    cached_teacher,
    described,
    load_given_teacher,
    open_cache,
    own_teacher,
    relevant_settings,
    teacher_hash,
)


def stopped(folder: Path | None) -> Stopped:
    """What to raise at Ctrl-C, given the folder to resume, if one was created."""
    if folder is None:
        return Stopped("stopped before anything was written")
    return Stopped(f"stopped; to resume: {resume_command(folder)}")


@dataclass(frozen=True)
class Prepared:
    """A recipe whose data, given teacher and networks have been tried; nothing is written."""

    device: torch.device
    data: Data
    cache: TeacherCache | None
    teacher: TeacherInUse | None  # None if there is none, or if it is trained or found in `runs`


def prepare(name: str, recipe: Recipe, console: Console) -> Prepared:
    """Find unusable data, checkpoints and layers before anything is trained. Raises ``TrainError``."""
    device = prepare_device(recipe.train)
    console.print(f"{name}: {recipe.description}")
    check_ranks(recipe, device)
    if recipe.train.compile:
        check_compiler(device)
    require_loggers(recipe.train)
    with distributed.first_rank_first():
        data = load_data(recipe.data)
    console.print(f"data: {data.describe()}")
    for note in data.notes:
        console.print(f"  {note}")
    cache = open_cache(recipe, data, device)
    teacher = None
    if cache is not None:
        teacher = cached_teacher(cache)
    elif recipe.teacher is not None:
        teacher = load_given_teacher(recipe.teacher, data, device, console)
    for note in try_method(recipe, data, device, teacher=None if teacher is None else teacher.model):
        console.print(note)
    return Prepared(device, data, cache, teacher)


def run_recipe(
    name: str,
    recipe: Recipe,
    *,
    runs: Path,
    console: Console,
    folder: Path | None = None,
    create: Callable[[], Path] | None = None,
    resumed_by: Callable[[Path], Path] = lambda folder: folder,
) -> dict[str, Any]:
    """Train the teacher if it has no checkpoint yet, then the student; returns the summary.

    Creates a run folder, in ``runs`` or by ``create``, unless ``folder`` names one to resume.

    ``resumed_by``: what ``--resume`` takes for the run folder, where it is in a group.

    Raises ``TrainError`` for what a user can fix, and ``Stopped`` at Ctrl-C.
    """
    try:
        ready = prepare(name, recipe, console)
        device, data, cache, teacher = ready.device, ready.data, ready.cache, ready.teacher
        made_by = teacher_hash(recipe, data, teacher, cache)
        known_as = identity(recipe, short_digest_of(data.fingerprint), made_by)
        check_content(data, made_by)
        if folder is None:
            create = create or partial(create_run_folder, runs, name)
            folder = distributed.from_first(create() if distributed.is_first() else None)
        check_folder(folder)
        with StopSignals(), owned(folder):
            resume = read_state(folder, "student", console)
            check_state(resume)
            for note in check_recipe(resume, known_as, recipe, folder) if resume else ():
                console.print(note)
            if distributed.is_first():
                write_recipe(folder, name, recipe)
            if recipe.teacher is not None and teacher is None:
                teacher = own_teacher(recipe.teacher, data, runs, device, console)
            if teacher is not None:
                console.print(f"teacher: {described(teacher)}")
                if distributed.is_first():
                    write_facts(folder, name, teacher.summary["val_accuracy"])
            summary = _distil(name, recipe, data, teacher, folder, device, console, cache, resume, known_as)
    except KeyboardInterrupt:
        raise stopped(None if folder is None else resumed_by(folder)) from None
    except Preempted as error:
        assert folder is not None  # it is raised in a training
        raise Preempted(f"{error}; to resume: {resume_command(resumed_by(folder))}") from None
    except (NonFiniteLossError, DataError) as error:
        if folder is None or not (folder / "last.pt").exists():
            raise
        raise type(error)(f"{error}; the run folder {folder} keeps the earlier epochs") from None
    except StorageError as error:
        if folder is None or not (folder / "recipe.yaml").exists():
            if folder is not None:
                with contextlib.suppress(OSError):
                    folder.rmdir()  # it is empty
            raise
        raise StorageError(f"{error}; then continue with: {resume_command(resumed_by(folder))}") from None
    return {**summary, "folder": str(folder)}


def check_ranks(recipe: Recipe, device: torch.device) -> None:
    """Raise ``RecipeError`` for what several ranks cannot do: uneven shares, SyncBatchNorm on CPUs."""
    world = distributed.world()
    if world == 1:
        return
    if recipe.train.sync_batchnorm and device.type != "cuda":
        raise RecipeError(
            f"train.sync_batchnorm: torch's SyncBatchNorm runs on GPUs, but train.device is {device.type}"
        )
    for key, section in (("train", recipe.train), ("teacher", recipe.teacher)):
        if section is None:
            continue
        if section.batch_size % world or section.batch_size < 2 * world:
            raise RecipeError(
                f"{key}.batch_size = {section.batch_size} cannot be shared among {world} processes evenly, "
                "two images or more to each; it counts the images per step over all processes"
            )


def _distil(
    name: str,
    recipe: Recipe,
    data: Data,
    teacher: TeacherInUse | None,
    folder: Path,
    device: torch.device,
    console: Console,
    cache: TeacherCache | None,
    resume: dict[str, Any] | None,
    known_as: dict[str, Any],
) -> dict[str, Any]:
    """Train the student and write the summary."""
    # Seeded here, so that the student does not depend on whether the teacher was trained or loaded.
    seed_generators(recipe.train.seed)
    student = build_network(recipe.student, data).to(device)
    if recipe.train.sync_batchnorm:
        student = synchronised(student)
    method = build_method(recipe, student, teacher.model if teacher else None, data, device)
    if recipe.train.sync_batchnorm:
        for part, module in method.named_children():
            if part != "student":
                setattr(method, part, synchronised(module))
    result = fit_in_folder(
        folder,
        "student",
        method,
        recipe.train,
        data,
        device,
        console,
        title=f"{name}, seed {recipe.train.seed}",
        teacher_accuracy=teacher.summary["val_accuracy"] if teacher else None,
        cache=cache,
        resume=resume,
        known_as=known_as,
        run={"name": name, "folder": folder.name, "recipe": recipe.flat()},
    )
    summary = {
        "name": name,
        "method": recipe.method,
        "seed": recipe.train.seed,
        "comparison": comparison_key(recipe, data),
        "num_classes": data.num_classes,
        "best": _of_epoch(result.best),
        "last": _of_epoch(result.last),
        "seconds": result.seconds,
        "teacher": teacher.summary if teacher else None,
        "corrupt_images": dict(getattr(data, "corrupt", {})),
        "made_with": _versions(device),
    }
    if distributed.is_first():
        write_json(folder / "summary.json", summary)
    return summary


def _of_epoch(record: dict[str, Any]) -> dict[str, Any]:
    return {key: record[key] for key in ("epoch", *ACCURACIES) if key in record}


def comparison_key(recipe: Recipe, data: Data) -> str:
    """Equal for runs that differ only in method, teacher or seed, so that their results can be compared."""
    train = relevant_settings(recipe.train, _IRRELEVANT)
    if recipe.train.accumulate > 1:  # batch normalisation and relations see micro-batches
        train["accumulate"] = recipe.train.accumulate
    return short_digest_of([data.fingerprint, recipe.student.model_dump(), train])


# Settings without influence on results: where and how a run is computed, and what is written.
_IRRELEVANT = {
    "seed", "device", "threads", "teacher_precision", "channels_last", "compile", "accumulate",
    "nonfinite", "log_every", "checkpoint_every", "keep_every", "tensorboard", "csv", "wandb",
    "val_batch_size",
}  # fmt: skip


def _versions(device: torch.device) -> dict[str, str]:
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": f"{device.type}: {where}",
        "threads": str(torch.get_num_threads()),
    }
