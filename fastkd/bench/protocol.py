"""How a call is timed and its memory counted, on CPUs and on GPUs; benchmarks/README.md describes it."""

from __future__ import annotations

import math
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Any]
# Bytes of the copy that measures the bandwidth: more than any last-level cache holds.
COPY_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
MOST_INPUT_SETS = 16
MOST_TURNS = 101
# A graph keeps what its call allocates; larger cases are launched normally.
GRAPH_BYTES = 4 * 2**30
FLUSH_BYTES = 512 * 2**20
# The GPU waits before a call that is launched normally, until the host has launched it: 2 ms at 2 GHz.
WAIT_CYCLES = 4_000_000


class Launch:
    """One variant, ready to be timed repeatedly: ``run(inputs)`` over its input sets."""

    def __init__(self, run: Callable[[Any], Any], sets: Sequence[Any]) -> None:
        self.run = run
        self.sets = sets
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, turn: int) -> None:
        if self.graph is not None:
            self.graph.replay()
        else:
            self.run(self.sets[turn % len(self.sets)])


class CPUClock:
    """Wall-clock time of a call, over input sets that together exceed the last-level cache."""

    device = "cpu"

    def __init__(self) -> None:
        self._source = torch.ones(COPY_BYTES["cpu"], dtype=torch.uint8)
        self._target = torch.empty_like(self._source)

    def input_sets(self, case_bytes: int) -> int:
        return max(2, min(MOST_INPUT_SETS, math.ceil(2 * last_level_cache() / case_bytes)))

    def prepare(self, launch: Launch, case_bytes: int) -> str:
        for turn in range(2):
            launch(turn)
        return "perf_counter"

    def time(self, launch: Launch, turn: int) -> float:
        """Return milliseconds."""
        begin = time.perf_counter()
        launch(turn)
        return (time.perf_counter() - begin) * 1e3

    def bandwidth(self) -> float:
        """Return the bytes read and written per second by one copy."""
        begin = time.perf_counter()
        self._target.copy_(self._source)
        return 2 * COPY_BYTES["cpu"] / (time.perf_counter() - begin)

    def host_microseconds(self, launch: Launch) -> float | None:
        """Return None: on a CPU the call's time is the host's."""
        return None

    def extra_memory(self, call: Call) -> int | None:
        """Return the peak of what torch's allocator held during the call, in bytes."""
        # The profiler of some torch releases writes to stderr whenever it starts.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as record:
            call()
        results = getattr(record.profiler, "kineto_results", None)
        if results is None:
            return None
        changes = sorted(
            (event.start_ns(), index, event.nbytes())
            for index, event in enumerate(results.events())
            if event.name() == "[memory]"
        )
        level = peak = 0
        for _, _, change in changes:
            level += change
            peak = max(peak, level)
        return peak


class GPUClock:
    """GPU time between two CUDA events around one launch, after a flush of the L2 cache.

    All but the largest cases replay a CUDA graph; before the others the GPU waits for the host, so that the
    time of the launch does not count.
    """

    device = "cuda"

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        self._flush = torch.empty(max(FLUSH_BYTES, 4 * cache), dtype=torch.uint8, device="cuda")
        half = COPY_BYTES["cuda"]
        self._source = torch.ones(half, dtype=torch.uint8, device="cuda")
        self._target = torch.empty_like(self._source)
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def input_sets(self, case_bytes: int) -> int:
        return 1

    def prepare(self, launch: Launch, case_bytes: int) -> str:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for turn in range(3):
                launch(turn)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        if case_bytes > GRAPH_BYTES:
            return "events"
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                launch.run(launch.sets[0])
        except RuntimeError:  # it synchronises, or launches on another stream
            torch.cuda.synchronize()
            return "events"
        launch.graph = graph
        return "graph"

    def time(self, launch: Launch, turn: int) -> float:
        self._flush.zero_()
        if launch.graph is None:
            torch.cuda._sleep(WAIT_CYCLES)
        return self._elapsed(lambda: launch(turn))

    def bandwidth(self) -> float:
        self._flush.zero_()
        elapsed = self._elapsed(lambda: self._target.copy_(self._source))
        return 2 * COPY_BYTES["cuda"] / (elapsed * 1e-3)

    def host_microseconds(self, launch: Launch) -> float | None:
        """Return the host's time for a call while the GPU is idle: median of 21."""
        times = []
        for turn in range(21):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            launch.run(launch.sets[turn % len(launch.sets)])
            times.append((time.perf_counter() - begin) * 1e6)
        torch.cuda.synchronize()
        return statistics.median(times)

    def extra_memory(self, call: Call) -> int | None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def _elapsed(self, call: Call) -> float:
        self._begin.record()
        call()
        self._end.record()
        self._end.synchronize()
        return self._begin.elapsed_time(self._end)


Clock = CPUClock | GPUClock


def make_clock(device: str) -> Clock:
    return GPUClock() if device == "cuda" else CPUClock()


def interleaved(
    clock: Clock, launches: dict[str, Launch], *, seconds: float, least: int = 7
) -> tuple[dict[str, list[float]], float]:
    """Time the launches in turns, each in another random order, for about ``seconds``.

    Returns the milliseconds of each turn of each launch, and the median bandwidth of copies made in between.
    """
    names = list(launches)
    begin = time.perf_counter()
    for name in names:
        clock.time(launches[name], 0)
    turn_seconds = max(time.perf_counter() - begin, 1e-6)
    clock.bandwidth()
    turns = max(least, min(MOST_TURNS, int(seconds / turn_seconds)))
    times: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(0)
    bandwidths = []
    for turn in range(turns):
        # What runs before a call can slow it down: no launch always follows the same one.
        for name in order.sample(names, len(names)):
            times[name].append(clock.time(launches[name], turn))
        if turn % max(1, turns // 9) == 0:
            bandwidths.append(clock.bandwidth())
    return times, statistics.median(bandwidths)


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[round(share * (len(values) - 1))]


def last_level_cache() -> int:
    """Return the bytes of this CPU's largest cache, or 32 MiB if the system does not say."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 2**10, "M": 2**20}.get(text[-1:])
        if unit and text[:-1].isdigit():
            sizes.append(int(text[:-1]) * unit)
    return max(sizes) or 32 * 2**20


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Return the norm of the difference relative to the truth's norm."""
    return ((value.double() - truth).norm() / truth.norm()).item()
