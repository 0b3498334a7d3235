"""Checkpoints: written whole or not at all, read as plain tensors and values only."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import CheckpointError, StorageError

_FORMAT = "fastkd-1"


def write_atomically(path: Path, write: Any, *, keep_as: Path | None = None) -> None:
    """``write(temporary_path)``, flush to the disk, rename: a reader or a crash never meets half a file.

    ``keep_as``: what was there before goes under that name. Raises ``StorageError``; then nothing changed.
    """
    # The suffix is kept because savers choose the format by it; the process id keeps two writers apart.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        write(temporary)
        # Else a power cut may leave the new name on an empty file.
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        if keep_as is not None and path.exists():
            os.replace(path, keep_as)
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(
            f"{path} cannot be written: {reason}; what was there before is kept. Make room or choose "
            "another folder, then go on with --resume"
        ) from None
    finally:
        with contextlib.suppress(OSError):  # a folder that has become read-only: the first error tells it
            temporary.unlink(missing_ok=True)


def save_checkpoint(path: Path, content: Mapping[str, Any], *, keep_as: Path | None = None) -> None:
    # Through memory: of a failed write torch's own writer tells nothing but its position.
    buffer = io.BytesIO()
    torch.save({"format": _FORMAT, **content}, buffer)
    write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getbuffer()), keep_as=keep_as)


def load_checkpoint(path: Path, *, remedy: str) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. ``remedy`` ends the message when it cannot be read.

    Raises ``CheckpointError``.
    """
    if not path.is_file():
        raise CheckpointError(f"no checkpoint {path}; {remedy}")
    if (damage := _damage(path)) is not None:
        raise CheckpointError(f"checkpoint {path} is damaged: {damage}; {remedy}")
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


def _damage(path: Path) -> str | None:
    """A part of the archive whose checksum does not match, which torch's reader would not notice."""
    if not zipfile.is_zipfile(path):  # an older format of torch's, or no checkpoint: torch will tell
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            part = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError) as error:
        return str(error)
    return None if part is None else f"the checksum of {part} does not match"


def load_weights(model: nn.Module, path: Path, *, num_classes: int, remedy: str) -> dict[str, Any]:
    """Fill ``model`` from a fastkd checkpoint or a bare state dict; returns the checkpoint's other entries.

    Raises ``CheckpointError`` naming the file and the first thing that does not fit.
    """
    content = load_checkpoint(path, remedy=remedy)
    weights = content.pop("model", None) if content.get("format") == _FORMAT else content
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise CheckpointError(f"checkpoint {path} holds no state dict of tensors; {remedy}")
    trained_classes = content.get("num_classes", num_classes)
    if trained_classes != num_classes:
        raise CheckpointError(
            f"checkpoint {path} was trained for {trained_classes} classes, "
            f"but this data set has {num_classes}; {remedy}"
        )
    expected = model.state_dict()
    problems = [f"{key} is missing" for key in expected if key not in weights]
    problems += [f"{key} is not in this model" for key in weights if key not in expected]
    problems += [
        f"{key} has shape {list(weights[key].shape)}, expected {list(value.shape)}"
        for key, value in expected.items()
        if key in weights and weights[key].shape != value.shape
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise CheckpointError(f"checkpoint {path} does not fit the model: {problems[0]}{more}; {remedy}")
    model.load_state_dict(weights)
    return {} if weights is content else content
