"""The numbers of the benchmark suite's records, from clocks that say what they are told to."""

import io
import statistics

import pytest
import torch

import fastkd
from fastkd.bench import cases, measure, peers, protocol
from fastkd.bench.cases import FASTKD, Case
from tests.bench.scripted import Scripted

SMALL = Case("kd", 8, 50, "float32", "forward+backward")


# ---- turns -----------------------------------------------------------------------------------------------


class Named(protocol.Launch):
    def __init__(self, name):
        super().__init__(lambda inputs: None, [0])
        self.name = name


@pytest.mark.parametrize(
    ("seconds", "least", "turns"), [(0.0, 7, 7), (0.0, 3, 3), (2.0, 7, 20), (0.95, 7, 9), (30.0, 7, 101)]
)
def test_turns_fill_the_seconds(ticking, seconds, least, turns):
    """Of 0.1 s for all launches; the first one of each, whose time decides, is not among them."""
    launches = {name: Named(name) for name in "ab"}

    class Clock(Scripted):
        def time(self, launch, turn):
            ticking.now += 0.05
            super().time(launch, turn)
            return 1e6 if len(self.calls) <= 2 else float(len(self.calls))

    clock = Clock()
    times, _ = protocol.interleaved(clock, launches, seconds=seconds, least=least)
    assert [len(values) for values in times.values()] == [turns] * 2
    assert max(times["a"] + times["b"]) < 1e6
    assert {(launch.name, turn) for launch, turn in clock.calls[2:]} == {
        (name, turn) for name in "ab" for turn in range(turns)
    }


def test_no_launch_always_follows_the_same_one(ticking):
    launches = {name: Named(name) for name in "abc"}
    clock = Scripted()
    protocol.interleaved(clock, launches, seconds=0.0, least=30)
    order = [launch.name for launch, _ in clock.calls[3:]]
    assert len({tuple(order[start : start + 3]) for start in range(0, len(order), 3)}) == 6


def test_the_bandwidth_is_the_median_of_copies_through_the_run(ticking):
    """The first copy warms up; nine or ten follow, and one that was disturbed does not matter."""
    clock = Scripted(bandwidths=[1e3, *range(2, 11), 1e6])
    _, bandwidth = protocol.interleaved(clock, {"a": Named("a")}, seconds=0.0, least=90)
    assert clock.copies == 1 + 9
    assert bandwidth == statistics.median(range(2, 11))
    clock = Scripted(bandwidths=[5.0, 1.0, 2.0, 90.0, 90.0])
    assert protocol.interleaved(clock, {"a": Named("a")}, seconds=0.0, least=3)[1] == 2.0


# ---- the records of a case ------------------------------------------------------------------------------


def names_its_variant(monkeypatch, module):
    """``Launch`` knows the name of its variant, in the order in which they are made."""
    made = []

    class Launch(protocol.Launch):
        def __init__(self, run, sets):
            super().__init__(run, sets)
            self.name = "abc"[len(made)]
            made.append(self)

    monkeypatch.setattr(module, "Launch", Launch)
    return made


@pytest.mark.parametrize("mode", cases.PASSES)
def test_records_are_of_what_the_clock_said(mode, monkeypatch):
    case = Case("kd", 8, 50, "float32", mode)
    made = names_its_variant(monkeypatch, measure)
    variants = {"fastkd": FASTKD["kd"], "eager": peers.EAGER["kd"], "quack": peers.EAGER["kd"]}
    monkeypatch.setattr(measure.peers, "variants", lambda *_: variants)
    # The first time of each is not counted; the median is not the mean.
    times = {
        "a": [9e9, *[2.0, 1.0, 2.0, 1.0, 30.0, 2.0, 2.0]],
        "b": [9e9, *[5.0, 5.0, 5.0, 5.0, 4.0, 90.0, 5.0]],
        "c": [9e9, *[1.0] * 7],
    }
    clock = Scripted(times, bandwidths=[1e9, 4e6])
    records = {r["variant"]: r for r in measure.measure(case, clock, set(), seconds=0.0)}
    bytes_ = (3 if mode == "forward+backward" else 2) * 8 * 50 * 4
    assert {name: record["ms"] for name, record in records.items()} == {"fastkd": 2, "eager": 5, "quack": 1}
    assert records["fastkd"]["speedup_over"] == {"eager": 2.5, "quack": 0.5}
    assert records["fastkd"]["bytes"] == records["eager"]["bytes"] == bytes_
    assert records["quack"]["bytes"] == 2 * 8 * 50 * 4  # it reads one tensor and writes one
    assert records["eager"]["share"] == pytest.approx(bytes_ / 5e-3 / 4e6)
    assert all(record["turns"] == 7 for record in records.values())
    assert all(r["extra_bytes"] == 123 and r["clock"] == "scripted" for r in records.values())
    assert [launch for launch, _ in clock.prepared] == made
    assert {of for _, of in clock.prepared} == {clock.case_bytes} == {bytes_}
    # What is counted is one call, whose result is the gradient, or the loss without a graph.
    shape = (8, 50) if mode == "forward+backward" else ()
    assert all(value.shape == shape and not value.requires_grad for value in clock.counted)
    assert records["quack"].get("gradient_error") is None


def test_input_sets_are_different_tensors(monkeypatch):
    made = names_its_variant(monkeypatch, measure)
    monkeypatch.setattr(measure.peers, "variants", lambda *_: {"fastkd": FASTKD["kd"]})
    measure.measure(SMALL, Scripted(), set(), seconds=0.0)
    (launch,) = made
    assert len(launch.sets) == 3
    assert not torch.equal(launch.sets[0][0], launch.sets[1][0])
    assert not torch.equal(launch.sets[1][1], launch.sets[2][1])


def test_inputs_are_as_the_case_says():
    case = Case("kd", 200, 100, "bfloat16", "forward")
    student, teacher, target = cases.make_inputs(case, "cpu")
    assert student.dtype == teacher.dtype == torch.bfloat16
    assert not student.requires_grad
    assert cases.make_inputs(SMALL, "cpu")[0].requires_grad
    for logits in (student, teacher):
        assert logits.float().std().item() == pytest.approx(3.0, rel=0.02)
    assert (student - teacher).float().std().item() == pytest.approx(3 * 2**0.5, rel=0.02)
    assert cases.make_inputs(Case("kd", 200, 3, "float32", "forward"), "cpu")[2].unique().tolist() == [
        0,
        1,
        2,
    ]


@pytest.mark.parametrize("reduced", [True, False], ids=["some rows", "all rows"])
def test_gradient_errors_are_of_float64_and_of_the_whole_batch(reduced, monkeypatch):
    """Of the first rows, whose gradient has the batch's 1/N; whichever backend is set."""
    if reduced:
        monkeypatch.setattr(measure, "COMPARED_ELEMENTS", 3 * 50)
    inputs = cases.make_inputs(SMALL, "cpu")
    wide = inputs[0].detach().double().requires_grad_()
    with fastkd.use_backend("eager"):
        (exact,) = torch.autograd.grad(fastkd.kd_loss(wide, inputs[1].double()), wide)
    with fastkd.use_backend("native"):
        assert measure.gradient_error(SMALL, exact, inputs) < 1e-14
        assert measure.gradient_error(SMALL, 1.01 * exact, inputs) == pytest.approx(0.01)
        exact[5:] = torch.nan
        error = measure.gradient_error(SMALL, exact, inputs)
    assert error < 1e-14 if reduced else error != error


def suite_of(*found, memory=2**30, **options):
    """The records of ``run_suite`` over the cases, each measured as ``found`` says: records, or an error."""
    results = iter(found)

    def measured(*_, **__):
        result = next(results)
        if isinstance(result, Exception):
            raise result
        return [{"kind": result}]

    chosen = options.pop("chosen", set())
    suite = [SMALL] * len(found)
    return list(
        measure.run_suite(suite, Scripted(), chosen, measure=measured, memory=memory, seconds=0, **options)
    )


def test_a_case_that_runs_out_of_memory_is_skipped_alone():
    first, second = suite_of(torch.OutOfMemoryError("2 GiB\nof 1"), "loss")
    assert first[0]["kind"] == "skipped"
    assert first[0]["reason"] == "2 GiB"
    assert first[0].items() >= SMALL.about.items()
    assert second == [{"kind": "loss"}]
    with pytest.raises(ValueError, match="no memory"):
        suite_of(ValueError("no memory"))


def test_the_memory_of_a_case():
    need = 16 * 8 * 50 * 4  # whatever the dtype, for peers convert to float32
    for dtype in ("float32", "bfloat16"):
        case = Case("kd", 8, 50, dtype, "forward")
        assert cases.needs_too_much(case, need) is None
        assert "needs up to" in cases.needs_too_much(case, need - 1)


def test_half_of_the_available_memory(monkeypatch):
    lines = io.StringIO("MemTotal: 9 kB\nMemAvailable:       2048 kB\n")
    monkeypatch.setattr(cases, "open", lambda path: lines, raising=False)
    assert cases.memory_bound("cpu") == 2**20
    monkeypatch.setattr(cases, "open", lambda path: io.StringIO(), raising=False)
    assert cases.memory_bound("cpu") == 4 * 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1000, 8000))
    assert cases.memory_bound("cuda") == 800


def test_cases_with_the_gradient_come_first():
    """A time limit leaves out the loss alone."""
    found = list(cases.suite(losses=["kd"], shapes=[(4, 10), (8, 20)], dtypes=["float32"]))
    assert [(case.mode, case.rows) for case in found] == [
        ("forward+backward", 4), ("forward+backward", 8), ("forward", 4), ("forward", 8)
    ]  # fmt: skip
    assert {case.mode for case in cases.quick_suite()} == {"forward+backward"}
    assert {case.loss for case in cases.quick_suite()} == set(cases.LOSSES)


def test_the_time_limit_lists_the_rest(ticking):
    def measured(*_, **__):
        ticking.now += 1.0
        return [{"kind": "loss"}]

    records = [
        record["kind"]
        for (record,) in measure.run_suite(
            [SMALL] * 4, Scripted(), set(), measure=measured, memory=2**30, seconds=0, time_limit=1.5
        )
    ]
    assert records == ["loss", "loss", "skipped", "skipped"]


@pytest.mark.parametrize(
    ("chosen", "resets"),
    [({"eager"}, 0), ({"compiled"}, 1), ({"fastkd-compiled"}, 1), ({"fastkd-in-place"}, 1)],
)
def test_compiled_code_of_a_case_does_not_stay(chosen, resets, monkeypatch):
    """Otherwise torch stops to compile a function after eight shapes, and runs it as eager."""
    seen = []
    monkeypatch.setattr(torch._dynamo, "reset", lambda: seen.append(1))
    suite_of("loss", chosen=chosen)
    assert len(seen) == resets


def test_a_failure_without_a_text():
    assert measure.failed(SMALL, "eager", ValueError())["reason"] == "ValueError: "
