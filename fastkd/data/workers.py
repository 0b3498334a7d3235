"""Data workers survive the signals that schedulers send to every process of a job."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

_WAITS = hasattr(signal, "sigtimedwait")  # not on macOS and Windows


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """SIGTERM and SIGUSR1 come after the block; for good not to processes and threads started in it."""
    if not _WAITS:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def from_one_process_only(process: int, worker: int) -> None:
    """For data workers started under ``held_back``: SIGTERM ends one only if ``process`` sent it.

    That is the process that asked for the worker, with which it ends: its parent may be a fork server.

    Schedulers signal every process of a job. That stops the training by its first process; a worker that died
    of it would end the training before the checkpoint is written.
    """
    if not _WAITS:
        return
    numbers = stop_signals()

    def watch() -> None:
        while True:
            received = signal.sigtimedwait(numbers, 5.0)
            if received is None:
                try:
                    os.kill(process, 0)
                except ProcessLookupError:  # torch looks at the parent, and a fork server lives on
                    os._exit(0)
            elif received.si_signo == signal.SIGTERM and received.si_pid == process:
                os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


def stop_signals() -> list[int]:
    """SIGTERM and SIGUSR1, where the system has them."""
    return [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]
