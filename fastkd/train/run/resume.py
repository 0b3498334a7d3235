"""Finds the run of a recipe, and checks whether a run can be resumed with one: by comparing recipes."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastkd.distill import find_method
from fastkd.distill.options import is_file, options_of
from fastkd.errors import CheckpointError, RecipeError
from fastkd.files.regular import read_regular
from fastkd.recipe.files import dump_flat_yaml, parse_flat_yaml
from fastkd.recipe.schema import SECTIONS, load_recipe
from fastkd.recipe.sections import Recipe, Teacher, Train
from fastkd.train.state_dicts import is_extra_state

from .folder import folders_of


def identity(recipe: Recipe, data: str, teacher: str | None) -> dict[str, Any]:
    """Stored in states to identify the run; ``data`` and ``teacher`` are hashes of their contents."""
    return {"recipe": recipe.flat(), "data": data, "teacher": teacher}


# Settings of `train` that may change: where a run is computed and what is written; and how it is computed, in
# which two runs of a recipe may be meant to differ. Data and teacher are compared by content, not by path.
_PLACE = {
    "device", "threads", "log_every", "checkpoint_every", "keep_every", "tensorboard", "csv", "wandb"
}  # fmt: skip
_FREE = _PLACE | {"channels_last", "compile", "accumulate", "nonfinite", "epochs"}
# With these schedules the learning rate of every step depends on the number of steps.
_SPREAD = ("one_cycle", "cosine")


def find_run(runs: Path, name: str, recipe: Recipe) -> tuple[Path | None, str]:
    """The newest run folder of this recipe, finished or not, and "".

    If there is none: None, and in what the newest run of that name differs.
    """
    is_ = parse_flat_yaml(dump_flat_yaml(recipe.flat()), "this recipe")
    place = {"data.workers", *(f"train.{key}" for key in _PLACE)}
    nearest = ""
    for _, folder in sorted(folders_of(runs, name).items(), reverse=True):
        with contextlib.suppress(OSError, UnicodeDecodeError, RecipeError):
            was = parse_flat_yaml(read_regular(folder / "recipe.yaml").decode(), "a run")
            found = _differences(was, is_, SECTIONS, recipe)
            found = [text for text in found if text.partition(":")[0] not in place]
            if not found:
                return folder, ""
            nearest = nearest or f"{folder} differs in {'; '.join(found)}"
    return None, nearest


def check_recipe(state: Mapping[str, Any], now: Mapping[str, Any], recipe: Recipe, folder: Path) -> list[str]:
    """Compare a state of ``folder`` with the present ``identity(…)``; returns notes on differences.

    Raises ``CheckpointError`` that names every other difference.
    """
    was, is_ = state.get("recipe"), now["recipe"]
    if was is None and (folder / "recipe.yaml").is_file():  # written by a version without it
        was = load_recipe(str(folder / "recipe.yaml"))[1].flat()
    if not isinstance(was, dict):
        return []
    refused: list[str] = []
    for section in ("data", "teacher"):
        if section not in state or state[section] != now[section]:
            keys = _differences(was, is_, (section,), recipe)
            unnamed = [f"{section}: its content has changed"] if section in state else []
            refused += keys or unnamed
    free = {f"train.{name}" for name in _FREE}
    free |= {name for name in _files(recipe) if None not in (was.get(name), is_.get(name))}
    refused += [
        text
        for text in _differences(was, is_, ("student", "method", "train"), recipe)
        if text.partition(":")[0] not in free
    ]
    before, after = was.get("train.epochs"), is_["train.epochs"]
    if before != after and (reason := _cannot_extend(state, recipe)) is not None:
        refused.append(f"train.epochs: {before} → {after} ({reason})")
    if refused:
        raise CheckpointError(
            f"{folder} cannot be resumed with another recipe: {'; '.join(refused)}; "
            "start a new run for it, without --resume"
        )
    return [f"train.epochs: {before} → {after}"] if before != after else []


def _files(recipe: Recipe) -> set[str]:
    """The files that its method reads, such as trained heads. What was read is in the state."""
    options = options_of(find_method(recipe.method)).items()
    return {f"method.{name}" for name, option in options if is_file(option.annotation)}


def _cannot_extend(state: Mapping[str, Any], recipe: Recipe) -> str | None:
    trained = len(state["history"]) + bool(state.get("position"))
    if recipe.train.epochs < trained:
        return f"{trained} are already trained or started"
    if recipe.train.schedule in _SPREAD:
        return (
            f"train.schedule {recipe.train.schedule} is spread over all epochs, so that the "
            "epochs trained so far would have had other learning rates; constant and steps can be extended"
        )
    return None


def _differences(
    was: Mapping[str, Any], is_: Mapping[str, Any], sections: tuple[str, ...], recipe: Recipe
) -> list[str]:
    defaults = _defaults(recipe)
    found = []
    for key in dict.fromkeys((*was, *is_)):
        if key.partition(".")[0] not in sections:
            continue
        before, after = was.get(key), is_.get(key)
        # A setting that did not exist when the state was written is equal to its default.
        if before != after and not (key not in was and after == defaults.get(key)):
            found.append(f"{key}: {_shown(before)} → {_shown(after)}")
    return found


def _defaults(recipe: Recipe) -> dict[str, Any]:
    sections: dict[str, type[Any]] = {
        "data": type(recipe.data),
        "student": type(recipe.student),
        "teacher": Teacher,
        "train": Train,
    }
    defaults = {
        f"{name}.{key}": field.default
        for name, section in sections.items()
        for key, field in section.model_fields.items()
    }
    options = options_of(find_method(recipe.method))
    return defaults | {f"method.{key}": option.default for key, option in options.items()}


def _shown(value: object) -> str:
    return "not set" if value is None else str(value)


def fingerprint(model: nn.Module) -> str:
    """A hash of a network's weights."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if is_extra_state(name):  # no weights, and it may change as the network runs
            continue
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:12]
