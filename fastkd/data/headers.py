"""The headers of a tar archive, ten times faster than tarfile where nothing in it is unusual."""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastkd.files.regular import open_regular

_BLOCK = 512
# Of a sample's .cls its header and content, and the next sample's header, with extended headers: one read.
_WINDOW = 4096
_OCTAL = re.compile(rb"[0-7]+")
_MEANT_FOR_TARFILE = re.compile(rb"^\d+ (path|size|hdrcharset|GNU\.sparse\.)", re.MULTILINE)

Member = tuple[str, int, int]  # name, offset and size of a file's content


def members(shard: Path) -> list[Member]:
    """The regular files of an uncompressed archive, in order. Raises what ``tarfile`` raises."""
    file = open_regular(shard)
    try:
        if hasattr(os, "posix_fadvise"):  # reading ahead would read the whole shard
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
        found = _usual(file, os.fstat(file).st_size)
    finally:
        os.close(file)
    return list(_any(shard)) if found is None else found


def _any(shard: Path) -> Iterator[Member]:
    with tarfile.open(shard, "r:") as archive:
        for member in archive:
            if member.isreg():
                yield member.name, member.offset_data, member.size


def _usual(file: int, end: int) -> list[Member] | None:
    """None where only tarfile knows what to do: long names, links, sparse files, damage."""
    found: list[Member] = []
    headers: list[bytes] = []
    place, window, window_at = 0, b"", 0
    while place < end:
        if place + _BLOCK > window_at + len(window):
            window, window_at = os.pread(file, _WINDOW, place), place
        header = window[place - window_at : place - window_at + _BLOCK]
        if header.count(0) == len(header) == _BLOCK:
            break
        if len(header) < _BLOCK or header[257:263] not in (b"ustar\0", b"ustar "):
            return None
        kind, size = header[156:157], header[124:136].strip(b"\0 ")
        if not _OCTAL.fullmatch(size) or kind not in (b"0", b"x", b"5"):
            return None
        bytes_of_it = int(size, 8)
        content = place + _BLOCK
        if content + bytes_of_it > end:
            return None
        if kind == b"0":
            prefix, name = header[345:500].partition(b"\0")[0], header[:100].partition(b"\0")[0]
            found.append((os.fsdecode(prefix + b"/" + name if prefix else name), content, bytes_of_it))
        elif kind == b"x" and _MEANT_FOR_TARFILE.search(os.pread(file, bytes_of_it, content)):
            return None
        headers.append(header)
        place = content + -(-bytes_of_it // _BLOCK) * _BLOCK
    return found if found and place <= end and _sums_agree(headers) else None


def _sums_agree(headers: list[bytes]) -> bool:
    """Whether each header has the sum of its bytes, of which those of the sum itself count as spaces."""
    try:
        stored = [int(header[148:156].strip(b"\0 "), 8) for header in headers]
    except ValueError:
        return False
    blocks = np.frombuffer(b"".join(headers), np.uint8).reshape(-1, _BLOCK)
    sums = blocks.sum(1, dtype=np.int64) - blocks[:, 148:156].sum(1, dtype=np.int64) + 8 * ord(" ")
    return bool((sums == stored).all())
