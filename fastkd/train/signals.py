"""When to write a checkpoint, and when to stop: the clock, SIGTERM and SIGUSR1."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, ClassVar

from . import distributed

# EX_TEMPFAIL of sysexits.h: "try again later". Schedulers requeue on it; docs/launch.md.
REQUEUE_STATUS = 75
_SIGNALS = ("SIGTERM", "SIGUSR1")


class StopSignals:
    """``with StopSignals() as stop:``; ``stop()`` says whether SIGTERM or SIGUSR1 has come since.

    More of them change nothing: torchrun and schedulers send several, while the checkpoint is written and
    while the process ends. So after a signal both stay ignored; ``restore_handlers`` undoes that. Within a
    ``with`` another one is the same: a signal between teacher and student stops the student.
    """

    _outer: StopSignals | None = None
    _before: ClassVar[dict[int, Any]] = {}

    def __init__(self) -> None:
        self._received = False
        self._depth = 0

    def __enter__(self) -> StopSignals:
        active = StopSignals._outer or self
        active._depth += 1
        if active._depth == 1:
            StopSignals._outer = active
            if threading.current_thread() is threading.main_thread():  # Python allows handlers there only
                for number in _numbers():
                    handler = signal.signal(number, active._receive)
                    StopSignals._before.setdefault(number, handler)
        return active

    def __exit__(self, *exception: object) -> None:
        active = StopSignals._outer
        assert active is not None
        active._depth -= 1
        if active._depth:
            return
        StopSignals._outer = None
        if not active._received:
            restore_handlers()
        elif StopSignals._before:
            # Not a handler of ours: Python puts the default back while it ends, and the process would die.
            for number in StopSignals._before:
                signal.signal(number, signal.SIG_IGN)

    def __call__(self) -> bool:
        return self._received

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True


def restore_handlers() -> None:
    """The handlers of before ``StopSignals``, for a process that goes on after it was asked to stop."""
    for number, handler in StopSignals._before.items():
        signal.signal(number, handler)
    StopSignals._before.clear()


_WAITS = hasattr(signal, "sigtimedwait")  # not on macOS and Windows


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """SIGTERM and SIGUSR1 come after the block; for good not to processes and threads started in it."""
    if not _WAITS:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _numbers())
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
    numbers = _numbers()

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


def _numbers() -> list[int]:
    return [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]


class Control:
    """After each step: is a checkpoint due, shall we stop? Every rank gets the same answer.

    Args:
        every: steps (an int) or time (``"15min"``, ``"900s"``, ``"2h"``) between checkpoints; None: only when
            stopping.
        stop: asked whether to stop.
        interval: with several ranks, steps between the times when they ask each other.
    """

    def __init__(self, every: int | str | None, stop: Callable[[], bool] | None, interval: int) -> None:
        self._steps = every if isinstance(every, int) else None
        self._seconds = seconds_of(every) if isinstance(every, str) else None
        self._stop = stop
        self._interval = interval
        self._last = time.monotonic()

    def after_step(self, step: int) -> tuple[bool, bool]:
        """(write a checkpoint, stop)."""
        due = self._steps is not None and step % self._steps == 0
        if self._seconds is None and self._stop is None:
            return due, False
        if distributed.world() > 1 and step % self._interval:
            return due, False
        late = self._seconds is not None and time.monotonic() - self._last >= self._seconds
        late, stop = distributed.any_over_ranks(late, self._stop is not None and self._stop())
        if late:
            self._last = time.monotonic()
        return due or late or stop, stop


def seconds_of(text: str) -> float:
    """Of ``"15min"``, ``"900s"``, ``"2h"``. Raises ``ValueError``."""
    for unit, seconds in (("min", 60.0), ("s", 1.0), ("h", 3600.0)):
        number = text.removesuffix(unit)
        if number != text:
            try:
                value = float(number) * seconds
            except ValueError:
                break
            if 0 < value < float("inf"):
                return value
    raise ValueError(f"expected a number of steps, or a time such as 15min, 900s, 2h, got {text!r}")
