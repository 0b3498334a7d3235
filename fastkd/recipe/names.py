"""Names and descriptions of recipes with overrides, so that they describe the actual run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastkd.distill.method import find_method

from .files import dump_scalar

# Overrides of these keys become part of the name.
_NAMING = ("method", "student.name", "teacher.name")
# Locations, and how a run is computed: not part of a description.
_ASIDE = {
    "data.root", "data.folder", "data.fonts", "data.download", "data.workers", "data.corrupt_limit",
    "data.decoder",
    "teacher.checkpoint", "teacher.cache", "train.device", "train.threads", "train.channels_last",
    "train.compile", "train.accumulate", "train.log_every", "train.checkpoint_every", "train.keep_every",
    "train.tensorboard", "train.csv", "train.wandb", "train.val_batch_size",
}  # fmt: skip


def name_of(name: str, changed: Mapping[str, Any]) -> str:
    """``glyphs/kd method=dkd``: the recipe's name and the overrides that contradict it."""
    words = name.split(" ")
    labels = [word for word in words if word.partition("=")[0] in _NAMING and "=" in word]
    parts = dict(label.split("=", 1) for label in labels)
    parts |= {key: str(changed[key]) for key in _NAMING if key in changed}
    kept = [word for word in words if word not in labels]
    return " ".join([*kept, *(f"{key}={value}" for key, value in parts.items())])


def description_of(name: str, description: str, method: str, changed: Mapping[str, Any]) -> str:
    """The recipe's ``description``, or that of ``method`` if it was overridden, and the other overrides."""
    shown = {key: value for key, value in changed.items() if key not in _ASIDE}
    if not shown:
        return description
    listed = ", ".join(f"{key}={dump_scalar(value)}" for key, value in shown.items())
    if "method" not in shown:
        return f"{description}; with {listed}"
    document = (find_method(method).__doc__ or "").strip().partition("\n")[0].rstrip(".")
    return f"{document or method}; {name.partition(' ')[0]} with {listed}"
