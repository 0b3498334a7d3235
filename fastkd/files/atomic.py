"""Atomic writes: a file is written completely or not at all, and never through a symbolic link."""

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
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)  # missing on Windows


def write_atomically(path: Path, write: Callable[[Path], object], *, keep_as: Path | None = None) -> None:
    """Call ``write(temporary_path)``, flush to disk and rename, so that no half-written file is ever visible.

    ``keep_as``: keep the previous file under that name. Raises ``StorageError``; then nothing has changed.
    """
    temporary = path.with_name(_temporary_name(path))
    try:
        # Created exclusively and under a random name: ``write`` opens it by name, and a link planted there
        # would make it overwrite another file.
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NOFOLLOW, 0o666))
        write(temporary)
        # Without fsync a power failure can leave the new name on an empty file.
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
        with contextlib.suppress(OSError):  # a folder that became read-only: the first error is reported
            temporary.unlink(missing_ok=True)


def _name_also(path: Path, other: Path) -> None:
    """Hard-link ``path`` as ``other``, so that ``path`` always exists; rename it if links are unsupported."""
    link = other.with_name(_temporary_name(other))
    try:
        os.link(path, link)
        os.replace(link, other)
        link.unlink(missing_ok=True)  # replace() leaves it if both names were already the same file
    except OSError:
        os.replace(path, other)


def owner() -> str:
    """Host and process, part of temporary names: tells running processes' files from abandoned ones."""
    return f"{re.sub(r'[^A-Za-z0-9-]', '-', socket.gethostname())[:40]}-{os.getpid()}"


def _temporary_name(path: Path) -> str:
    # The suffix stays last because savers choose the format from it.
    return f".{path.stem[:100]}.{owner()}.{secrets.token_hex(4)}.tmp{path.suffix}"


# Older versions wrote names without the host and the random part.
_TEMPORARY = re.compile(
    r"\..+?\.(?:(?P<host>[A-Za-z0-9-]+)-)?(?P<process>\d+)\.(?:[0-9a-f]{8}\.)?tmp(?:\..*)?"
)


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files of processes that no longer run; call it while the folder is locked.

    Files of another machine count as abandoned after a day.
    """
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            match = _TEMPORARY.fullmatch(path.name)
            if match and is_abandoned(path, match["host"], int(match["process"])):
                path.unlink(missing_ok=True)


def is_abandoned(path: Path, host: str | None, process: int) -> bool:
    """Whether the process that made ``path`` no longer runs."""
    if host is None or owner() == f"{host}-{os.getpid()}":
        # In a restarted container this process may have the same id as the one that made the file.
        return process == os.getpid() or not _runs(process)
    with contextlib.suppress(OSError):
        return time.time() - path.lstat().st_mtime > _DAY
    return False


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        return True
    return True


def make_folder(path: Path) -> None:
    """Create a folder and its parents. Raises ``StorageError``."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot create the folder {path}: {error.strerror or error}") from None


def take_room(path: Path) -> None:
    """Allocate the file's blocks: raises ``OSError`` on a full disk, where a mapped write ends in SIGBUS."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)  # glibc writes zeros if the file system cannot
        except (AttributeError, OSError) as error:  # missing on macOS, Windows; other C libraries may refuse
            if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            for begin in range(0, size, 2**20):  # rewrite the content, holes as zeros
                file.seek(begin)
                content = file.read(2**20)
                file.seek(begin)
                file.write(content)
