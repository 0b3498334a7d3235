"""What a recipe with overrides is called: its name and description must not tell of another run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastkd.distill.method import find_method

from .files import dump_scalar

# What a recipe is named after.
_NAMING = ("method", "student.name", "teacher.name")
# Where data lie and how a run is computed: nothing that a description tells of.
_ASIDE = {
    "data.root", "data.folder", "data.fonts", "data.download", "data.workers", "data.corrupt_limit",
    "teacher.checkpoint", "teacher.cache", "train.device", "train.threads", "train.channels_last",
    "train.compile", "train.accumulate", "train.log_every", "train.checkpoint_every", "train.keep_every",
    "train.tensorboard", "train.val_batch_size",
}  # fmt: skip


def name_of(name: str, changed: Mapping[str, Any]) -> str:
    """``glyphs/kd method=dkd``: the recipe's name, and what of its name no longer holds."""
    words = name.split(" ")
    labels = [word for word in words if word.partition("=")[0] in _NAMING and "=" in word]
    parts = dict(label.split("=", 1) for label in labels)
    parts |= {key: str(changed[key]) for key in _NAMING if key in changed}
    kept = [word for word in words if word not in labels]
    return " ".join([*kept, *(f"{key}={value}" for key, value in parts.items())])


def description_of(name: str, description: str, method: str, changed: Mapping[str, Any]) -> str:
    """The recipe's ``description``, or that of ``method`` where it is another, and what was changed."""
    told = {key: value for key, value in changed.items() if key not in _ASIDE}
    if not told:
        return description
    listed = ", ".join(f"{key}={dump_scalar(value)}" for key, value in told.items())
    if "method" not in told:
        return f"{description}; with {listed}"
    document = (find_method(method).__doc__ or "").strip().partition("\n")[0].rstrip(".")
    return f"{document or method}; {name.partition(' ')[0]} with {listed}"
