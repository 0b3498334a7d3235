"""``fastkd bench``: measure, report or compare."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path

from fastkd.bench import cases, forms, peers
from fastkd.bench.results import ResultFileError, Writer, header
from fastkd.bench.step import PEERS as STEP_PEERS
from fastkd.bench.step import STEPS, describe, run_steps
from fastkd.command import number_from_0, positive, run_command
from fastkd.files.paths import user_path

PEERS = tuple(name for name in peers.VARIANTS if name != "fastkd")
ANY_PEER = tuple(dict.fromkeys((*PEERS, *forms.PEERS)))
DESCRIPTION = """\
Time the losses beside their peers in one run and write JSON lines; or report on such files, or compare two.
benchmarks/README.md describes the protocol."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--quick", action="store_true", help="a few cases, in under two minutes on two cores")
    what.add_argument(
        "--step", action="store_true", help="whole training steps instead of losses: the share of the loss"
    )
    what.add_argument(
        "--forms",
        action="store_true",
        help="losses of linear layers: memory and time with and without logits",
    )
    what.add_argument(
        "--report", nargs="+", type=user_path, metavar="FILE", help="make tables and pictures of result files"
    )
    what.add_argument(
        "--compare",
        nargs=2,
        type=user_path,
        metavar=("OLD", "NEW"),
        help="flag changes beyond the noise between two result files; exit status 1 on a regression",
    )
    parser.add_argument(
        "--output",
        type=user_path,
        metavar="PATH",
        help="the new result file, or with --report the new folder (default: a name with the time in it)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    parser.add_argument(
        "--losses",
        nargs="+",
        choices=list(cases.FASTKD),
        metavar="LOSS",
        help=f"{_list(cases.FASTKD)} (default: {' '.join(cases.LOSSES)})",
    )
    parser.add_argument("--shapes", nargs="+", type=shape, metavar="NxC", help="such as 256x1000 4x131072")
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=list(cases.DTYPES),
        metavar="DTYPE",
        help=f"{_list(cases.DTYPES)} (default: float32 bfloat16)",
    )
    parser.add_argument("--passes", nargs="+", choices=cases.PASSES, metavar="PASS", help=_list(cases.PASSES))
    parser.add_argument("--peers", nargs="*", choices=ANY_PEER, metavar="PEER", help=_list(ANY_PEER))
    parser.add_argument(
        "--steps", nargs="+", choices=list(STEPS), metavar="STEP", help=f"with --step, {_list(STEPS)}"
    )
    parser.add_argument("--batch", type=positive, metavar="N", help="with --step: the batch size")
    parser.add_argument(
        "--seconds",
        type=number_from_0,
        default=1.0,
        metavar="S",
        help="time for one case, without compilation (default: 1)",
    )
    parser.add_argument(
        "--time-limit",
        type=number_from_0,
        metavar="S",
        help="start no case after this many seconds; the rest is listed as skipped",
    )
    parser.add_argument(
        "--memory",
        type=number_from_0,
        metavar="GIB",
        help="skip cases that may need more (default: from the free memory)",
    )


# Options that would be ignored, by what is measured.
_NOT_READ = {
    "step": ("losses", "shapes", "dtypes", "passes", "memory", "time_limit"),
    "forms": ("passes", "steps", "batch"),
    "quick": ("losses", "shapes", "dtypes", "passes", "steps", "batch"),
    "": ("steps", "batch"),
}


def run(args: argparse.Namespace) -> int:
    """Return the exit status: 0, 1 for a regression or a failure of fastkd itself, 2 for bad input."""
    try:
        if args.report:
            from fastkd.bench.report import write_report

            folder = args.output or Path(f"bench-report-{_now()}")
            print(write_report(args.report, folder))
            return 0
        if args.compare:
            from fastkd.bench.compare import compare

            text, regressions = compare(*args.compare)
            print(text)
            return 1 if regressions else 0
        return _measure(args)
    except ResultFileError as error:
        print(f"fastkd bench: error: {error}", file=sys.stderr)
        return 2


def _measure(args: argparse.Namespace) -> int:
    import torch

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        print("fastkd bench: error: --device cuda, but torch finds no GPU here", file=sys.stderr)
        return 2
    mode = next((name for name in _NOT_READ if name and getattr(args, name)), "")
    known = {"forms": forms.PEERS, "step": STEP_PEERS}.get(mode, PEERS)
    if wrong := [name for name in args.peers or () if name not in known]:
        why = f"is {'without' if args.forms else 'with'} --forms only"
        if mode == "step":
            why = f"has no effect with --step; its peers are {' and '.join(STEP_PEERS)}"
        print(f"fastkd bench: error: --peers {wrong[0]} {why}", file=sys.stderr)
        return 2
    if unread := [name for name in _NOT_READ[mode] if getattr(args, name) is not None]:
        when = f"with --{mode}" if mode else "without --step"
        print(f"fastkd bench: error: --{unread[0].replace('_', '-')} has no effect {when}", file=sys.stderr)
        return 2
    path = args.output or Path(f"bench-{device}-{_now()}.jsonl")
    cannot = forms.not_measured(device) if args.forms else peers.not_measured(device)
    absent = {name: reason for name, reason in cannot.items() if name in known}
    for name in known:
        if args.peers is not None and name not in {*args.peers, peers.in_force(device)}:
            absent.setdefault(name, "not asked for (--peers)")
        elif args.peers is None and name in peers.IN_COMPILED_CODE:
            absent.setdefault(name, "only where --peers names it")
    about = header(device, absent, command=" ".join(sys.argv[1:]))
    hidden = ("kind", "command", "not_measured")
    print(
        ", ".join(f"{key} {value}" for key, value in about.items() if key not in hidden and value is not None)
    )
    for name, reason in absent.items():
        print(f"not measured: {name}: {reason}")
    if (about.get("load") or 0) > 0.5:
        print(
            f"this machine is busy (load {about['load']} on {about['cores']} cores): times of threads that "
            "wait for other processes cannot be trusted",
            file=sys.stderr,
        )
    begin = time.perf_counter()
    failed = 0
    with Writer(path) as writer:
        writer.write([about])
        for records in _records(args, device, set(known) - set(absent)):
            writer.write(records)
            for record in records:
                failed += record["kind"] == "failed" and record["variant"] == "fastkd"
            print(_line(records), flush=True)
    print(
        f"{path} written in {time.perf_counter() - begin:.0f} s; tables and pictures: "
        f"fastkd bench --report {path}"
    )
    return 1 if failed else 0


def _records(args: argparse.Namespace, device: str, chosen: set[str]) -> Iterator[list[dict]]:
    if args.step:
        yield from run_steps(args.steps, device, chosen, batch=args.batch, seconds=args.seconds)
        return
    from fastkd.bench.measure import run_suite
    from fastkd.bench.protocol import make_clock

    bounds = {
        "memory": cases.memory_bound(device) if args.memory is None else int(args.memory * 2**30),
        "seconds": args.seconds,
        "time_limit": args.time_limit,
    }
    if args.forms:
        layers = forms.suite(args.losses, args.shapes, args.dtypes)
        yield from run_suite(layers, make_clock(device), chosen, measure=forms.measure, **bounds)
        return
    if args.quick:
        suite = cases.quick_suite()
    else:
        suite = cases.suite(
            losses=args.losses or cases.LOSSES,
            shapes=args.shapes or cases.SHAPES,
            dtypes=args.dtypes or ("float32", "bfloat16"),
            passes=args.passes or cases.PASSES,
        )
    yield from run_suite(suite, make_clock(device), chosen, **bounds)


def _line(records: list[dict]) -> str:
    """Return one case as one line."""
    first = records[0]
    if "step" in first:
        return "\n".join(map(describe, records))
    if "student_width" in first:
        return forms.describe(records)
    shape = f"{first['rows']:5d} x {first['classes']:<7d}"
    head = f"{first['loss']:14s} {shape} {first['dtype']:8s} {first['pass']:16s}"
    if first["kind"] == "skipped":
        return f"{head} skipped: {first['reason']}"
    parts = []
    for record in records:
        if record["kind"] == "failed":
            parts.append(f"{record['variant']} failed: {record['reason']}")
            continue
        parts.append(f"{record['variant']} {record['ms']:.3f} ms")
        if record["variant"] == "fastkd":
            parts[-1] += f" ({record['share']:.0%} of a copy)"
    return f"{head} {', '.join(parts)}"


def shape(text: str) -> tuple[int, int]:
    rows, cross, classes = text.lower().partition("x")
    if not (cross and rows.isdigit() and classes.isdigit() and int(rows) >= 1 and int(classes) >= 3):
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; expected rows x classes such as 256x1000")
    return int(rows), int(classes)


def _list(names: Iterable[str]) -> str:
    return "among " + ", ".join(names)


def _now() -> str:
    return datetime.now().strftime("%Y%m%d-%H%M%S")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fastkd bench")
    add_arguments(parser)
    return run_command(lambda: run(parser.parse_args(argv)))
