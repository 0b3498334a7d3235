"""Loading a state dict, checked name by name before anything changes."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.errors import CheckpointError
from fastkd.messages import some

COUNTER = "num_batches_tracked"  # of batch normalisation; torch also loads files without it
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # of GoogLeNet and Inception
_LISTED = 20


def is_extra_state(key: str) -> bool:
    """Whether ``key`` is of what a module's ``get_extra_state`` returns: anything, not only a tensor."""
    return key.rpartition(".")[2] == "_extra_state"


def fill(model: nn.Module, weights: Mapping[str, Any], origin: str, remedy: str) -> None:
    """``load_state_dict``, with a ``CheckpointError`` that names ``origin`` and every mismatch."""
    expected: Any = model.state_dict()
    weights = {**{key: value for key, value in expected.items() if key.endswith(COUNTER)}, **weights}
    if getattr(model, "aux_logits", None) is False:  # build_model leaves auxiliary heads out
        weights = {k: v for k, v in weights.items() if k in expected or not k.startswith(_AUXILIARY)}
    shapes = [
        f"{key} has shape {list(weights[key].shape)}, expected {list(value.shape)}"
        for key, value in expected.items()
        if not is_extra_state(key) and key in weights and weights[key].shape != value.shape
    ]
    faults = {
        "missing": [key for key in expected if key not in weights],
        "not in this model": [key for key in weights if key not in expected],
        "of another shape": shapes,
        "of an unexpected kind": [
            f"{key} is {kind}"
            for key, value in weights.items()
            if key in expected
            and not is_extra_state(key)
            and (kind := _other_kind(value, expected[key])) is not None
        ],
    }
    listed = [f"{len(names)} {fault}: {some(names, _LISTED)}" for fault, names in faults.items() if names]
    if listed:
        raise CheckpointError(f"{origin} does not fit the model: {'; '.join(listed)}; {remedy}")
    # Layers look up their format version there; missing counters have been filled in above.
    # A network may keep and change its extra state, so it gets a copy, as load_state_dict copies tensors.
    weights = OrderedDict((k, copy.deepcopy(v) if is_extra_state(k) else v) for k, v in weights.items())
    weights._metadata = expected._metadata  # type: ignore[attr-defined]
    model.load_state_dict(weights)


def _other_kind(value: Tensor, expected: Tensor) -> str | None:
    """Why ``value`` cannot be copied: torch would fail, or convert it silently."""
    if value.is_meta:
        return "without content (meta)"
    if value.is_quantized:
        return f"quantised ({str(value.dtype).removeprefix('torch.')})"
    if value.layout != torch.strided or value.is_nested:
        return f"sparse ({str(value.layout).removeprefix('torch.')})"
    if expected.is_floating_point() and not value.is_floating_point():
        return f"of {str(value.dtype).removeprefix('torch.')}"
    return None
