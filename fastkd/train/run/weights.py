"""Loading a network's weights from checkpoint files of fastkd and of other programs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastkd.data.data import Data
from fastkd.errors import CheckpointError
from fastkd.files.sealed import short_digest_of
from fastkd.messages import other_class
from fastkd.train.state_dicts import COUNTER, fill, is_extra_state

from .checkpoint import load_checkpoint
from .safetensors_file import SUFFIX, read_safetensors

# Where checkpoints keep their state dict: fastkd's, Lightning's, timm's, mmengine's, custom ones.
_WRAPPERS = (
    "model", "state_dict", "student", "model_state_dict", "model_state", "net", "network", "weights",
    "params",
)  # fmt: skip
_LISTED = 20


def load_weights(model: nn.Module, path: Path, *, num_classes: int, remedy: str) -> dict[str, Any]:
    """Load a checkpoint file into ``model``; returns the file's other entries if fastkd wrote it.

    The file is a state dict, or has one under one of the usual names, or is a safetensors file. Its keys may
    have a prefix such as DDP's ``module.`` or Lightning's ``model.``. It is read as plain tensors and values,
    without running code.

    Raises ``CheckpointError`` that lists every missing or unexpected name and every other shape.
    """
    content, facts = _content_of(path, remedy)
    trained_classes = facts.get("num_classes", num_classes)
    if trained_classes != num_classes:
        raise CheckpointError(
            f"checkpoint {path} was trained for {trained_classes} classes, "
            f"but this data set has {num_classes}; {remedy}"
        )
    try:
        weights = state_dict_in(content, model)
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint {path}: {error}") from None
    if weights is None:
        held = ", ".join(map(str, list(content)[:_LISTED])) or "nothing"
        raise CheckpointError(
            f"checkpoint {path} holds no state dict of tensors, bare or under {', '.join(_WRAPPERS)}: it has "
            f"{held}; {remedy}"
        )
    fill(model, weights, f"checkpoint {path}", remedy)
    return {key: value for key, value in facts.items() if key not in _WRAPPERS}


def _content_of(path: Path, remedy: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What holds the state dict, and what the file says of it if fastkd wrote it."""
    if path.suffix == SUFFIX and path.exists():
        about, weights = read_safetensors(path)
        return weights, {} if about is None else about.facts
    content = load_checkpoint(path, remedy=remedy)
    return (as_validated(content), content) if "format" in content else (content, {})


def check_class_names(facts: Mapping[str, Any], path: Path, data: Data, remedy: str) -> None:
    """Raise ``CheckpointError`` if a checkpoint's ``facts``, beside its weights, name other classes.

    A network whose classes have another order fits in every shape, and is wrong for every image.
    """
    names = facts.get("classes")
    # With the same images and labels, other names are new names of the same classes.
    same_data = facts.get("data") == short_digest_of(data.fingerprint)
    if names is None or data.class_names is None or same_data:
        return
    difference = other_class(list(map(str, names)), data.class_names)
    if difference is not None:
        raise CheckpointError(
            f"checkpoint {path} was trained for other classes than this data set's: {difference}; {remedy}"
        )


def averaged_weights(ema: Mapping[str, Any]) -> dict[str, Any]:
    """The student's state dict, from that of its average."""
    return {key.removeprefix("module."): value for key, value in ema.items() if key.startswith("module.")}


def as_validated(content: dict[str, Any]) -> dict[str, Any]:
    """The content of one of fastkd's files; of a state with an average, this is its model."""
    ema = content.get("ema")
    return {**content, _WRAPPERS[0]: averaged_weights(ema)} if ema else content


def state_dict_in(content: Mapping[str, Any], model: nn.Module) -> dict[str, Any] | None:
    """The state dict for ``model`` in a checkpoint's content, without prefixes; None if there is none."""
    for candidate in (*(content.get(key) for key in _WRAPPERS), content):
        if not isinstance(candidate, Mapping) or not candidate:
            continue
        if all(
            isinstance(key, str) and (isinstance(value, Tensor) or is_extra_state(key))
            for key, value in candidate.items()
        ):
            return _without_prefix(_modern(candidate), model)
    return None


def _without_prefix(weights: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Remove the prefix under which most of the model's keys are found.

    If all of them have it, other entries (Lightning's losses or metrics) are dropped.
    """
    expected = {
        key: value.shape
        for key, value in model.state_dict().items()
        if not (key.endswith(COUNTER) or is_extra_state(key))
    }
    named: Counter[str] = Counter()
    fitting: Counter[str] = Counter()
    for key, value in weights.items():
        if is_extra_state(key):
            continue
        parts = key.split(".")
        for n in range(len(parts)):
            name, prefix = ".".join(parts[n:]), "".join(f"{part}." for part in parts[:n])
            named[prefix] += name in expected
            fitting[prefix] += expected.get(name) == value.shape
    whole = sorted(prefix for prefix, count in fitting.items() if count == len(expected))
    if "" in whole or not named:
        return weights
    if len(whole) > 1:
        raise CheckpointError(
            f"it holds {len(whole)} networks of this architecture, under {', '.join(whole)}: save only "
            "the one that is needed"
        )
    if whole:
        (best,) = whole
        return {key.removeprefix(best): value for key, value in weights.items() if key.startswith(best)}
    # Nothing fits completely: use the best prefix, so that errors name the model's keys.
    best = max(named, key=lambda prefix: (named[prefix], -len(prefix)))
    most = 2 * named[best] > len(weights)
    return {key.removeprefix(best) if most else key: value for key, value in weights.items()}


def _modern(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Rename ``norm.1`` in torchvision's published DenseNets to the module's ``norm1``."""
    return {
        re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.(\d)\.", r"\1\2.", k): v for k, v in weights.items()
    }
