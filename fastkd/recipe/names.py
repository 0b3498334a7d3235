"""Names and descriptions of recipes with overrides, so that they describe the actual run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fastkd.distill.method import find_method
from fastkd.distill.options import is_file, options_of
from fastkd.files.paths import user_path

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

# Overrides in a description: "…; with a.b=1, c=2", or "…; glyphs/kd with …" if the method is among them.
_LIST = re.compile(r"; (?:\S+ )?with (?=[a-z_0-9.]+=)")
_NEXT = re.compile(r", (?=[a-z_0-9.]+=)")


def name_of(name: str, changed: Mapping[str, Any]) -> str:
    """``glyphs/kd method=dkd``: the recipe's name and the overrides that contradict it."""
    words = name.split(" ")
    labels = [word for word in words if word.partition("=")[0] in _NAMING and "=" in word]
    parts = dict(label.split("=", 1) for label in labels)
    parts |= {key: str(changed[key]) for key in _NAMING if key in changed}
    kept = [word for word in words if word not in labels]
    return " ".join([*kept, *(f"{key}={value}" for key, value in parts.items())])


def _listed(shown: Mapping[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in shown.items())


def _is_aside(key: str, value: Any, method: str) -> bool:
    """Whether the override says where or how, not what."""
    if key in _ASIDE or (isinstance(value, str) and user_path(value).is_absolute()):
        return True
    option = options_of(find_method(method)).get(key.removeprefix("method."))
    return key.startswith("method.") and option is not None and is_file(option.annotation)


def description_of(name: str, description: str, method: str, changed: Mapping[str, Any]) -> str:
    """The recipe's ``description``, or that of ``method`` if it was overridden, and the other overrides.

    A description that lists overrides already, as in a run's folder, gets one list of both.
    """
    shown = {key: dump_scalar(value) for key, value in changed.items() if not _is_aside(key, value, method)}
    if not shown:
        return description
    if "method" not in shown:
        if (listed := _LIST.search(description)) is None:
            return f"{description}; with {_listed(shown)}"
        before = dict(pair.split("=", 1) for pair in _NEXT.split(description[listed.end() :]))
        return description[: listed.end()] + _listed(before | shown)
    document = (find_method(method).__doc__ or "").strip().partition("\n")[0].rstrip(".")
    return f"{document or method}; {name.partition(' ')[0]} with {_listed(shown)}"
