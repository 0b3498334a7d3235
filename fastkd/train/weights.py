"""Weights of a network from a file or from torchvision, checked name by name before they are used."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import load_checkpoint
from .errors import CheckpointError

_WRAPPERS = ("model", "state_dict", "student")  # where checkpoints keep their state dict
_PREFIXES = ("module.", "_orig_mod.")  # of DDP and torch.compile
_LISTED = 20


def load_weights(model: nn.Module, path: Path, *, num_classes: int, remedy: str) -> dict[str, Any]:
    """Fill ``model`` from a checkpoint file; returns the file's other entries if it is fastkd's.

    The file is a state dict, bare or under ``model`` or ``state_dict``, its names with or without
    ``module.``. It is read as plain tensors and values: code in it is refused, not run.

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
    weights = state_dict_in(content)
    if weights is None:
        raise CheckpointError(f"checkpoint {path} holds no state dict of tensors; {remedy}")
    fill(model, weights, f"checkpoint {path}", remedy)
    return {key: value for key, value in facts.items() if key not in _WRAPPERS}


def load_torchvision_weights(model: nn.Module, name: str, weights: str, *, num_classes: int) -> None:
    """Fill torchvision's network ``name`` with its published ``weights``, such as "IMAGENET1K_V1".

    They are downloaded once, to torch.hub's folder. Raises ``CheckpointError``.
    """
    from torchvision import models

    member = weights.rpartition(".")[2]
    known = models.get_model_weights(name.removeprefix("torchvision/"))
    if member not in known.__members__:
        raise CheckpointError(
            f"teacher.weights = {weights!r}: {name} has no such weights; "
            f"there are {', '.join(known.__members__) or 'none'}"
        )
    entry = known[member]
    categories = len(entry.meta["categories"])
    if categories != num_classes:
        raise CheckpointError(
            f"teacher.weights = {weights}: they are for {categories} classes, but this data set has "
            f"{num_classes}; teacher.weights=null trains a teacher, teacher.checkpoint=FILE loads another"
        )
    try:
        state = entry.get_state_dict(progress=False, check_hash=True, weights_only=True, map_location="cpu")
    except OSError as error:  # URLError is one
        raise CheckpointError(
            f"teacher.weights = {weights}: {entry.url} cannot be fetched ({error}); "
            "fetch it by other means and give it as teacher.checkpoint=FILE"
        ) from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError):
        file = Path(torch.hub.get_dir()) / "checkpoints" / entry.url.rpartition("/")[2]
        raise CheckpointError(
            f"teacher.weights = {weights}: {file} is damaged or holds more than tensors; "
            "delete it to have it fetched again"
        ) from None
    fill(model, state, f"{name}'s weights {member}", "torchvision's code and weights differ")


def state_dict_in(content: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """The state dict in a checkpoint's content, without wrappers' prefixes; None if there is none."""
    for candidate in (*(content.get(key) for key in _WRAPPERS), content):
        if not isinstance(candidate, Mapping) or not candidate:
            continue
        if all(isinstance(key, str) and isinstance(value, Tensor) for key, value in candidate.items()):
            return _without_prefixes(candidate)
    return None


def _without_prefixes(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    weights = dict(weights)
    while (
        prefix := next((p for p in _PREFIXES if all(key.startswith(p) for key in weights)), None)
    ) is not None:
        weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    return weights


def fill(model: nn.Module, weights: Mapping[str, Tensor], origin: str, remedy: str) -> None:
    """``load_state_dict``, with a ``CheckpointError`` that names ``origin`` and all that does not fit."""
    expected = model.state_dict()
    shapes = [
        f"{key} has shape {list(weights[key].shape)}, expected {list(value.shape)}"
        for key, value in expected.items()
        if key in weights and weights[key].shape != value.shape
    ]
    faults = {
        "missing": [key for key in expected if key not in weights],
        "not in this model": [key for key in weights if key not in expected],
        "of another shape": shapes,
        "no plain tensors of the kind expected": [
            f"{key} is {kind}"
            for key, value in weights.items()
            if key in expected and (kind := _other_kind(value, expected[key])) is not None
        ],
    }
    listed = [f"{len(names)} {fault}: {_listed(names)}" for fault, names in faults.items() if names]
    if listed:
        raise CheckpointError(f"{origin} does not fit the model: {'; '.join(listed)}; {remedy}")
    model.load_state_dict(weights)


def _other_kind(value: Tensor, expected: Tensor) -> str | None:
    """Why ``value`` cannot be copied as what it means: torch would fail, or convert it in silence."""
    if value.is_meta:
        return "without content (meta)"
    if value.is_quantized:
        return f"quantised ({str(value.dtype).removeprefix('torch.')})"
    if value.layout != torch.strided or value.is_nested:
        return f"sparse ({str(value.layout).removeprefix('torch.')})"
    if expected.is_floating_point() and not value.is_floating_point():
        return f"of {str(value.dtype).removeprefix('torch.')}"
    return None


def _listed(names: list[str]) -> str:
    more = f" (and {len(names) - _LISTED} more)" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
