"""Measure what each method costs per step, in time and memory, against KD.

    python benchmarks/cost_of_methods.py --output FILE.jsonl           # ResNet-34 to ResNet-18, 224 px
    python benchmarks/cost_of_methods.py --output FILE.jsonl --pair resnet32x4-resnet8x4
    python benchmarks/cost_of_methods.py --report docs/reports/imagenet.md FILE.jsonl…

A step is the teacher's pass, the student's, the method's loss, backward, alignment and SGD's step, on random
images that are on the device already. Time: all methods take turns in one process, with the same networks and
in alternating order; the ratio is the median over the turns of the method's time by KD's. On a CPU it is the
processor's time of a single thread, which other work on the machine hardly changes. Memory: networks, heads
and optimizer, and the peak of torch's allocator during a step; on a CPU in a process per method, on a GPU in
one process, where the allocator's own statistics need no fresh one.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastkd.bench.command import positive
from fastkd.bench.protocol import make_clock, percentile
from fastkd.bench.report import table
from fastkd.bench.results import ResultFileError, Writer, header, read
from fastkd.bench.sections import write_section
from fastkd.distill import find_method
from fastkd.models import build_model
from fastkd.train.precision import autocast


@dataclass(frozen=True)
class Pair:
    teacher: str
    student: str
    classes: int
    size: int
    batch: dict[str, int]  # by device


PAIRS = {
    "resnet34-resnet18": Pair(
        "torchvision/resnet34", "torchvision/resnet18", 1000, 224, {"cpu": 4, "cuda": 128}
    ),
    "resnet32x4-resnet8x4": Pair("resnet32x4", "resnet8x4", 100, 32, {"cpu": 16, "cuda": 64}),
}
_HINT = {"hint_layer": "layer3", "hint_weight": 1.0, "hint_projection": "linear"}
_RELATIONS = {"distance_weight": 25.0, "angle_weight": 50.0}
# Label, method, options; both pairs have layers of these names.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "labels alone": ("cross_entropy", {}),
    "KD": ("kd", {}),
    "LSKD": ("lskd", {}),
    "DKD": ("dkd", {}),
    "DCKD": ("dckd", {}),
    "DCKD + hint": ("dckd", _HINT),
    "DCKD + hint + relations": ("dckd", _HINT | _RELATIONS),
    "NKD": ("nkd", {}),
    "BinaryKL-Norm": ("binary_kl_norm", {}),
    "FitNets": ("fitnets", _HINT),
    "RKD": ("rkd", _RELATIONS),
    "DHKD, linear, not aligned": ("dhkd", {"head": "linear", "align": "none"}),
    "DHKD, not aligned": ("dhkd", {"align": "none"}),
    "DHKD, aligned over shared": ("dhkd", {"align": "shared"}),
    "DHKD": ("dhkd", {}),
    "MHKD, two stages": ("mhkd", {"layers": ["layer2", "layer3"]}),
}


class Steps:
    """Networks and a batch, and for each method a function that does one step."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.pair = PAIRS[args.pair]
        self.device, self.precision = torch.device(args.device), args.precision
        layout = torch.channels_last if args.channels_last else torch.contiguous_format
        self.teacher, self.student = (
            build_model(name, num_classes=self.pair.classes).to(self.device, memory_format=layout)
            for name in (self.pair.teacher, self.pair.student)
        )
        shape = (args.batch, 3, self.pair.size, self.pair.size)
        images = torch.randn(shape, device=self.device).contiguous(memory_format=layout)
        self.batch = images, torch.randint(0, self.pair.classes, shape[:1], device=self.device)

    def of(self, label: str) -> tuple[Callable[[], None], Callable[[], int]]:
        """A step of the method, and the bytes of what stays between steps."""
        name, options = METHODS[label]
        torch.manual_seed(0)
        method = find_method(name)(self.student, self.teacher, example=self.batch[0][:2], **options)
        method.to(self.device).train()
        optimizer = torch.optim.SGD(method.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4)

        def step() -> None:
            with autocast(self.device, self.precision):
                terms = method(self.batch)
            method.backward(terms)
            method.finish_gradients()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        def held() -> int:
            teacher = [] if name == "cross_entropy" else _tensors(self.teacher)
            moments = [
                value
                for state in optimizer.state.values()
                for value in state.values()
                if torch.is_tensor(value)
            ]
            return sum(tensor.nbytes for tensor in (*teacher, *_tensors(method), *moments))

        return step, held

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def time_methods(labels: list[str], args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds per step of each turn."""
    steps = Steps(args)
    step_of = {label: steps.of(label)[0] for label in labels}
    clock = time.perf_counter if args.device == "cuda" else time.process_time

    def seconds(label: str) -> float:
        steps.synchronize()
        begin = clock()
        for _ in range(args.steps):
            step_of[label]()
        steps.synchronize()
        return (clock() - begin) / args.steps

    begin = time.perf_counter()
    for label in labels:
        for _ in range(args.warm_up):
            step_of[label]()
    taken: dict[str, list[float]] = {label: [] for label in labels}
    for turn in range(args.turns):
        turn_begin = time.perf_counter()
        for label in labels if turn % 2 else reversed(labels):
            taken[label].append(seconds(label))
        now = time.perf_counter()
        if args.time_limit is not None and now - begin + (now - turn_begin) > args.time_limit:
            break
    return taken


def peak_of(label: str, args: argparse.Namespace) -> dict[str, int | None]:
    """Bytes that stay between the steps, and the peak during one."""
    step, held = Steps(args).of(label)
    for _ in range(2):  # the second has the optimizer's moments
        step()
    extra = make_clock(args.device).extra_memory(step)
    return {"held": held(), "peak": None if extra is None else held() + extra}


def peaks(labels: list[str], args: argparse.Namespace) -> dict[str, dict[str, int | None]]:
    if args.device == "cuda":
        return {label: peak_of(label, args) for label in labels}
    # Forked before the first computation, so that a child has no threads to miss.
    context = multiprocessing.get_context("fork")
    found = {}
    for label in labels:
        with context.Pool(1) as pool:
            found[label] = pool.apply(peak_of, (label, args))
    return found


def main() -> None:
    args = arguments()
    if args.report is not None:
        report(args.report, args.files)
        return
    if args.output is None:
        raise SystemExit("--output FILE.jsonl or --report FILE.md is needed")
    labels = [label for label in METHODS if label in args.methods or label == "KD"]
    settings = {key: value for key, value in vars(args).items() if key not in ("output", "report", "files")}
    try:
        writer = Writer(args.output)
    except ResultFileError as error:
        raise SystemExit(str(error)) from None
    with writer as output:
        output.write([header(args.device, {}, command=_command(), settings=settings)])
        memory = peaks(labels, args) if args.memory else {}
        seconds = time_methods(labels, args) if args.turns else {}
        for label in labels:
            record: dict[str, Any] = {
                "kind": "method",
                "label": label,
                "pair": args.pair,
                "batch": args.batch,
            }
            if seconds:
                low, median, high = (1e3 * percentile(seconds[label], share) for share in (0.2, 0.5, 0.8))
                ratios = [a / b for a, b in zip(seconds[label], seconds["KD"], strict=True)]
                record |= {"ms": median, "p20": low, "p80": high, "turns": len(ratios)}
                record |= {"over_kd": statistics.median(ratios), "spread": [min(ratios), max(ratios)]}
            record |= memory.get(label, {})
            output.write([record])
            print("  ".join(filter(None, _cells(record, memory.get("KD", {})))), flush=True)


def _cells(record: dict[str, Any], kd: dict[str, Any]) -> list[str]:
    cells = [record["label"], "", "", "", ""]
    if "ms" in record:
        low, high = record["spread"]
        cells[1:3] = [f"{record['ms']:.1f}", f"{record['over_kd']:.3f} ({low:.3f} to {high:.3f})"]
    if record.get("peak") is not None:
        over = f" ({record['peak'] / kd['peak']:.3f})" if kd.get("peak") else ""
        cells[3:] = [f"{record['held'] / 2**20:.1f}", f"{record['peak'] / 2**20:.1f}{over}"]
    return cells


def report(path: Path, files: list[Path]) -> None:
    """One table per pair and device, in a section of ``path``; files of one pair and batch are joined."""
    joined: dict[object, tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]] = {}
    for file in files:
        about, records = read(file)
        settings = about["settings"]
        key = about["name"], settings["pair"], settings["batch"], settings["precision"]
        headers, by_label = joined.setdefault(key, ([], {}))
        headers.append(about)
        for record in records:
            by_label[record["label"]] = by_label.get(record["label"], {}) | record
    parts = [_table(headers, by_label) for headers, by_label in joined.values()]
    body = """
Time and memory of a step of each method, without data loading. All methods of a table took turns in one
process; the ratio is the median over the turns, with the smallest and the largest. On a CPU it is the
processor's time of a single thread, which other work on the machine hardly changes. Held: weights, heads and
optimizer between the steps; peak: the most that torch's allocator held during a step, with these. DHKD aligns
by default, with one more backward pass through the student; “not aligned” is the same without. Hints are on
`layer3`, MHKD's heads on `layer2` and `layer3`. On a GPU `benchmarks/on_gpu.sh` measures the same.

"""
    write_section(path, "ImageNet at scale", "Cost of a method", body + "\n\n".join(parts))


def _table(headers: list[dict[str, Any]], by_label: dict[str, dict[str, Any]]) -> str:
    about, kd = headers[0], by_label["KD"]
    settings = about["settings"]
    pair = PAIRS[settings["pair"]]
    layout = ", channels_last" if settings["channels_last"] else ""
    threads = f", {about['threads']} threads" if "threads" in about else ""
    commands = "\n".join(f"    {header['command']}" for header in headers)
    unit = "ms per step" if about["device"] == "cuda" else "CPU ms per step"
    columns = ["method", unit, "time by KD's (least to most)", "held, MiB", "peak, MiB (by KD's)"]
    return (
        f"**{pair.teacher} → {pair.student}**, {pair.size} px, {settings['batch']} images per step, "
        f"{settings['precision']}{layout}; {kd.get('turns', 0)} turns. {about['name']}{threads}, torch "
        f"{about['torch']}, Python {about['python']}, {about['date'][:10]}.\n\n{commands}\n\n"
        + table(columns, [_cells(by_label[label], kd) for label in METHODS if label in by_label])
    )


def _command() -> str:
    return " ".join(["python", "benchmarks/cost_of_methods.py", *sys.argv[1:]])


def arguments() -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--output", type=Path, metavar="FILE.jsonl")
    parser.add_argument("--report", type=Path, metavar="FILE.md", help="write a section from result files")
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE.jsonl", help="result files for --report")
    parser.add_argument("--pair", choices=PAIRS, default="resnet34-resnet18")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="LABEL")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu")
    parser.add_argument("--precision", choices=("float32", "bfloat16"))
    parser.add_argument("--channels-last", action=argparse.BooleanOptionalAction)
    parser.add_argument("--batch", type=positive, help="images per step")
    parser.add_argument("--steps", type=positive, default=5 if gpu else 1, help="per turn")
    parser.add_argument("--warm-up", type=positive, default=3 if gpu else 1, help="steps before, untimed")
    parser.add_argument("--turns", type=int, default=7, help="0: no timing")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="no further turn beyond it")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    args.precision = args.precision or ("bfloat16" if on_gpu else "float32")
    args.channels_last = on_gpu if args.channels_last is None else args.channels_last
    if not on_gpu:
        torch.set_num_threads(1)
    args.batch = args.batch or PAIRS[args.pair].batch[args.device]
    return args


if __name__ == "__main__":
    main()
