"""When to write a checkpoint, and when to stop: the clock, SIGTERM and SIGUSR1."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from . import distributed

# EX_TEMPFAIL of sysexits.h: "try again later". Schedulers requeue on it; docs/launch.md.
REQUEUE_STATUS = 75
_SIGNALS = ("SIGTERM", "SIGUSR1")


class StopSignals:
    """``with StopSignals() as stop:``; ``stop()`` says whether SIGTERM or SIGUSR1 has come since.

    More of them change nothing: torchrun and schedulers send several, while the checkpoint is written.
    """

    def __init__(self) -> None:
        self._received = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers there only
            for number in (getattr(signal, name, None) for name in _SIGNALS):
                if number is not None:
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
        return self._received

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True


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
