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

from fastkd.torch_files import load_plain

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
            _name_also(path, keep_as)
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


def _name_also(path: Path, other: Path) -> None:
    """A second name for a file, so that ``path`` is there throughout; without links, another name."""
    link = other.with_name(f".{other.stem}.{os.getpid()}.tmp{other.suffix}")
    try:
        os.link(path, link)
        os.replace(link, other)
        link.unlink(missing_ok=True)  # it stays where both were the same file already
    except OSError:
        os.replace(path, other)


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
        content = load_plain(path)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"checkpoint {path} is damaged or holds more than tensors: {error}; {remedy}"
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
