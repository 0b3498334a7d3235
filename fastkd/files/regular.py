"""Opening regular files only, never FIFOs or devices."""

from __future__ import annotations

import os
import stat
from pathlib import Path

_NONBLOCK = getattr(os, "O_NONBLOCK", 0)


def open_regular(path: Path) -> int:
    """A descriptor to read from. Raises ``OSError``, also if ``path`` is not a regular file.

    Opening a FIFO blocks forever, and opening a device can have side effects.
    """
    _check_regular(path, os.stat(path))
    descriptor = os.open(path, os.O_RDONLY | _NONBLOCK)
    try:
        _check_regular(path, os.fstat(descriptor))  # it may have been replaced in between
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def read_regular(path: Path) -> bytes:
    with open(open_regular(path), "rb") as file:
        return file.read()


class NotAFileError(OSError):
    """The path is a FIFO, a device, a socket or a folder."""


_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def _check_regular(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "special")
        raise NotAFileError(f"{path} is {kind}, not a regular file")
