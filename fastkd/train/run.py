"""From a recipe to a finished run: data, teacher, student, results."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from fastkd.models import build_model

from .checkpoint import load_weights, save_checkpoint
from .console import ConsoleProgress
from .errors import NonFiniteLossError, RecipeError, TrainError
from .glyph_data import GlyphData, load_glyph_data
from .loop import FitResult, evaluate, fit
from .objective import build_objective
from .recipe import CrossEntropy, Model, Optimization, Recipe, Teacher
from .run_folder import RunRecorder, create_run_folder, read_resume_state, write_json, write_recipe


class Stopped(KeyboardInterrupt):
    """Ctrl-C after a run folder was made; ``folder`` is what ``--resume`` takes."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder


@dataclass(frozen=True)
class _TeacherInUse:
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
        data = load_glyph_data(recipe.data)
        console.print(f"data: {data.describe()}", markup=False)
        for note in data.glyphs.notes:
            console.print(f"  {note}", markup=False)
        # An unusable checkpoint must be found before anything is trained or written.
        teacher = _load_given_teacher(recipe.teacher, data, device) if recipe.teacher else None
        if folder is None:
            folder = create_run_folder(runs, name)
        write_recipe(folder, name, recipe)
        if recipe.teacher is not None and teacher is None:
            teacher = _own_teacher(recipe.teacher, data, runs, device, console)
        if teacher is not None:
            accuracy, path = teacher.summary["val_accuracy"], teacher.summary["checkpoint"]
            console.print(f"teacher: {accuracy:.2%}, {path}", markup=False)
        summary = _distil(name, recipe, data, teacher, folder, device, console)
    except KeyboardInterrupt:
        if folder is None:
            raise
        raise Stopped(folder) from None
    except NonFiniteLossError as error:
        raise NonFiniteLossError(f"{error}; the run folder {folder} keeps the epochs before") from None
    return {**summary, "folder": str(folder)}


def _distil(
    name: str,
    recipe: Recipe,
    data: GlyphData,
    teacher: _TeacherInUse | None,
    folder: Path,
    device: torch.device,
    console: Console,
) -> dict[str, Any]:
    """Train the student and write the summary."""
    result = _fit_in_folder(
        folder,
        "student",
        recipe.student,
        recipe.train,
        data,
        device,
        console,
        teacher=teacher.model if teacher else None,
        objective=build_objective(recipe.loss),
        precision=recipe.train.precision,
        title=f"{name}, seed {recipe.train.seed}",
        teacher_accuracy=teacher.summary["val_accuracy"] if teacher else None,
    )
    summary = {
        "name": name,
        "loss": recipe.loss.name,
        "seed": recipe.train.seed,
        "comparison": comparison_key(recipe, data),
        "num_classes": data.num_classes,
        "best": {"epoch": result.best["epoch"], "val_accuracy": result.best["val_accuracy"]},
        "last": {"epoch": result.last["epoch"], "val_accuracy": result.last["val_accuracy"]},
        "seconds": result.seconds,
        "teacher": teacher.summary if teacher else None,
        "made_with": _versions(device),
    }
    write_json(folder / "summary.json", summary)
    return summary


def resolve_device(name: str) -> torch.device:
    """``auto`` is a CUDA device if there is one. Raises ``RecipeError`` for one that cannot be used."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except Exception as error:  # each backend raises its own kind
        reason = str(error).strip().splitlines()[0]
        raise RecipeError(f"train.device = {name!r} cannot be used here: {reason}") from None
    return device


def comparison_key(recipe: Recipe, data: GlyphData) -> str:
    """Equal for runs that differ in loss, teacher or seed only, so that their results can be compared."""
    train = recipe.train.model_dump(exclude={"seed", "device", "threads"})
    return _hash([data.fingerprint, recipe.student.model_dump(), train])


def _load_given_teacher(config: Teacher, data: GlyphData, device: torch.device) -> _TeacherInUse | None:
    if config.checkpoint is None:
        return None
    model = _build(config, data)
    path = Path(config.checkpoint)
    facts = load_weights(
        model,
        path,
        num_classes=data.num_classes,
        remedy="teacher.checkpoint must be of this architecture and data; leave it out to train a teacher",
    )
    accuracy = facts.get("val_accuracy")
    if facts.get("data") != _hash(data.fingerprint) or accuracy is None:
        model.to(device)
        accuracy, _ = evaluate(model, data.val_loader(device), device=device)
    return _TeacherInUse(model, {"checkpoint": str(path), "val_accuracy": accuracy})


def _own_teacher(
    config: Teacher, data: GlyphData, runs: Path, device: torch.device, console: Console
) -> _TeacherInUse:
    """The teacher of this data and configuration: read, gone on with, or trained."""
    # The hash holds all that determines the weights: other data never meet this teacher.
    settings = config.model_dump(exclude={"checkpoint"})
    key = _hash([data.fingerprint, settings])
    folder = runs / "teachers" / f"{config.name}-{config.width}-{key}"
    path = folder / "teacher.pt"
    model = _build(config, data)
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "run.json", {"name": "teacher", "settings": settings, "data": data.describe()})
        result = _fit_in_folder(
            folder,
            "teacher",
            config,
            config,
            data,
            device,
            console,
            objective=build_objective(CrossEntropy(name="cross_entropy")),
            title=f"teacher {config.name}, width {config.width}",
            model=model,
        )
        # The last epoch, not the best: picking by validation accuracy would flatter the teacher.
        save_checkpoint(
            path,
            {
                "model": model.state_dict(),
                "num_classes": data.num_classes,
                "data": _hash(data.fingerprint),
                "val_accuracy": result.last["val_accuracy"],
                "best_val_accuracy": result.best["val_accuracy"],
            },
        )
    facts = load_weights(
        model, path, num_classes=data.num_classes, remedy="delete it to have the teacher trained again"
    )
    known: dict[str, Any] = {
        name: facts[name] for name in ("val_accuracy", "best_val_accuracy") if name in facts
    }
    if "val_accuracy" not in known:
        raise TrainError(f"checkpoint {path} lacks its accuracy; delete it to have the teacher trained again")
    return _TeacherInUse(model, {"checkpoint": str(path), **known})


def _fit_in_folder(
    folder: Path,
    role: str,
    network: Model,
    optimization: Optimization,
    data: GlyphData,
    device: torch.device,
    console: Console,
    *,
    objective: nn.Module,
    title: str,
    teacher: nn.Module | None = None,
    model: nn.Module | None = None,
    precision: str = "float32",
    teacher_accuracy: float | None = None,
) -> FitResult:
    """Train one network, going on from the folder's last checkpoint if there is one."""
    resume = read_resume_state(folder)
    # Seeded here, so that a student does not depend on whether its teacher was trained or read.
    torch.manual_seed(optimization.seed)
    fresh = _build(network, data)
    if model is None:
        model = fresh
    else:
        model.load_state_dict(fresh.state_dict())
    model.to(device)
    train_loader = data.train_loader(optimization.batch_size, optimization.seed, device)
    # Fused: one kernel over all parameters; the large linear layer makes it a tenth of a CPU step otherwise.
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=optimization.lr, weight_decay=optimization.weight_decay, fused=True
    )
    recorder = RunRecorder(
        folder,
        ConsoleProgress(role, console),
        facts={"num_classes": data.num_classes, "data": _hash(data.fingerprint)},
        title=title,
        teacher_accuracy=teacher_accuracy,
    )
    if resume is not None:
        console.print(f"{role}: going on after epoch {len(resume['history'])} of {optimization.epochs}")
    return fit(
        model,
        teacher,
        train_loader,
        data.val_loader(device),
        loss=objective,
        epochs=optimization.epochs,
        optimizer=optimizer,
        scheduler=_scheduler(optimizer, optimization, len(train_loader)),
        device=device,
        precision=precision,
        watcher=recorder,
        resume=resume,
    )


def _build(config: Model, data: GlyphData) -> nn.Module:
    return build_model(config.name, num_classes=data.num_classes, width=config.width)


def _scheduler(optimizer: torch.optim.Optimizer, config: Optimization, batches: int) -> Any:
    steps = batches * config.epochs
    if config.schedule == "one_cycle":
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=config.lr, total_steps=steps)
    if config.schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    return None


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _versions(device: torch.device) -> dict[str, str]:
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": f"{device.type}: {where}",
        "threads": str(torch.get_num_threads()),
    }
