"""Files that are files: no FIFO to wait at, no device that acts on being opened."""

from __future__ import annotations

import os
import stat
from pathlib import Path

_NONBLOCK = getattr(os, "O_NONBLOCK", 0)


def open_regular(path: Path) -> int:
    """A descriptor to read from. Raises ``OSError``, also for what is no file.

    A FIFO would make its reader wait for ever, and a device may act on being opened.
    """
    _check_regular(path, os.stat(path))
    descriptor = os.open(path, os.O_RDONLY | _NONBLOCK)
    try:
        _check_regular(path, os.fstat(descriptor))  # it may have been exchanged in between
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def read_regular(path: Path) -> bytes:
    with open(open_regular(path), "rb") as file:
        return file.read()


class NotAFileError(OSError):
    """A FIFO, a device, a socket or a folder where a file is expected."""


_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def _check_regular(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise NotAFileError(f"{path} is {_KINDS.get(stat.S_IFMT(status.st_mode), 'no file')}, no file")
