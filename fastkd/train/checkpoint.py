"""Checkpoints: written whole or not at all, read as plain tensors and values only.

A checkpoint is torch's zip archive with the SHA-256 of its bytes in the archive's comment, where torch and
zip tools look past it. torch's reader checks little itself: an entry whose directory bit is set, say, is
taken for read, and its tensor is whatever the memory held.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .errors import CheckpointError
from .storage import digest_before, open_regular, write_atomically

_FORMAT = "fastkd-2"
_WITHOUT_DIGEST = "fastkd-1"  # what fastkd wrote before

_MARK = b"fastkd-sha256:"
_COMMENT = len(_MARK) + 64  # bytes at the end of the file


def save_checkpoint(path: Path, content: Mapping[str, Any], *, keep_as: Path | None = None) -> None:
    # Through memory: of a failed write torch's own writer tells nothing but its position.
    buffer = io.BytesIO()
    torch.save({**content, "format": _FORMAT}, buffer)
    seal(buffer)
    write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getbuffer()), keep_as=keep_as)


def seal(buffer: io.BytesIO) -> None:
    """Append the digest of a zip archive without a comment, as its comment."""
    view = buffer.getbuffer()
    view[-2:] = struct.pack("<H", _COMMENT)  # the comment's length ends the archive's last record
    digest = hashlib.sha256(view).hexdigest().encode()
    view.release()
    buffer.seek(0, io.SEEK_END)
    buffer.write(_MARK + digest)


def load_checkpoint(path: Path, *, remedy: str) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. ``remedy`` ends the message when it cannot be read.

    Raises ``CheckpointError``.
    """
    if not path.exists():
        raise CheckpointError(f"no checkpoint {path}; {remedy}")
    try:
        # One opening for check and reading: the file of this name may be exchanged in between.
        with open(open_regular(path), "rb") as file:
            sealed = _check(file)
            file.seek(0)
            with warnings.catch_warnings():  # on kinds of tensors that are refused by name where they come
                warnings.simplefilter("ignore")
                content = torch.load(file, map_location="cpu", weights_only=True)
    except _Damage as damage:
        raise CheckpointError(f"checkpoint {path} is damaged: {damage}; {remedy}") from None
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"checkpoint {path} is damaged or holds more than tensors: {_refusal(error)}; {remedy}"
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # what a damaged pickle leads to is without end
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"checkpoint {path} is truncated or damaged: {reason}; {remedy}") from None
    if not isinstance(content, dict):
        raise CheckpointError(
            f"checkpoint {path} holds a {type(content).__name__}, expected a dict; {remedy}"
        )
    _check_format(path, content.get("format"), sealed, remedy)
    return content


class _Damage(Exception):
    pass


def _check(file: BinaryIO) -> bool:
    """Whether the content has a digest, which is right. Raises ``_Damage``."""
    if file.seek(0, io.SEEK_END) > _COMMENT:
        file.seek(-_COMMENT, io.SEEK_END)
        comment = file.read()
        if comment.startswith(_MARK):
            if comment[len(_MARK) :] != digest_before(file, _COMMENT):
                raise _Damage("it is not what was written, by its SHA-256")
            return True
    file.seek(0)
    if zipfile.is_zipfile(file):  # else an older format of torch's, or no checkpoint: torch will tell
        _check_archive(file)
    return False


_DIRECTORY, _ALLOWED_FLAGS = 0x10, 0x808  # names in UTF-8, sizes after the data: what torch writes


def _check_archive(file: BinaryIO) -> None:
    """Of an archive without a digest: what torch's reader would not notice. Raises ``_Damage``."""
    try:
        with zipfile.ZipFile(file) as archive:
            for part in archive.infolist():
                if (
                    part.external_attr & _DIRECTORY
                    or part.filename.endswith("/")
                    or part.flag_bits & ~_ALLOWED_FLAGS
                    or part.compress_type != zipfile.ZIP_STORED
                    or part.compress_size != part.file_size
                    or part.volume
                ):
                    raise _Damage(f"the entry of {part.filename} is none that torch writes")
            wrong = archive.testzip()
    except _Damage:
        raise
    except Exception as error:  # BadZipFile, NotImplementedError, RuntimeError, struct.error, …
        raise _Damage(str(error) or type(error).__name__) from None
    if wrong is not None:
        raise _Damage(f"the checksum of {wrong} does not match")


def _refusal(error: pickle.UnpicklingError) -> str:
    """Without torch's advice to run what is in the file."""
    text = str(error)
    found = re.search(r"GLOBAL\s+([\w.]+)|global[: ]+`?([\w.]+)", text)
    if found:
        return f"it refers to {found[1] or found[2]}, which is not run"
    return "it is no pickle of tensors and plain values"


def _check_format(path: Path, name: object, sealed: bool, remedy: str) -> None:
    if not (isinstance(name, str) and name.startswith("fastkd-")):
        return  # another program's
    if name not in (_FORMAT, _WITHOUT_DIGEST):
        raise CheckpointError(
            f"checkpoint {path} has the format {name!r}, but this fastkd reads {_FORMAT} and "
            f"{_WITHOUT_DIGEST}: a newer fastkd wrote it, or it is damaged; {remedy}"
        )
    if name == _FORMAT and not sealed:
        raise CheckpointError(f"checkpoint {path} is damaged: its SHA-256 is missing; {remedy}")
