"""Time the plans of both fused backends on a GPU: each constant of the planners with other values, in turns.

    python benchmarks/plans.py --output FILE.jsonl [--losses kd dkd] [--shapes 8192x32768] [--time-limit 60]

A variant changes the constants that its name says, of KINDS in ``fastkd/ops/plan.py`` for Triton and of
``fastkd/ops/team_plan.py`` for native, for a loss with its gradient in bfloat16. Of variants with equal
plans one is timed. The output is a header and one record per case: the bandwidth of a copy in the same run,
and of each variant its plan, milliseconds (median, p20, p80), share of a copy, and how far its gradient is
from that of the unchanged Triton plan, relative to the norm.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fastkd
from fastkd.bench.cases import FASTKD, Case, make_inputs
from fastkd.bench.command import shape
from fastkd.bench.measure import runner, timing
from fastkd.bench.protocol import Clock, Launch, interleaved, make_clock, relative_error
from fastkd.bench.results import ResultFileError, Writer, header
from fastkd.command import positive
from fastkd.ops import plan, team_plan
from fastkd.ops.spec import CASES, needs_of

DTYPE = "bfloat16"
SHAPES = (
    (8192, 32768), (4096, 131072), (256, 1_000_000), (8192, 1000), (2048, 8192), (256, 1000), (4, 1_000_000),
)  # fmt: skip
# Of KINDS, for rows of one tile and for streamed ones.
OF_TILES = {"per_warp": (128, 256, 512, 1024, 2048)}
STREAMED = {
    "warps": (4, 8, 16), "loads": (1, 2, 4), "programs": (1, 2, 3, 4, 6), "registers": (None, 64, 80, 128),
}  # fmt: skip
# Several together: as many threads on a multiprocessor, and as many loads of a thread.
TOGETHER = (
    {"warps": 4, "programs": 6}, {"warps": 16, "programs": 1}, {"warps": 4, "loads": 4},
    {"warps": 16, "loads": 1}, {"warps": 4, "programs": 4, "registers": 128},
    {"programs": 2, "registers": 128}, {"programs": 2, "registers": 128, "loads": 4},
)  # fmt: skip
OF_TEAMS = {
    "BLOCK": (128, 512), "VECTORS_PER_THREAD": (2, 4, 16), "VECTORS_PER_CLUSTER_THREAD": (4, 8, 32),
    "BLOCKS_PER_MULTIPROCESSOR": (1, 2, 4), "BUSY_THREADS": (128, 512, 1024), "SMALL_BLOCK": (64, 256),
    "MAX_BLOCKS": (4, 16),
}  # fmt: skip
TEAMS_TOGETHER = (
    {"BLOCK": 512, "BLOCKS_PER_MULTIPROCESSOR": 2}, {"BLOCK": 128, "BLOCKS_PER_MULTIPROCESSOR": 6},
    {"BLOCK": 512, "BLOCKS_PER_MULTIPROCESSOR": 1},
    {"VECTORS_PER_CLUSTER_THREAD": 8, "BLOCKS_PER_MULTIPROCESSOR": 2},
    {"VECTORS_PER_CLUSTER_THREAD": 32, "BLOCKS_PER_MULTIPROCESSOR": 2},
    {"MAX_BLOCKS": 16, "BLOCKS_PER_MULTIPROCESSOR": 2}, {"MAX_BLOCKS": 16, "BLOCKS_PER_MULTIPROCESSOR": 1},
    {"MAX_BLOCKS": 16, "BLOCK": 512, "BLOCKS_PER_MULTIPROCESSOR": 1},
)  # fmt: skip

Values = dict[str, Any]


def kind_of(case: Case) -> str:
    loss, of = CASES[case.loss]
    return plan.kind_of(loss.family, needs_of(loss, of.options, of.labelled))


@contextmanager
def changed(kind: str, values: Values) -> Iterator[None]:
    """The planners with other constants; ``values`` are fields of ``KINDS[kind]`` or names of team_plan."""
    kinds, teams = dict(plan.KINDS), {name: getattr(team_plan, name) for name in OF_TEAMS}
    of_kind = {name: value for name, value in values.items() if name not in teams}
    plan.KINDS[kind] = plan.KINDS[kind]._replace(**of_kind)
    vars(team_plan).update({name: value for name, value in values.items() if name in teams})
    team_plan.plan_team.cache_clear()
    try:
        yield
    finally:
        plan.KINDS.update(kinds)
        vars(team_plan).update(teams)
        team_plan.plan_team.cache_clear()


def variants(case: Case, backend: str, device: torch.device) -> dict[str, tuple[Values, Any]]:
    """The constants of each variant and its plan, by name; the first is the unchanged one."""
    kind, rereads = kind_of(case), CASES[case.loss][0].family != "pointwise"
    if backend == "native":
        one_by_one = OF_TEAMS
        together: tuple[Values, ...] = TEAMS_TOGETHER
    elif case.classes <= plan.KINDS[kind].longest:
        one_by_one, together = OF_TILES, ()
    else:
        one_by_one, together = STREAMED, TOGETHER
    singles = ({name: value} for name, choices in one_by_one.items() for value in choices)
    found: dict[str, tuple[Values, Any]] = {}
    plans = set()
    for changes in itertools.chain([{}], singles, together):
        with changed(kind, changes):
            made = _plan(case, backend, kind, device, rereads)
        if made not in plans:
            plans.add(made)
            name = " ".join([backend, *(f"{key}={value}" for key, value in changes.items())])
            found[name] = changes, made
    return found


def _plan(case: Case, backend: str, kind: str, device: torch.device, rereads: bool) -> Any:
    on = plan.device_of(device)
    if backend == "triton":
        return plan.plan_rows(kind, case.rows, case.classes, 2, on)
    return team_plan.plan_team(case.rows, case.classes, 4, on.capability, on.multiprocessors, rereads)


def launch(case: Case, backend: str, kind: str, values: Values, inputs: Any) -> Launch:
    call = runner(FASTKD[case.loss], case.backward)

    def run(inputs: Any) -> Any:
        with fastkd.use_backend(backend), changed(kind, values):
            return call(inputs)

    return Launch(run, [inputs])


def measure(case: Case, clock: Clock, seconds: float) -> dict[str, Any]:
    """The record of a case."""
    device = torch.device(clock.device)
    inputs = make_inputs(case, clock.device)
    kind = kind_of(case)
    launches: dict[str, Launch] = {}
    found: dict[str, dict[str, Any]] = {}
    truth = None
    for backend in ("triton", "native"):
        for name, (values, made) in variants(case, backend, device).items():
            timed = launch(case, backend, kind, values, inputs)
            try:
                gradient = timed.run(inputs)[: max(1, 2**22 // case.classes)].double()
                clock.prepare(timed, case.bytes)
            except Exception as error:  # too much shared memory, say: recorded
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                found[name] = {"plan": str(made), "failed": reason}
                continue
            truth = gradient if truth is None else truth
            found[name] = {"plan": str(made), "from_first": relative_error(gradient, truth)}
            launches[name] = timed
    times, bandwidth = interleaved(clock, launches, seconds=seconds)
    for name, values in times.items():
        timed = timing(values)
        found[name] |= timed | {"share": case.bytes / (timed["ms"] * 1e-3) / bandwidth}
    return {"kind": "plans", **case.about, "bandwidth": bandwidth, "variants": found}


def _line(record: dict[str, Any]) -> str:
    timed = {name: found for name, found in record["variants"].items() if "ms" in found}
    best = sorted(timed, key=lambda name: timed[name]["ms"])[:4]
    words = ", ".join(
        f"{name} {timed[name]['ms']:.4f} ({timed[name]['share']:.0%})"
        for name in dict.fromkeys(["triton", "native", *best]) if name in timed
    )  # fmt: skip
    worst = max((found["from_first"] for found in timed.values()), default=0.0)
    case = f"{record['loss']} {record['rows']} x {record['classes']}"
    return f"{case}: {words}; gradients differ by {worst:.0e}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the new result file")
    losses = {"nargs": "+", "choices": list(FASTKD), "metavar": "LOSS", "default": ["kd", "dkd", "ce-kd"]}
    parser.add_argument("--losses", **losses)
    parser.add_argument("--shapes", nargs="+", type=shape, default=SHAPES, metavar="NxC")
    parser.add_argument("--seconds", type=float, default=0.3, metavar="S", help="for one case (default: 0.3)")
    limit_help = "start no case after this many seconds"
    parser.add_argument("--time-limit", type=positive, metavar="S", help=limit_help)
    device_help = "default: cuda; on a CPU only the script can be tried"
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help=device_help)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("plans.py: error: --device cuda, but torch finds no GPU here", file=sys.stderr)
        return 2
    clock, begin = make_clock(args.device), time.perf_counter()
    try:
        with Writer(args.output) as writer:
            writer.write([header(args.device, {}, command=" ".join(sys.argv[1:]))])
            for (rows, classes), loss in itertools.product(args.shapes, args.losses):
                if args.time_limit is not None and time.perf_counter() - begin > args.time_limit:
                    print(f"{loss} {rows} x {classes}: not timed, the time limit was reached")
                    continue
                record = measure(Case(loss, rows, classes, DTYPE, "forward+backward"), clock, args.seconds)
                writer.write([record])
                print(_line(record), flush=True)
                if args.device == "cuda":
                    torch.cuda.empty_cache()
    except ResultFileError as error:
        print(f"plans.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
