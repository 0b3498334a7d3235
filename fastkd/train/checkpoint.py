"""Checkpoints: written whole or not at all, read as plain tensors and values only."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .errors import CheckpointError

_FORMAT = "fastkd-1"


def write_atomically(path: Path, write: Any) -> None:
    """``write(temporary_path)``, then rename: a reader or a crash never meets half a file."""
    # The suffix is kept because savers choose the format by it; the process id keeps two writers apart.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    write_atomically(path, lambda temporary: torch.save({"format": _FORMAT, **content}, temporary))


def load_checkpoint(path: Path, *, remedy: str) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. ``remedy`` ends the message when it cannot be read.

    Raises ``CheckpointError``.
    """
    if not path.is_file():
        raise CheckpointError(f"no checkpoint {path}; {remedy}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"checkpoint {path} is damaged or holds more than tensors: {reason}; {remedy}"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"checkpoint {path} is truncated or damaged: {reason}; {remedy}") from None
    if not isinstance(content, dict):
        raise CheckpointError(
            f"checkpoint {path} holds a {type(content).__name__}, expected a dict; {remedy}"
        )
    return content
