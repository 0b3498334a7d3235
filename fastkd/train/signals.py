"""When to write a checkpoint, and when to stop: the clock, SIGTERM and SIGUSR1."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, ClassVar

from fastkd.data.workers import stop_signals
from fastkd.recipe.durations import seconds_of

from . import distributed

# EX_TEMPFAIL of sysexits.h: "try again later". Schedulers requeue on it; docs/launch.md.
REQUEUE_STATUS = 75


class StopSignals:
    """``with StopSignals() as stop:``; then ``stop()`` says whether SIGTERM or SIGUSR1 has arrived.

    Further signals are ignored until the process ends, since torchrun and schedulers send several;
    ``restore_handlers`` undoes that. Nested blocks share the state: a signal between the teacher's and the
    student's training stops the student's.
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
            if threading.current_thread() is threading.main_thread():  # Python allows handlers only there
                for number in stop_signals():
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
            # Not our handler: Python restores the default at exit, and the signal would kill the process.
            for number in StopSignals._before:
                signal.signal(number, signal.SIG_IGN)

    def __call__(self) -> bool:
        return self._received

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True


def restore_handlers() -> None:
    """Restore the handlers from before ``StopSignals``, for a process that continues after a stop."""
    for number, handler in StopSignals._before.items():
        signal.signal(number, handler)
    StopSignals._before.clear()


class Control:
    """Decides after each step whether to write a checkpoint and whether to stop, the same on every rank.

    Args:
        every: steps (an int) or time (``"15min"``, ``"900s"``, ``"2h"``) between checkpoints; None: only when
            stopping.
        stop: called to ask whether to stop.
        interval: with several ranks, steps of an epoch between their exchanges; its end is one more.
    """

    def __init__(self, every: int | str | None, stop: Callable[[], bool] | None, interval: int) -> None:
        self._steps = every if isinstance(every, int) else None
        self._seconds = seconds_of(every) if isinstance(every, str) else None
        self._stop = stop
        self._interval = interval
        self._last = time.monotonic()

    def after_step(self, step: int) -> tuple[bool, bool]:
        """(write a checkpoint, stop) after a step of the epoch, from 1, trained on or left out."""
        due = self._steps is not None and step % self._steps == 0
        return self._asked(due) if self._exchanges(step) else (due, False)

    def after_epoch(self, steps: int) -> tuple[bool, bool]:
        """As ``after_step``, for what came since the last exchange of an epoch of this many steps.

        Otherwise several ranks would never stop in epochs shorter than ``interval``.
        """
        return (False, False) if self._exchanges(steps) else self._asked(False)

    def _exchanges(self, step: int) -> bool:
        return distributed.world() == 1 or step % self._interval == 0

    def _asked(self, due: bool) -> tuple[bool, bool]:
        if self._seconds is None and self._stop is None:
            return due, False
        late = self._seconds is not None and time.monotonic() - self._last >= self._seconds
        late, stop = distributed.any_over_ranks(late, self._stop is not None and self._stop())
        if late:
            self._last = time.monotonic()
        return due or late or stop, stop
