"""Measure images per second of an ImageNet recipe with the trainer and with two hand-written loops.

    python benchmarks/throughput.py --output FILE.jsonl           # on a GPU: ResNet-34 to ResNet-18 at 224 px
    python benchmarks/throughput.py --output FILE.jsonl --size 96 --batch 16                        # on a CPU

DKD as in `imagenet/r18-dkd` (alpha 1, beta 0.5, T 1), with SGD, on random uint8 images in host memory: with
transfer and normalisation, without decoding. Three variants, interleaved:

trainer   ``fastkd.train.fit_method``: the loop of `fastkd train`, with its logging and checks
bare      the same method and fused loss in a minimal loop: the difference is the trainer's overhead
plain     that loop in torch only: a teacher under no_grad, and DKD in eager operations as it is widely used

All use the same precision, memory format and compilation. A turn is ``--steps`` steps after ``--warm-up``,
between two synchronisations. The output is a header, one record per variant (images per second: median, p20,
p80) with the trainer's own split of the time, and one record with the ratios of consecutive turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastkd.bench.command import positive
from fastkd.bench.peers import masked_dkd
from fastkd.bench.protocol import percentile
from fastkd.bench.results import ResultFileError, Writer, header
from fastkd.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Normalize
from fastkd.distill import DKD
from fastkd.models import build_model
from fastkd.train import Watcher, fit_method
from fastkd.train.precision import autocast, compiled_networks

BETA, TEMPERATURE = 0.5, 1.0  # and alpha 1


class RandomBytes:
    """Random uint8 batches, of which a few are reused; not normalised."""

    mean, std = IMAGENET_MEAN, IMAGENET_STD

    def __init__(self, batches: int, shape: tuple[int, ...], classes: int, *, pinned: bool) -> None:
        self._batches = batches
        self._stored = []
        for _ in range(min(4, batches)):
            batch = torch.randint(0, 256, shape, dtype=torch.uint8), torch.randint(0, classes, shape[:1])
            self._stored.append(tuple(part.pin_memory() for part in batch) if pinned else batch)

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return (self._stored[number % len(self._stored)] for number in range(self._batches))


class Clock:
    """Seconds between two numbered steps, with the device synchronised at both."""

    def __init__(self, device: torch.device, begin: int, end: int) -> None:
        self._device, self._ends, self._times, self._steps = device, (begin, end), [], 0

    def step_done(self) -> None:
        self._steps += 1
        if self._steps in self._ends:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self._times.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        begin, end = self._times
        return end - begin


class Timed(Watcher):
    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def batch_done(self, meter: Any) -> None:
        self._clock.step_done()


class Comparison:
    """The networks and settings that all variants share."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.device, self.precision = torch.device(args.device), args.precision
        self.channels_last = args.channels_last
        teacher, student = (
            build_model(name, num_classes=args.classes).to(self.device) for name in NETWORKS[args.networks]
        )
        self.method = DKD(student, teacher, beta=BETA, temperature=TEMPERATURE, warmup_epochs=0)
        if self.channels_last:
            self.method.to(memory_format=torch.channels_last)
            teacher.to(memory_format=torch.channels_last)
        self.student, self.teacher = student, teacher
        self.begin, self.end = args.warm_up, args.warm_up + args.steps
        shape = (args.batch, 3, args.size, args.size)
        self.loader = RandomBytes(self.end, shape, args.classes, pinned=self.device.type == "cuda")
        self.validation = RandomBytes(1, (2, *shape[1:]), args.classes, pinned=False)
        self._normalize = Normalize(IMAGENET_MEAN, IMAGENET_STD, self.device)
        self.split: dict[str, float] = {}

    def optimizer(self) -> torch.optim.Optimizer:
        fused = self.device.type == "cuda"
        return torch.optim.SGD(
            self.student.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4, fused=fused
        )

    def images(self, pixels: Tensor) -> Tensor:
        images = self._normalize(pixels)
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images

    def trainer(self) -> float:
        clock = Clock(self.device, self.begin, self.end)
        result = fit_method(
            self.method,
            self.loader,
            self.validation,
            epochs=1,
            optimizer=self.optimizer(),
            precision=self.precision,
            channels_last=self.channels_last,
            watcher=Timed(clock),
        )
        self.split = {part: value for part, value in result.seconds.items() if part != "validation"}
        return clock.seconds

    def bare(self) -> float:
        def terms_of(images: Tensor, target: Tensor) -> Tensor:
            return sum(self.method((images, target)).values(), torch.zeros((), device=self.device))

        return self._loop(terms_of)

    def plain(self) -> float:
        def loss_of(images: Tensor, target: Tensor) -> Tensor:
            with torch.no_grad():
                teacher = self.teacher(images)
            student = self.student(images)
            # Autocast computes softmax in float32 too.
            student, teacher = student.float(), teacher.float()
            dkd = masked_dkd(student, teacher, target, beta=BETA, temperature=TEMPERATURE)
            return F.cross_entropy(student, target) + dkd

        return self._loop(loss_of)

    def _loop(self, loss_of: Callable[[Tensor, Tensor], Tensor]) -> float:
        clock, optimizer = Clock(self.device, self.begin, self.end), self.optimizer()
        self.method.train()
        for pixels, labels in self.loader:
            images, target = self.images(pixels), labels.to(self.device, non_blocking=True)
            with autocast(self.device, self.precision):
                loss = loss_of(images, target)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            clock.step_done()
        return clock.seconds


# Teacher and student.
NETWORKS = {
    "resnet34-resnet18": ("torchvision/resnet34", "torchvision/resnet18"),
    "resnet50-resnet18": ("torchvision/resnet50", "torchvision/resnet18"),
}
VARIANTS = ("trainer", "bare", "plain")


def main() -> None:
    args = arguments().parse_args()
    if args.device == "cpu" and args.precision == "float16":
        raise SystemExit("--precision float16 is for GPUs: these loops have no loss scale")
    settings = {key: value for key, value in vars(args).items() if key not in ("output", "device")}
    try:
        writer = Writer(args.output)
    except ResultFileError as error:
        raise SystemExit(str(error)) from None
    comparison = Comparison(args)
    with writer as output, compiled_networks(comparison.method, "inductor" if args.compile else None):
        output.write([header(args.device, {}, command=" ".join(sys.argv), settings=settings)])
        seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
        splits: list[dict[str, float]] = []
        for turn in range(args.turns):
            for variant in VARIANTS if turn % 2 else reversed(VARIANTS):
                seconds[variant].append(getattr(comparison, variant)())
            splits.append(comparison.split)
            text = ", ".join(f"{v} {args.batch * args.steps / seconds[v][-1]:.1f}" for v in VARIANTS)
            print(f"turn {turn + 1}/{args.turns}, images per second: {text}", flush=True)
        shares = shares_of(splits)
        for variant in VARIANTS:
            rates = [args.batch * args.steps / value for value in seconds[variant]]
            record: dict[str, Any] = {"kind": "throughput", "variant": variant, "turns": len(rates)}
            low, median, high = (percentile(rates, share) for share in (0.2, 0.5, 0.8))
            record |= {"images_per_second": median, "p20": low, "p80": high}
            if variant == "trainer":
                record["split"] = shares
            output.write([record])
            print(f"{variant:8} {median:9.1f} images/s ({low:.1f} to {high:.1f})")
        ratios = {
            "trainer_over_bare_seconds": ratio(seconds["trainer"], seconds["bare"]),
            "plain_over_trainer_seconds": ratio(seconds["plain"], seconds["trainer"]),
        }
        output.write([{"kind": "throughput_ratios", **ratios}])
    overhead = ratios["trainer_over_bare_seconds"] - 1
    faster = ratios["plain_over_trainer_seconds"]
    print(f"the trainer costs {overhead:+.1%} over the bare loop, and is {faster:.3f} times as fast as plain")
    print(f"its time: {', '.join(f'{part} {share:.1%}' for part, share in shares.items())}")


def shares_of(splits: list[dict[str, float]]) -> dict[str, float]:
    """The trainer's parts as shares of its time, medians over the turns."""
    wholes = [sum(split.values()) for split in splits]
    return {
        part: statistics.median(split[part] / whole for split, whole in zip(splits, wholes, strict=True))
        for part in splits[0]
    }


def ratio(numerators: list[float], denominators: list[float]) -> float:
    """Median of the ratios per turn, in which both share the machine's drift."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def arguments() -> argparse.ArgumentParser:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument("--networks", choices=NETWORKS, default="resnet34-resnet18")
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--precision", default="bfloat16" if gpu else "float32")
    parser.add_argument("--channels-last", action=argparse.BooleanOptionalAction, default=gpu)
    parser.add_argument("--compile", action="store_true", help="torch.compile of both networks")
    parser.add_argument("--batch", type=positive, default=256 if gpu else 8)
    parser.add_argument("--size", type=positive, default=224, help="side of the images, in pixels")
    parser.add_argument("--classes", type=positive, default=1000)
    parser.add_argument("--steps", type=positive, default=40 if gpu else 6, help="timed steps per turn")
    parser.add_argument("--warm-up", type=positive, default=10 if gpu else 2, help="steps before, untimed")
    parser.add_argument("--turns", type=positive, default=7)
    return parser


if __name__ == "__main__":
    main()
