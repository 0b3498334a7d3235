"""What the clocks of the benchmark suite time and count, in which units: here time passes only in calls."""

from types import SimpleNamespace

import pytest
import torch

from fastkd.bench import measure, protocol


def test_turns_go_through_the_input_sets_in_milliseconds(ticking, monkeypatch):
    taken = []

    def run(inputs):
        taken.append(inputs)
        ticking.now += 0.25

    monkeypatch.setitem(protocol.COPY_BYTES, "cpu", 1000)
    clock, launch = protocol.CPUClock(), protocol.Launch(run, "abc")
    assert clock.prepare(launch, 1) == "perf_counter"
    assert taken == ["a", "b"]  # warm-up
    assert [clock.time(launch, turn) for turn in range(4)] == [250.0] * 4
    assert taken[2:] == ["a", "b", "c", "a"]


def test_the_bandwidth_of_a_copy_counts_both_ways(ticking, monkeypatch):
    monkeypatch.setitem(protocol.COPY_BYTES, "cpu", 1000)
    clock = protocol.CPUClock()

    class Target:
        def copy_(self, source):
            assert len(source) == 1000
            ticking.now += 0.5

    clock._target = Target()
    assert clock.bandwidth() == 4000


@pytest.mark.parametrize(("case_bytes", "sets"), [(1, 16), (500, 4), (700, 3), (1000, 2), (10_000, 2)])
def test_input_sets_hold_twice_the_cache(case_bytes, sets, monkeypatch):
    monkeypatch.setattr(protocol, "last_level_cache", lambda: 1000)
    monkeypatch.setitem(protocol.COPY_BYTES, "cpu", 8)
    assert protocol.CPUClock().input_sets(case_bytes) == sets


def test_the_largest_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(protocol, "Path", lambda path: tmp_path)
    assert protocol.last_level_cache() == 32 * 2**20
    for index, text in enumerate(("32K", "3M\n", "1024K", "?")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(text)
    assert protocol.last_level_cache() == 3 * 2**20
    (tmp_path / "index1" / "size").write_text("64K")
    assert protocol.last_level_cache() == 2**20


def test_the_memory_of_a_cpu_call_is_the_peak_in_order_of_time(monkeypatch):
    """Whatever the order of the profiler's events, of which not all are of memory."""
    changes = [(4, 30, "[memory]"), (1, 100, "[memory]"), (3, -100, "[memory]"), (2, 1000, "aten::add")]

    def event(start, size, name):
        return SimpleNamespace(start_ns=lambda: start, nbytes=lambda: size, name=lambda: name)

    class Profile:
        def __init__(self, **options):
            assert options["profile_memory"]
            results = SimpleNamespace(events=lambda: [event(*change) for change in changes])
            self.profiler = SimpleNamespace(kineto_results=results)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setitem(protocol.COPY_BYTES, "cpu", 8)
    assert protocol.CPUClock().extra_memory(lambda: None) == 100
    monkeypatch.setattr(Profile, "__enter__", lambda self: SimpleNamespace(profiler=None))
    assert protocol.CPUClock().extra_memory(lambda: None) is None  # unknown, and not 0


def test_percentiles_and_errors():
    values = [5.0, 1.0, 4.0, 2.0, 3.0, 6.0]
    assert [protocol.percentile(values, share) for share in (0, 0.2, 0.5, 0.8, 1)] == [1, 2, 3, 5, 6]
    assert measure.timing([*map(float, range(10, -1, -1))]) == {"ms": 5, "p20": 2, "p80": 8, "turns": 11}
    truth = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert protocol.relative_error(torch.tensor([3.0, 4.5]), truth) == pytest.approx(0.1)
    assert protocol.relative_error(2 * truth.float(), truth) == pytest.approx(1.0)


# ---- the GPU's clock, with what it calls recorded --------------------------------------------------------


@pytest.fixture
def on_gpu(monkeypatch):
    """A GPUClock whose events, flush and sleep are noted in ``clock.log``; time passes only in calls."""
    log, now = [], SimpleNamespace(ms=0.0)

    class Event:
        def __init__(self, name):
            self.name, self.at = name, None

        def record(self):
            self.at = now.ms
            log.append(self.name)

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, end):
            return end.at - self.at

    clock = protocol.GPUClock.__new__(protocol.GPUClock)
    clock._begin, clock._end = Event("begin"), Event("end")
    clock._flush = SimpleNamespace(zero_=lambda: log.append("flush"))
    clock.log, clock.now = log, now
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append(f"sleep {cycles}"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("synchronize"))
    return clock


def test_a_gpu_call_is_timed_alone_after_a_flush(on_gpu):
    def run(inputs):
        on_gpu.log.append(f"run {inputs}")
        on_gpu.now.ms += 3.0

    launch = protocol.Launch(run, "ab")
    assert on_gpu.time(launch, 1) == 3.0
    # The GPU waits before the first event, so that the host's part does not count.
    assert on_gpu.log == ["flush", "sleep 4000000", "begin", "run b", "end", "wait"]
    on_gpu.log.clear()
    launch.graph = SimpleNamespace(replay=lambda: on_gpu.log.append("replay"))
    on_gpu.time(launch, 1)
    assert on_gpu.log == ["flush", "begin", "replay", "end", "wait"]
    assert on_gpu.input_sets(1) == 1


def test_the_bandwidth_of_a_gpu(on_gpu, monkeypatch):
    monkeypatch.setitem(protocol.COPY_BYTES, "cuda", 1000)

    class Target:
        def copy_(self, source):
            on_gpu.now.ms += 250.0

    on_gpu._source, on_gpu._target = None, Target()
    assert on_gpu.bandwidth() == 8000
    assert on_gpu.log[:2] == ["flush", "begin"]


def test_the_host_time_of_a_gpu_call(on_gpu, ticking):
    """Each with an idle GPU, until it returns: in microseconds, the median of 21."""
    durations = iter([*range(1, 11), 50, *range(1001, 1011)])

    def run(inputs):
        ticking.now += next(durations) * 1e-6
        on_gpu.log.append("run")

    assert on_gpu.host_microseconds(protocol.Launch(run, "a")) == pytest.approx(50)
    assert on_gpu.log == ["synchronize", "run"] * 21 + ["synchronize"]


def test_the_memory_of_a_gpu_call_is_its_peak_above_what_was_there(on_gpu, monkeypatch):
    held = SimpleNamespace(now=100, peak=900)

    def call():
        held.peak = max(held.peak, held.now + 70)

    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: held.now)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: held.peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: setattr(held, "peak", held.now))
    assert on_gpu.extra_memory(call) == 70
