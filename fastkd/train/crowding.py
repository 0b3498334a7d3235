"""A hint for training on a CPU whose processors other programs use too."""

from __future__ import annotations

import multiprocessing
import os
import time

import torch

# Seconds of an epoch before it is judged, and the share of the threads' time that is little. On two
# processors two threads beside another program's one got 52 %, and the epoch took eight times as long.
_SECONDS, _LITTLE = 20.0, 0.7


class Crowding:
    """Finds, once per training, that the threads get little of the processors.

    Threads that wait for each other then lose more than they gain: a single one can be several times as fast.
    """

    def __init__(self, device: torch.device) -> None:
        self._threads = torch.get_num_threads() if device.type == "cpu" else 1
        self.start()

    def start(self) -> None:
        """An epoch begins."""
        self._began = time.monotonic(), time.process_time()

    def hint(self, waited: float) -> str | None:
        """What to say after a step of this epoch, of which ``waited`` seconds were spent waiting for data."""
        if self._threads < 2:
            return None
        seconds = time.monotonic() - self._began[0] - waited
        if seconds < _SECONDS:
            return None
        share = (time.process_time() - self._began[1]) / (seconds * self._threads)
        if share > _LITTLE:
            return None
        load, cores = _load(), os.cpu_count() or 1
        own = self._threads + len(multiprocessing.active_children())  # the loader's workers
        if load < max(cores, own) + 0.5:
            return None
        threads, self._threads = self._threads, 1
        return (
            f"other programs use the CPUs (load {load:.1f} on {cores}): {threads} threads got "
            f"{share:.0%} of their time. One may be faster, also to resume with: train.threads=1, or "
            "torch.set_num_threads(1) in Python"
        )


def _load() -> float:
    """Mean number of threads, of all programs, that had or wanted a processor in the last minute."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):  # not on every system
        return 0.0
