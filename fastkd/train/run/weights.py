"""Weights of a network from a file or from torchvision, checked name by name before they are used."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastkd.errors import CheckpointError
from fastkd.train.state_dicts import COUNTER, fill

from .checkpoint import load_checkpoint

# Where checkpoints keep their state dict: fastkd's, Lightning's, timm's, mmengine's, people's own.
_WRAPPERS = (
    "model", "state_dict", "student", "model_state_dict", "model_state", "net", "network", "weights",
    "params",
)  # fmt: skip
_LISTED = 20


def load_weights(model: nn.Module, path: Path, *, num_classes: int, remedy: str) -> dict[str, Any]:
    """Fill ``model`` from a checkpoint file; returns the file's other entries if it is fastkd's.

    The file is a state dict, bare or under one of the usual names, its keys with or without a prefix such as
    DDP's ``module.`` and Lightning's ``model.``. It is read as plain tensors and values: code in it is
    refused, not run.

    Raises ``CheckpointError`` that lists every name that is missing, too many or of another shape.
    """
    content = load_checkpoint(path, remedy=remedy)
    facts = content if "format" in content else {}
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


def state_dict_in(content: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor] | None:
    """The state dict of ``model`` in a checkpoint's content, without prefixes; None if there is none."""
    for candidate in (*(content.get(key) for key in _WRAPPERS), content):
        if not isinstance(candidate, Mapping) or not candidate:
            continue
        if all(isinstance(key, str) and isinstance(value, Tensor) for key, value in candidate.items()):
            return _without_prefix(_modern(candidate), model)
    return None


def _without_prefix(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Keys as the model's: without the prefix under which most of them are found.

    Where that is all of the model, other entries (Lightning's of a loss or a metric) are left out.
    """
    expected = {key: v.shape for key, v in model.state_dict().items() if not key.endswith(COUNTER)}
    named: Counter[str] = Counter()
    fitting: Counter[str] = Counter()
    for key, value in weights.items():
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
            f"it holds {len(whole)} networks of this architecture, under {', '.join(whole)}: save the one "
            "that is meant alone"
        )
    if whole:
        (best,) = whole
        return {key.removeprefix(best): value for key, value in weights.items() if key.startswith(best)}
    # What does not fit is told by the model's names, where most of the file has them under one prefix.
    best = max(named, key=lambda prefix: (named[prefix], -len(prefix)))
    most = 2 * named[best] > len(weights)
    return {key.removeprefix(best) if most else key: value for key, value in weights.items()}


def _modern(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's published DenseNets have ``norm.1`` where the module is ``norm1``."""
    return {
        re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.(\d)\.", r"\1\2.", k): v for k, v in weights.items()
    }
