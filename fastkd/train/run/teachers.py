"""The teacher of a recipe: from a file, from torchvision, from an earlier run, or trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from fastkd.data.data import Data
from fastkd.distill import CrossEntropy
from fastkd.errors import TrainError
from fastkd.files.atomic import make_folder
from fastkd.files.sealed import short_digest_of
from fastkd.recipe.sections import Optimization, Recipe, Teacher
from fastkd.train import distributed
from fastkd.train.evaluation import ACCURACIES, evaluate_rows
from fastkd.train.random_state import seed_generators

from .build import build_network, tried
from .cache_stores import TopKStore
from .checkpoint import save_checkpoint
from .fitting import fit_in_folder, owned, read_state
from .folder import write_json
from .resume import fingerprint
from .teacher_cache import TeacherCache, top_k_temperature, wanted_facts
from .torchvision_weights import torchvision_network
from .weights import check_class_names, load_weights


@dataclass(frozen=True)
class TeacherInUse:
    """A trained teacher and its summary."""

    model: nn.Module
    summary: dict[str, Any]  # checkpoint, ACCURACIES (last epoch), best_val_accuracy if known


def described(teacher: TeacherInUse) -> str:
    """Accuracy and origin, for a line of text."""
    top5 = teacher.summary.get("val_top5_accuracy")
    parts = [f"{teacher.summary['val_accuracy']:.2%}", "" if top5 is None else f"top-5 {top5:.2%}"]
    return ", ".join(part for part in (*parts, teacher.summary["checkpoint"]) if part)


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
            console.print(f"teacher: {note}")
        return TeacherInUse(model, {"checkpoint": config.weights, **_accuracies(config, model, data, device)})
    model = build_network(config, data)
    assert config.checkpoint is not None
    path = Path(config.checkpoint)
    remedy = "teacher.checkpoint must be of this architecture and data; leave it out to train a teacher"
    facts = load_weights(model, path, num_classes=data.num_classes, remedy=remedy)
    check_class_names(facts, path, data, remedy)
    known = {key: facts[key] for key in ACCURACIES if facts.get(key) is not None}
    if facts.get("data") != short_digest_of(data.fingerprint) or "val_accuracy" not in known:
        known = _accuracies(config, model, data, device)
    return TeacherInUse(model, {"checkpoint": str(path), **known})


def _accuracies(config: Teacher, model: nn.Module, data: Data, device: torch.device) -> dict[str, float]:
    what = f"teacher {config.name} on the validation images"
    loader = data.val_loader(device, config.batch_size)
    record = tried(what, evaluate_rows, model.to(device), loader, device=device).record()
    return {key: record[key] for key in ACCURACIES if key in record}


def find_teacher(
    config: Teacher, data: Data, runs: Path, device: torch.device, console: Console
) -> TeacherInUse:
    """The teacher of a recipe, trained if necessary. Raises ``TrainError``."""
    return load_given_teacher(config, data, device, console) or own_teacher(
        config, data, runs, device, console
    )


def _settings_of(config: Teacher) -> dict[str, Any]:
    return relevant_settings(config, {"checkpoint", "weights", "cache"})


def _key_of(config: Teacher, data: Data) -> str:
    return short_digest_of([data.fingerprint, _settings_of(config)])


# Omitted at their defaults, so that hashes equal those of versions without these settings.
_LATER = {"warmup_epochs": 0.0, "sync_batchnorm": False, "ema": None}


def relevant_settings(config: Optimization, leave_out: set[str]) -> dict[str, Any]:
    values = config.model_dump(exclude=leave_out)
    return {key: value for key, value in values.items() if key not in _LATER or value != _LATER[key]}


def teacher_hash(
    recipe: Recipe, data: Data, teacher: TeacherInUse | None, cache: TeacherCache | None
) -> str | None:
    """Identifies the teacher, even one that is not trained yet."""
    if cache is not None:
        return short_digest_of(cache.facts)
    if teacher is not None:
        return fingerprint(teacher.model)
    return None if recipe.teacher is None else _key_of(recipe.teacher, data)


def label_of(config: Teacher) -> str:
    return config.name.replace("/", "-") + (f"-{config.width}" if config.width else "")


def folder_of(config: Teacher, data: Data, runs: Path) -> Path:
    """Where a trained teacher is stored; ``teacher.pt`` is there once it is trained."""
    # The hash covers everything that determines the weights, so other data cannot get this teacher.
    return runs / "teachers" / f"{label_of(config)}-{_key_of(config, data)}"


def own_teacher(
    config: Teacher, data: Data, runs: Path, device: torch.device, console: Console
) -> TeacherInUse:
    """The teacher of this data and configuration: loaded, resumed or trained."""
    settings, label = _settings_of(config), label_of(config)
    folder = folder_of(config, data, runs)
    path = folder / "teacher.pt"
    seed_generators(config.seed)
    model = build_network(config, data)
    if not distributed.from_first(path.exists()):
        make_folder(folder)
        facts = {"name": "teacher", "settings": settings, "data": data.describe()}
        with owned(folder):
            if distributed.is_first():
                write_json(folder / "run.json", facts)
            result = fit_in_folder(
                folder,
                "teacher",
                CrossEntropy(model.to(device)),
                config,
                data,
                device,
                console,
                title=f"teacher {label}",
                resume=read_state(folder, "teacher", console),
            )
            # The last epoch, not the best: selecting by validation accuracy would be biased.
            content = {
                "model": model.state_dict(),
                "num_classes": data.num_classes,
                "data": short_digest_of(data.fingerprint),
                "classes": None if data.class_names is None else list(data.class_names),
                **{key: result.last[key] for key in ACCURACIES if key in result.last},
                "best_val_accuracy": result.best["val_accuracy"],
            }
            if distributed.is_first():
                save_checkpoint(path, content)
        distributed.barrier()
    facts = load_weights(
        model, path, num_classes=data.num_classes, remedy="delete it to have the teacher trained again"
    )
    known: dict[str, Any] = {
        name: facts[name] for name in (*ACCURACIES, "best_val_accuracy") if name in facts
    }
    if "val_accuracy" not in known:
        raise TrainError(f"checkpoint {path} lacks its accuracy; delete it to have the teacher trained again")
    return TeacherInUse(model, {"checkpoint": str(path), **known})


def open_cache(recipe: Recipe, data: Data, device: torch.device) -> TeacherCache | None:
    if recipe.teacher is None or recipe.teacher.cache is None:
        return None
    cache = TeacherCache(Path(recipe.teacher.cache))
    wanted = wanted_facts(recipe, data, device)
    if isinstance(cache.store, TopKStore):
        wanted["temperature"] = top_k_temperature(recipe)
    cache.check_fits(wanted)
    return cache


def cached_teacher(cache: TeacherCache) -> TeacherInUse:
    summary = {"checkpoint": f"cache {cache.folder}", "val_accuracy": cache.facts["val_accuracy"]}
    return TeacherInUse(cache.teacher(), summary)
