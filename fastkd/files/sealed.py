"""SHA-256 digests at the end of files, and checks of archives without one."""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import zipfile
from typing import Any, BinaryIO

_MARK = b"fastkd-sha256:"
_TRAILER = len(_MARK) + 64  # bytes at the end of the file


class Damage(Exception):
    """A file differs from what was written; the message says how that was found."""


def digest_of(content: Any) -> str:
    """SHA-256 of anything that JSON can represent."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def short_digest_of(content: Any) -> str:
    """Long enough to tell contents apart; not a protection against forgery."""
    return digest_of(content)[:12]


def append_digest(file: BinaryIO) -> None:
    digest = _digest_before(file, 0)
    file.seek(0, os.SEEK_END)
    file.write(_MARK + digest)


def has_digest(file: BinaryIO) -> bool:
    """Whether the file ends with a digest, without comparing it."""
    return _trailer(file).startswith(_MARK)


def is_whole(file: BinaryIO) -> bool:
    """Whether the file ends with the digest of the bytes before it."""
    return _trailer(file) == _MARK + _digest_before(file, _TRAILER)


def _trailer(file: BinaryIO) -> bytes:
    file.seek(-min(_TRAILER, file.seek(0, os.SEEK_END)), os.SEEK_END)
    return file.read()


def _digest_before(file: BinaryIO, end: int) -> bytes:
    """Hexadecimal digest of a file without its last ``end`` bytes."""
    left = file.seek(0, os.SEEK_END) - end
    file.seek(0)
    digest = hashlib.sha256()
    while left > 0 and (block := file.read(min(left, 2**20))):
        digest.update(block)
        left -= len(block)
    return digest.hexdigest().encode()


# ---- files of torch.save: zip archives -----------------------------------------------------------------


def seal(buffer: io.BytesIO) -> None:
    """Append the digest to a zip archive, as the archive's comment."""
    with buffer.getbuffer() as view:
        view[-2:] = struct.pack("<H", _TRAILER)  # the comment's length ends the archive's last record
    append_digest(buffer)


def check_sealed(file: BinaryIO) -> bool:
    """Whether the file has a digest. Raises ``Damage`` if the digest does not match."""
    if has_digest(file):
        if not is_whole(file):
            raise Damage("its SHA-256 does not match")
        return True
    file.seek(0)
    if zipfile.is_zipfile(file):  # or an older format of torch's, or not a checkpoint: torch reports it
        _check_archive(file)
    return False


_DIRECTORY, _ALLOWED_FLAGS = 0x10, 0x808  # names in UTF-8, sizes after the data: what torch writes


def _check_archive(file: BinaryIO) -> None:
    """Check an archive without a digest for damage that torch's reader misses. Raises ``Damage``."""
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
                    raise Damage(f"torch does not write entries such as that of {part.filename}")
            wrong = archive.testzip()
    except Damage:
        raise
    except Exception as error:  # BadZipFile, NotImplementedError, RuntimeError, struct.error, …
        raise Damage(str(error) or type(error).__name__) from None
    if wrong is not None:
        raise Damage(f"the checksum of {wrong} does not match")
