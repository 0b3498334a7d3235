"""SHA-256 of contents, at the end of files; and what torch's reader does not notice in a file without one."""

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
    """A file that is not what was written; the message says by what."""


def digest_of(content: Any) -> str:
    """Of what JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def short_digest_of(content: Any) -> str:
    """Enough to tell contents apart that nobody forges."""
    return digest_of(content)[:12]


def append_digest(file: BinaryIO) -> None:
    digest = _digest_before(file, 0)
    file.seek(0, os.SEEK_END)
    file.write(_MARK + digest)


def has_digest(file: BinaryIO) -> bool:
    """Cheap: the digest is not compared."""
    return _trailer(file).startswith(_MARK)


def is_whole(file: BinaryIO) -> bool:
    """Whether the file ends with the digest of what is before."""
    return _trailer(file) == _MARK + _digest_before(file, _TRAILER)


def _trailer(file: BinaryIO) -> bytes:
    file.seek(-min(_TRAILER, file.seek(0, os.SEEK_END)), os.SEEK_END)
    return file.read()


def _digest_before(file: BinaryIO, end: int) -> bytes:
    """In hexadecimal digits, of a file without its last ``end`` bytes."""
    left = file.seek(0, os.SEEK_END) - end
    file.seek(0)
    digest = hashlib.sha256()
    while left > 0 and (block := file.read(min(left, 2**20))):
        digest.update(block)
        left -= len(block)
    return digest.hexdigest().encode()


# ---- files of torch.save: zip archives -----------------------------------------------------------------


def seal(buffer: io.BytesIO) -> None:
    """Append the digest of a zip archive without a comment, as its comment."""
    with buffer.getbuffer() as view:
        view[-2:] = struct.pack("<H", _TRAILER)  # the comment's length ends the archive's last record
    append_digest(buffer)


def check_sealed(file: BinaryIO) -> bool:
    """Whether the content has a digest, which is right. Raises ``Damage``."""
    if has_digest(file):
        if not is_whole(file):
            raise Damage("it is not what was written, by its SHA-256")
        return True
    file.seek(0)
    if zipfile.is_zipfile(file):  # else an older format of torch's, or no checkpoint: torch will tell
        _check_archive(file)
    return False


_DIRECTORY, _ALLOWED_FLAGS = 0x10, 0x808  # names in UTF-8, sizes after the data: what torch writes


def _check_archive(file: BinaryIO) -> None:
    """Of an archive without a digest: what torch's reader would not notice. Raises ``Damage``."""
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
                    raise Damage(f"the entry of {part.filename} is none that torch writes")
            wrong = archive.testzip()
    except Damage:
        raise
    except Exception as error:  # BadZipFile, NotImplementedError, RuntimeError, struct.error, …
        raise Damage(str(error) or type(error).__name__) from None
    if wrong is not None:
        raise Damage(f"the checksum of {wrong} does not match")
