"""From a recipe to a finished run: data, teacher, student, results."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from fastkd.distill import CrossEntropy, Method
from fastkd.sealed_files import digest_of

from . import distributed
from .build import build_method, build_network, resolve_device, tried, try_method
from .checkpoint import save_checkpoint
from .console import ConsoleProgress
from .data import Data, load_data
from .errors import DataError, NonFiniteLossError, Preempted, RecipeError, StorageError, TrainError
from .evaluation import evaluate
from .forwarding import Shielded
from .loop import FitResult, Watcher, fit_method
from .optimization import build_optimizer, build_scheduler
from .recipe import Optimization, Recipe, Teacher, Train
from .resume import check_recipe, fingerprint, identity
from .run_folder import RunRecorder, create_run_folder, read_resume_state, write_json, write_recipe
from .run_lock import locked
from .signals import StopSignals
from .storage import make_folder
from .sync_batchnorm import synchronised
from .teacher_cache import CachedLoader, CachedTeacher, TeacherCache, wanted_facts
from .tensorboard import TensorBoard, require_tensorboard
from .torchvision_weights import torchvision_network
from .weights import load_weights


class Stopped(KeyboardInterrupt):
    """Ctrl-C after a run folder was made; ``folder`` is what ``--resume`` takes."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder


@dataclass(frozen=True)
class TeacherInUse:
    """A trained teacher and what is known of it."""

    model: nn.Module
    summary: dict[str, Any]  # checkpoint, val_accuracy (last epoch), best_val_accuracy where known


def run_recipe(
    name: str, recipe: Recipe, *, runs: Path, console: Console, folder: Path | None = None
) -> dict[str, Any]:
    """Train the teacher if its checkpoint is not there yet, then the student; returns the summary.

    A new run folder is made under ``runs``, unless ``folder`` names one to go on with.

    Raises ``TrainError`` for what a user can mend and ``Stopped`` at Ctrl-C.
    """
    try:
        device = resolve_device(recipe.train.device)
        if recipe.train.threads is not None:
            torch.set_num_threads(recipe.train.threads)
        console.print(f"{name}: {recipe.description}", markup=False)
        check_shares(recipe)
        if recipe.train.tensorboard:
            require_tensorboard()
        with distributed.first_rank_first():
            data = load_data(recipe.data)
        console.print(f"data: {data.describe()}", markup=False)
        for note in data.notes:
            console.print(f"  {note}", markup=False)
        # An unusable checkpoint or layer must be found before anything is trained or written.
        cache = _open_cache(recipe, data)
        teacher = None
        if cache is not None:
            teacher = TeacherInUse(CachedTeacher(), _cached_summary(cache))
        elif recipe.teacher is not None:
            teacher = load_given_teacher(recipe.teacher, data, device, console)
        ready = None if cache is not None or teacher is None else teacher.model
        for note in try_method(recipe, data, device, cached=cache is not None, teacher=ready):
            console.print(note, markup=False)
        if folder is None:
            folder = distributed.from_first(create_run_folder(runs, name) if distributed.is_first() else None)
        with StopSignals(), _owned(folder):
            known_as = identity(recipe, _hash(data.fingerprint), _teacher_hash(recipe, data, teacher, cache))
            resume = _read_state(folder, "student", console)
            for note in check_recipe(resume, known_as, recipe, folder) if resume else ():
                console.print(note, markup=False)
            if distributed.is_first():
                write_recipe(folder, name, recipe)
            if recipe.teacher is not None and teacher is None:
                teacher = own_teacher(recipe.teacher, data, runs, device, console)
            if teacher is not None:
                accuracy, path = teacher.summary["val_accuracy"], teacher.summary["checkpoint"]
                console.print(f"teacher: {accuracy:.2%}, {path}", markup=False)
            summary = _distil(name, recipe, data, teacher, folder, device, console, cache, resume, known_as)
    except KeyboardInterrupt:
        if folder is None:
            raise
        raise Stopped(folder) from None
    except Preempted as error:
        raise Preempted(f"{error}; to go on: fastkd train --resume {folder}") from None
    except (NonFiniteLossError, DataError) as error:
        if folder is None:
            raise
        raise type(error)(f"{error}; the run folder {folder} keeps the epochs before") from None
    except StorageError as error:
        if folder is None or not (folder / "recipe.yaml").exists():
            if folder is not None:
                with contextlib.suppress(OSError):
                    folder.rmdir()  # it has nothing in it
            raise
        raise StorageError(f"{error}; then go on with --resume {folder}") from None
    return {**summary, "folder": str(folder)}


@contextlib.contextmanager
def _owned(folder: Path) -> Iterator[None]:
    """The folder is this training's; its first rank holds the lock."""
    with locked(folder) if distributed.is_first() else contextlib.nullcontext():
        yield


def check_shares(recipe: Recipe) -> None:
    """Every rank must get as many images of a batch. Raises ``RecipeError``."""
    world = distributed.world()
    for key, section in (("train", recipe.train), ("teacher", recipe.teacher)):
        if section is None or world == 1:
            continue
        if section.batch_size % world or section.batch_size < 2 * world:
            raise RecipeError(
                f"{key}.batch_size = {section.batch_size} cannot be shared among {world} processes evenly, "
                "two images or more to each; it counts the images of a step over all of them"
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
    # Seeded here, so that a student does not depend on whether its teacher was trained or read.
    torch.manual_seed(recipe.train.seed)
    student = build_network(recipe.student, data).to(device)
    if recipe.train.sync_batchnorm:
        student = synchronised(student, device)
    method = build_method(recipe, student, teacher.model if teacher else None, data, device)
    if recipe.train.sync_batchnorm:
        for part, module in method.named_children():
            if part != "student":
                setattr(method, part, synchronised(module, device))
    result = _fit_in_folder(
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
    )
    summary = {
        "name": name,
        "method": recipe.method,
        "seed": recipe.train.seed,
        "comparison": comparison_key(recipe, data),
        "num_classes": data.num_classes,
        "best": {"epoch": result.best["epoch"], "val_accuracy": result.best["val_accuracy"]},
        "last": {"epoch": result.last["epoch"], "val_accuracy": result.last["val_accuracy"]},
        "seconds": result.seconds,
        "teacher": teacher.summary if teacher else None,
        "corrupt_images": dict(getattr(data, "corrupt", {})),
        "made_with": _versions(device),
    }
    if distributed.is_first():
        write_json(folder / "summary.json", summary)
    return summary


def comparison_key(recipe: Recipe, data: Data) -> str:
    """Equal for runs that differ in method, teacher or seed only, so that their results can be compared."""
    train = _what_matters(recipe.train, _NO_MATTER)
    return _hash([data.fingerprint, recipe.student.model_dump(), train])


# Of a run's results: where and how it is computed, and what is written.
_NO_MATTER = {
    "seed", "device", "threads", "teacher_precision", "channels_last", "compile", "accumulate",
    "nonfinite", "log_every", "checkpoint_every", "keep_every", "tensorboard", "val_batch_size",
}  # fmt: skip
# Left out where they are at their defaults: runs made before there were such settings are still the same.
_LATER = {"warmup_epochs": 0.0, "sync_batchnorm": False, "ema": None}


def _what_matters(config: Optimization, leave_out: set[str]) -> dict[str, Any]:
    values = config.model_dump(exclude=leave_out)
    return {key: value for key, value in values.items() if key not in _LATER or value != _LATER[key]}


def load_given_teacher(
    config: Teacher, data: Data, device: torch.device, console: Console
) -> TeacherInUse | None:
    if config.checkpoint is None and config.weights is None:
        return None
    if config.weights is not None:
        model, notes = torchvision_network(
            config.name,
            config.weights,
            num_classes=data.num_classes,
            size=data.example()[0].shape[-1],
        )
        for note in notes:
            console.print(f"teacher: {note}", markup=False)
        measured = _accuracy(config, model, data, device)
        return TeacherInUse(model, {"checkpoint": config.weights, "val_accuracy": measured})
    model = build_network(config, data)
    assert config.checkpoint is not None
    path = Path(config.checkpoint)
    facts = load_weights(
        model,
        path,
        num_classes=data.num_classes,
        remedy="teacher.checkpoint must be of this architecture and data; leave it out to train a teacher",
    )
    accuracy = facts.get("val_accuracy")
    if facts.get("data") != _hash(data.fingerprint) or accuracy is None:
        accuracy = _accuracy(config, model, data, device)
    return TeacherInUse(model, {"checkpoint": str(path), "val_accuracy": accuracy})


def _accuracy(config: Teacher, model: nn.Module, data: Data, device: torch.device) -> float:
    what, loader = (
        f"teacher {config.name} on the validation images",
        data.val_loader(device, config.batch_size),
    )
    accuracy: float = tried(what, evaluate, model.to(device), loader, device=device)[0]
    return accuracy


def find_teacher(
    config: Teacher, data: Data, runs: Path, device: torch.device, console: Console
) -> TeacherInUse:
    """The teacher of a recipe, trained if it must be. Raises ``TrainError``."""
    return load_given_teacher(config, data, device, console) or own_teacher(
        config, data, runs, device, console
    )


def _open_cache(recipe: Recipe, data: Data) -> TeacherCache | None:
    if recipe.teacher is None or recipe.teacher.cache is None:
        return None
    cache = TeacherCache(Path(recipe.teacher.cache))
    cache.check_fits(wanted_facts(recipe, data))
    return cache


def _cached_summary(cache: TeacherCache) -> dict[str, Any]:
    return {"checkpoint": f"cache {cache.folder}", "val_accuracy": cache.facts["val_accuracy"]}


def _settings_of(config: Teacher) -> dict[str, Any]:
    return _what_matters(config, {"checkpoint", "weights", "cache"})


def _key_of(config: Teacher, data: Data) -> str:
    return _hash([data.fingerprint, _settings_of(config)])


def _teacher_hash(
    recipe: Recipe, data: Data, teacher: TeacherInUse | None, cache: TeacherCache | None
) -> str | None:
    """Tells one teacher from another, one that is yet to be trained too."""
    if cache is not None:
        return _hash(cache.facts)
    if teacher is not None:
        return fingerprint(teacher.model)
    return None if recipe.teacher is None else _key_of(recipe.teacher, data)


def _read_state(folder: Path, role: str, console: Console) -> dict[str, Any] | None:
    return read_resume_state(
        folder, lambda text: console.print(f"{role}: {text}", markup=False, soft_wrap=True)
    )


def own_teacher(
    config: Teacher, data: Data, runs: Path, device: torch.device, console: Console
) -> TeacherInUse:
    """The teacher of this data and configuration: read, gone on with, or trained."""
    # The hash holds all that determines the weights: other data never meet this teacher.
    settings, key = _settings_of(config), _key_of(config, data)
    label = config.name.replace("/", "-") + (f"-{config.width}" if config.width else "")
    folder = runs / "teachers" / f"{label}-{key}"
    path = folder / "teacher.pt"
    torch.manual_seed(config.seed)
    model = build_network(config, data)
    if not distributed.from_first(path.exists()):
        make_folder(folder)
        facts = {"name": "teacher", "settings": settings, "data": data.describe()}
        with _owned(folder):
            if distributed.is_first():
                write_json(folder / "run.json", facts)
            result = _fit_in_folder(
                folder,
                "teacher",
                CrossEntropy(model.to(device)),
                config,
                data,
                device,
                console,
                title=f"teacher {label}",
                resume=_read_state(folder, "teacher", console),
            )
            # The last epoch, not the best: picking by validation accuracy would flatter the teacher.
            content = {
                "model": model.state_dict(),
                "num_classes": data.num_classes,
                "data": _hash(data.fingerprint),
                "val_accuracy": result.last["val_accuracy"],
                "best_val_accuracy": result.best["val_accuracy"],
            }
            if distributed.is_first():
                save_checkpoint(path, content)
        distributed.barrier()
    facts = load_weights(
        model, path, num_classes=data.num_classes, remedy="delete it to have the teacher trained again"
    )
    known: dict[str, Any] = {
        name: facts[name] for name in ("val_accuracy", "best_val_accuracy") if name in facts
    }
    if "val_accuracy" not in known:
        raise TrainError(f"checkpoint {path} lacks its accuracy; delete it to have the teacher trained again")
    return TeacherInUse(model, {"checkpoint": str(path), **known})


def _fit_in_folder(
    folder: Path,
    role: str,
    method: Method,
    optimization: Optimization,
    data: Data,
    device: torch.device,
    console: Console,
    *,
    title: str,
    resume: dict[str, Any] | None,
    known_as: dict[str, Any] | None = None,
    teacher_accuracy: float | None = None,
    cache: TeacherCache | None = None,
) -> FitResult:
    """Train with one method, from ``resume`` if there is such a state; ``known_as`` goes into the next ones.

    A teacher's section says nothing of how to compute: it is trained in float32, saved after every epoch.
    """
    train = optimization if isinstance(optimization, Train) else Train(epochs=optimization.epochs)
    train_loader: Any = data.train_loader(optimization.batch_size, optimization.seed, device)
    if cache is not None:
        train_loader = CachedLoader(train_loader, cache)
    optimizer = build_optimizer(method, optimization)
    if resume is not None:
        console.print(f"{role}: going on after {_reached(resume)} of {optimization.epochs}")
    watcher = Watcher()
    if distributed.is_first():
        watcher = RunRecorder(
            folder,
            _shown(folder, role, console, tensorboard=train.tensorboard),
            facts={
                "num_classes": data.num_classes,
                "data": _hash(data.fingerprint),
                "input": list(data.example()[0].shape[1:]),
            },
            title=title,
            teacher_accuracy=teacher_accuracy,
            keep_every=train.keep_every,
            known_as=known_as or {},
            history=resume["history"] if resume else (),
        )
    # The same weights on every rank, but other dropout.
    if distributed.rank():
        torch.manual_seed(optimization.seed + 2**32 * distributed.rank())
    with StopSignals() as stop:
        return fit_method(
            method,
            train_loader,
            data.val_loader(device, train.val_batch_size or optimization.batch_size),
            epochs=optimization.epochs,
            optimizer=optimizer,
            scheduler=build_scheduler(optimizer, optimization, len(train_loader)),
            device=device,
            watcher=watcher,
            resume=resume,
            stop=stop,
            **{name: getattr(train, name) for name in _OF_THE_LOOP},
        )


# Settings of a recipe that are arguments of ``fit_method`` by the same names.
_OF_THE_LOOP = (
    "clip_norm", "precision", "teacher_precision", "channels_last", "compile", "accumulate", "ema",
    "nonfinite", "log_every", "checkpoint_every",
)  # fmt: skip


def _reached(state: dict[str, Any]) -> str:
    position = state.get("position")
    step = f"step {position['meter']['steps']} of epoch {len(state['history']) + 1}" if position else None
    return step or f"epoch {len(state['history'])}"


def _shown(folder: Path, role: str, console: Console, *, tensorboard: bool) -> Watcher:
    shown = ConsoleProgress(role, console)
    # Each by itself: without TensorBoard the console goes on.
    return TensorBoard(folder / "tensorboard", Shielded(shown)) if tensorboard else Shielded(shown)


def _hash(content: Any) -> str:
    return digest_of(content)[:12]


def _versions(device: torch.device) -> dict[str, str]:
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": f"{device.type}: {where}",
        "threads": str(torch.get_num_threads()),
    }
