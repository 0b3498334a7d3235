"""A lock on a run folder, which the system releases when its holder ends in any way."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from fastkd.errors import FolderInUseError, StorageError
from fastkd.files.atomic import remove_leftovers

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_NAME = ".lock"

# A forked process inherits the descriptor and with it the lock, so a data worker would hold it longer than
# the training process. Closing the copy does not release the lock. POSIX record locks are not inherited, but
# closing any other descriptor of the file releases them.
_held: set[int] = set()


def _close_copies() -> None:
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


if fcntl is not None:
    os.register_at_fork(after_in_child=_close_copies)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold ``folder/.lock``, and delete temporary files of processes that no longer run.

    Raises ``FolderInUseError`` that names the holder, ``StorageError`` if the lock cannot be created.
    """
    if fcntl is None:
        yield
        return
    path = folder / _NAME
    descriptor = _take(path)
    try:
        try:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        except OSError as error:
            raise _cannot_be_written(folder, error.strerror) from None
        remove_leftovers(folder)
        yield
    finally:
        if descriptor in _held:  # not in a forked process
            with contextlib.suppress(OSError):
                path.unlink()  # while held; a waiting process checks that the path is unchanged
            _give_up(descriptor)


def _take(path: Path) -> int:
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        except OSError as error:
            link = error.errno == errno.ELOOP
            reason = f"{path} is a symbolic link; delete it" if link else error.strerror
            raise _cannot_be_written(path.parent, reason) from None
        _held.add(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                _give_up(descriptor)
                raise _cannot_be_written(path.parent, f"no lock: {error.strerror}") from None
            holder = os.read(descriptor, 200).decode(errors="replace") or "another process"
            _give_up(descriptor)
            raise FolderInUseError(
                f"the run folder {path.parent} is in use by {holder}; wait for it to end, or start a new run"
            ) from None
        status = os.fstat(descriptor)
        try:
            same = os.path.samestat(status, os.lstat(path))
        except FileNotFoundError:
            same = False
        if same and stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
            return descriptor
        _give_up(descriptor)
        if same:  # a hard link to another file, a FIFO, a device
            raise _cannot_be_written(path.parent, f"{path} is not an ordinary file; delete it")
        # Otherwise the holder has removed it in between: try again.


def _give_up(descriptor: int) -> None:
    _held.discard(descriptor)
    os.close(descriptor)


def _cannot_be_written(folder: Path, reason: object) -> StorageError:
    return StorageError(
        f"the run folder {folder} cannot be written: {reason}; nothing was changed. "
        "--runs FOLDER chooses another place"
    )
