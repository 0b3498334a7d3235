"""Weights in safetensors files, which no code is run to read, and what an export's are of in the header.

The header of an export holds the description, so that weights and description cannot be separated or
confused, and the SHA-256 of both. safetensors itself checks only that the sizes fit.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fastkd.errors import CheckpointError
from fastkd.files.regular import open_regular
from fastkd.messages import kind_and_text

from .about import About, read_about

# Of the header's metadata, and of that of ONNX models.
KEY = "fastkd"
_DIGEST = "sha256"
SUFFIX = ".safetensors"


def save_safetensors(path: Path, model: nn.Module, about: str) -> None:
    from safetensors.torch import save

    # Cloned, since tied weights share memory, which the format refuses.
    weights = {key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()}
    path.write_bytes(save(weights, {KEY: about, _DIGEST: _digest(weights, about)}))


def read_safetensors(path: Path) -> tuple[About | None, dict[str, Tensor]]:
    """Description, None of a file that is no export, and weights, on the CPU. Raises ``CheckpointError``."""
    from safetensors import safe_open

    try:
        os.close(open_regular(path))
        with safe_open(str(path), framework="pt") as file:
            said = file.metadata() or {}
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except MemoryError:
        raise
    except Exception as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or kind_and_text(error)
        raise CheckpointError(
            f"{path} cannot be read: it is truncated or damaged, or no safetensors file: {reason}"
        ) from None
    if KEY not in said:
        return None, weights
    if said.get(_DIGEST) != _digest(weights, said[KEY]):
        raise CheckpointError(f"{path} is damaged: its SHA-256 does not match")
    return read_about(said[KEY], path), weights


def _digest(weights: Mapping[str, Tensor], about: str) -> str:
    digest = hashlib.sha256(about.encode())
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)} ".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
