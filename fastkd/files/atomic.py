"""Files on disk: written whole or not at all, never through a link, and read only where they are files."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path

from fastkd.errors import StorageError

_DAY = 86400.0
# O_NOFOLLOW, O_NONBLOCK: missing on Windows.
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
_NONBLOCK = getattr(os, "O_NONBLOCK", 0)


def write_atomically(path: Path, write: Callable[[Path], object], *, keep_as: Path | None = None) -> None:
    """``write(temporary_path)``, flush to the disk, rename: a reader or a crash never meets half a file.

    ``keep_as``: what was there before goes under that name. Raises ``StorageError``; then nothing changed.
    """
    temporary = path.with_name(_temporary_name(path))
    try:
        # Made here, under a name that nobody can foresee, and only if nothing is there: ``write`` opens it
        # by name, and a link put in its place beforehand would have it write over another file.
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NOFOLLOW, 0o666))
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
            "another folder"
        ) from None
    finally:
        with contextlib.suppress(OSError):  # a folder that has become read-only: the first error tells it
            temporary.unlink(missing_ok=True)


def _name_also(path: Path, other: Path) -> None:
    """A second name for a file, so that ``path`` is there throughout; without links, another name."""
    link = other.with_name(_temporary_name(other))
    try:
        os.link(path, link)
        os.replace(link, other)
        link.unlink(missing_ok=True)  # it stays where both were the same file already
    except OSError:
        os.replace(path, other)


def owner() -> str:
    """Goes into names of temporary files, to tell those of running processes from abandoned ones."""
    return f"{re.sub(r'[^A-Za-z0-9-]', '-', socket.gethostname())[:40]}-{os.getpid()}"


def _temporary_name(path: Path) -> str:
    # The suffix stays last because savers choose the format by it.
    return f".{path.stem[:100]}.{owner()}.{secrets.token_hex(4)}.tmp{path.suffix}"


# Machine and the random part are missing in names that fastkd gave before.
_TEMPORARY = re.compile(
    r"\..+?\.(?:(?P<host>[A-Za-z0-9-]+)-)?(?P<process>\d+)\.(?:[0-9a-f]{8}\.)?tmp(?:\..*)?"
)


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files of processes that have died; call it while the folder is locked.

    A process of another machine counts as dead after a day.
    """
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            match = _TEMPORARY.fullmatch(path.name)
            if match and is_abandoned(path, match["host"], int(match["process"])):
                path.unlink(missing_ok=True)


def is_abandoned(path: Path, host: str | None, process: int) -> bool:
    """Whether the process that made ``path`` is gone."""
    if host is None or owner() == f"{host}-{os.getpid()}":
        # In a restarted container this process may have the number of the one that made the file.
        return process == os.getpid() or not _lives(process)
    with contextlib.suppress(OSError):
        return time.time() - path.lstat().st_mtime > _DAY
    return False


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        return True
    return True


def make_folder(path: Path) -> None:
    """A folder and those above it. Raises ``StorageError``."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"the folder {path} cannot be made: {error.strerror or error}") from None


def take_room(path: Path) -> None:
    """Let a full disk be an ``OSError`` now: a write to a mapped file without room kills by SIGBUS."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)  # glibc writes where the file system cannot reserve
        except (AttributeError, OSError) as error:  # macOS and Windows lack it, other C libraries may refuse
            if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            for begin in range(0, size, 2**20):  # what is there, holes as zeros, is written again
                file.seek(begin)
                content = file.read(2**20)
                file.seek(begin)
                file.write(content)
