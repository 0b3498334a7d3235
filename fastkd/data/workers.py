"""Signal handling of data workers, which must survive the signals that a whole job or process group gets."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from functools import cache
from types import TracebackType

_WAITS = hasattr(signal, "sigtimedwait")  # not on macOS and Windows


def start_method() -> str | None:
    """How data workers are started: forked on Linux; None for what multiprocessing is set to.

    Python 3.14's default on Linux is a fork server. Its workers import torch again, unpickle the index of the
    data, share neither with the training process, and do not see its later changes of ``os.environ``.
    """
    # The default is the first; it cannot be told from a request for the same method.
    default = multiprocessing.get_all_start_methods()[0]
    if sys.platform == "linux" and multiprocessing.get_start_method(allow_none=True) in (None, default):
        return "fork"
    return None


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Delay SIGTERM, SIGUSR1 and SIGINT until after the block; what is started in it never gets them.

    A terminal sends Ctrl-C to all processes. A worker that it ended while starting would print a traceback,
    and replace KeyboardInterrupt in the training process with torch's error about that worker.
    """
    if not _WAITS:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [*stop_signals(), signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def from_one_process_only(process: int, worker: int) -> None:
    """In a data worker started under ``held_back``: exit on SIGTERM only if ``process`` sent it.

    ``process`` is the training process; the worker exits when it is gone. (Its parent may be a fork server.)

    Schedulers signal every process of a job. The training process then stops by itself; a worker that died
    first would end the training before the checkpoint is written.
    """
    if not _WAITS:
        return
    numbers = stop_signals()
    sys.excepthook = _unless_the_reader_has_gone

    def watch() -> None:
        while True:
            received = signal.sigtimedwait(numbers, 5.0)
            if received is None:
                try:
                    os.kill(process, 0)
                except ProcessLookupError:  # torch only watches the parent, and a fork server stays alive
                    os._exit(0)
            elif received.si_signo == signal.SIGTERM and received.si_pid == process:
                os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


def _unless_the_reader_has_gone(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    # Called by the thread that hands tensors over: after Ctrl-C the training process may leave in the middle.
    if not isinstance(error, EOFError | ConnectionError):
        sys.__excepthook__(kind, error, trace)


@cache
def end_at_exit() -> None:
    """Have data workers end when this process does, whatever signals it gets meanwhile.

    multiprocessing sends each of its processes one SIGTERM at exit and then waits for them without limit.
    That one is lost while a scheduler's is pending, so it is sent again until they are gone; what is
    registered last runs first.
    """
    atexit.register(_end)


def _end() -> None:
    for process in multiprocessing.active_children():
        while process.daemon and process.is_alive():
            process.terminate()
            process.join(0.2)


def stop_signals() -> list[int]:
    """SIGTERM and SIGUSR1, where the system has them."""
    return [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]
