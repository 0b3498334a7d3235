"""Measure a suite of cases: all variants of a case in turns, one record per variant."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

import fastkd
from fastkd.bench import cases, peers
from fastkd.bench.cases import FASTKD, AnyCase, Case
from fastkd.bench.protocol import Clock, Launch, interleaved, percentile, relative_error
from fastkd.bench.results import Record
from fastkd.messages import first_line

Inputs = tuple[Tensor, Tensor, Tensor]
C = TypeVar("C", bound=AnyCase)
# Rows of the gradient that are compared with float64: this many elements.
COMPARED_ELEMENTS = 2**21


def runner(loss: cases.Loss, backward: bool) -> Callable[[Inputs], Tensor]:
    """Return the call that is timed: the loss, or the loss and the student's gradient."""
    if backward:
        return lambda inputs: torch.autograd.grad(loss(*inputs), inputs[0])[0]

    def forward(inputs: Inputs) -> Tensor:
        with torch.no_grad():
            return loss(*inputs)

    return forward


def gradient_error(case: Case, gradient: Tensor, inputs: Inputs) -> float:
    """Return the error of the first rows' gradient relative to float64's, for the same logits."""
    rows = max(1, min(case.rows, COMPARED_ELEMENTS // case.classes))
    student, teacher, target = (x.detach()[:rows].cpu() for x in inputs)
    student = student.double().requires_grad_()
    with fastkd.use_backend("eager"):
        loss = FASTKD[case.loss](student, teacher.double(), target, reduction="sum") / case.rows
    (truth,) = torch.autograd.grad(loss, student)
    return relative_error(gradient[:rows].cpu(), truth)


def measure(case: Case, clock: Clock, chosen: set[str], *, seconds: float) -> list[Record]:
    """Return one record per variant; that of a variant that failed says why."""
    sets = [cases.make_inputs(case, clock.device, seed) for seed in range(clock.input_sets(case.bytes))]
    launches: dict[str, Launch] = {}
    records: dict[str, Record] = {}
    for name, loss in peers.variants(case.loss, chosen, clock.device).items():
        try:
            if isinstance(loss, str):
                raise ImportError(loss)
            launch = Launch(runner(loss, case.backward), sets)
            record: Record = {"kind": "loss", **case.about, "variant": name}
            value = launch.run(sets[0])  # compilation happens here
            record["gradient_error"] = (
                gradient_error(case, value, sets[0]) if case.backward and name != "quack" else None
            )
            del value
            record["extra_bytes"] = clock.extra_memory(partial(launch.run, sets[0]))
            record["host_us"] = clock.host_microseconds(launch)
            record["clock"] = clock.prepare(launch, case.bytes)
        except Exception as error:  # a peer that fails here must not end the run; it is recorded
            records[name] = failed(case, name, error)
            if clock.device == "cuda":
                torch.cuda.empty_cache()
        else:
            launches[name], records[name] = launch, record
    times, bandwidth = interleaved(clock, launches, seconds=seconds)
    for name, values in times.items():
        floor = case.bytes * 2 // 3 if name == "quack" and case.backward else case.bytes
        timed = timing(values)
        share = floor / (timed["ms"] * 1e-3) / bandwidth
        records[name].update(timed, bytes=floor, bandwidth=bandwidth, share=share)
    ours = records["fastkd"]
    if "ms" in ours:
        ours["speedup_over"] = {
            name: record["ms"] / ours["ms"]
            for name, record in records.items()
            if name != "fastkd" and "ms" in record
        }
    return list(records.values())


def failed(case: AnyCase, variant: str, error: Exception) -> Record:
    """The record of a variant that raised ``error``."""
    reason = (str(error).strip().splitlines() or [""])[0]
    return {
        "kind": "failed",
        **case.about,
        "variant": variant,
        "reason": f"{type(error).__name__}: {reason}",
    }


def timing(milliseconds: list[float]) -> Record:
    """The fields of a record that the turns of a variant give."""
    low, median, high = (percentile(milliseconds, share) for share in (0.2, 0.5, 0.8))
    return {"ms": median, "p20": low, "p80": high, "turns": len(milliseconds)}


def run_suite(
    suite: Iterable[C],
    clock: Clock,
    chosen: set[str],
    *,
    measure: Callable[..., list[Record]] = measure,
    memory: int,
    seconds: float,
    time_limit: float | None = None,
) -> Iterator[list[Record]]:
    """Yield the records of each case, by ``measure``; that of a skipped case says why."""
    begin = time.perf_counter()
    for case in suite:
        reason = cases.needs_too_much(case, memory)
        if reason is None and time_limit is not None and time.perf_counter() - begin > time_limit:
            reason = f"the time limit of {time_limit:.0f} s was reached"
        if reason is not None:
            yield [{"kind": "skipped", **case.about, "reason": reason}]
            continue
        try:
            records = measure(case, clock, chosen, seconds=seconds)
        except torch.OutOfMemoryError as error:  # of the inputs, or of all variants together
            records = [{"kind": "skipped", **case.about, "reason": first_line(error)}]
        if chosen & {"compiled", *peers.IN_COMPILED_CODE}:
            torch._dynamo.reset()
        if clock.device == "cuda":
            torch.cuda.empty_cache()
        yield records
