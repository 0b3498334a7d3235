"""Time whole training steps with the loss of each variant: the loss's share of a step."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastkd.bench import peers
from fastkd.bench.measure import timing
from fastkd.bench.protocol import MOST_TURNS
from fastkd.bench.results import Record

# 0.1 CE + 0.9 KD at T 4: the most common recipe; one pass for the fused loss.
LOSS = "ce-kd"
PEERS = ("eager", "compiled")
PARTS = ("data", "teacher", "student forward", "loss", "student backward", "optimizer")


@dataclass(frozen=True)
class Setup:
    """Networks, image shape and classes; built only when measured."""

    networks: Callable[[], tuple[nn.Module, nn.Module]]
    image: tuple[int, int, int]
    classes: int
    batch: dict[str, int]  # by device


def _resnets() -> tuple[nn.Module, nn.Module]:
    from torchvision.models import resnet18, resnet34

    return resnet18(), resnet34()


def _glyph_networks(classes: int) -> tuple[nn.Module, nn.Module]:
    from fastkd.models import GlyphCNN

    return GlyphCNN(classes, width=6), GlyphCNN(classes, width=24)


STEPS = {
    "resnet": Setup(_resnets, (3, 224, 224), 1000, {"cpu": 8, "cuda": 128}),
    "glyph-2263": Setup(lambda: _glyph_networks(2263), (1, 32, 32), 2263, {"cpu": 128, "cuda": 1024}),
    "glyph-20902": Setup(lambda: _glyph_networks(20902), (1, 32, 32), 20902, {"cpu": 128, "cuda": 1024}),
}


def run_steps(
    names: Sequence[str] | None, device: str, chosen: set[str], *, batch: int | None, seconds: float
) -> Iterator[list[Record]]:
    """Yield one record per variant and step; a step without its networks gives one that says why."""
    for name in names or STEPS:
        try:
            yield measure_step(name, device, chosen, batch=batch, seconds=seconds)
        except ImportError as error:
            yield [{"kind": "skipped", "step": name, "reason": f"{error}"}]


def measure_step(
    name: str, device: str, chosen: set[str], *, batch: int | None, seconds: float
) -> list[Record]:
    """Time the variants in turns, one step each, on the same networks and synthetic images in bytes."""
    setup = STEPS[name]
    torch.manual_seed(0)
    student, teacher = (network.to(device) for network in setup.networks())
    teacher.eval().requires_grad_(False)
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3, momentum=0.9)
    size = batch or setup.batch[device]
    pixels = torch.randint(0, 256, (size, *setup.image), dtype=torch.uint8)
    target = torch.randint(0, setup.classes, (size,))
    losses = peers.variants(LOSS, chosen & {*PEERS}, device)

    def one_step(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> list[float]:
        """Return the seconds of each of PARTS."""
        marks = [_now(device)]

        def mark() -> None:
            marks.append(_now(device))

        images = pixels.to(device, non_blocking=True).float().div_(255)
        labels = target.to(device, non_blocking=True)
        mark()
        with torch.no_grad():
            teacher_logits = teacher(images)
        mark()
        student_logits = student(images)
        mark()
        # The graph is cut at the logits to time the loss's forward and backward alone.
        logits = student_logits.detach().requires_grad_()
        loss(logits, teacher_logits, labels).backward()
        mark()
        optimizer.zero_grad(set_to_none=True)
        student_logits.backward(logits.grad)
        mark()
        optimizer.step()
        mark()
        return [end - begin for begin, end in itertools.pairwise(marks)]

    for loss in losses.values():
        for _ in range(2):
            one_step(loss)
    begin = time.perf_counter()
    one_step(losses["fastkd"])
    # Steps are long and their small parts matter: ten times the seconds of a loss, at least seven steps.
    turns = max(7, min(MOST_TURNS, int(10 * seconds / (time.perf_counter() - begin) / len(losses))))
    taken: dict[str, list[list[float]]] = {variant: [] for variant in losses}
    for turn in range(turns):
        for variant in losses if turn % 2 else reversed(losses):
            taken[variant].append(one_step(losses[variant]))
    torch._dynamo.reset()
    return [_record(name, size, setup, variant, taken[variant]) for variant in losses]


def _record(name: str, batch: int, setup: Setup, variant: str, taken: list[list[float]]) -> Record:
    totals = [sum(parts) * 1e3 for parts in taken]
    split = {
        part: statistics.median(values) * 1e3
        for part, values in zip(PARTS, zip(*taken, strict=True), strict=True)
    }
    return {
        "kind": "step",
        "step": name,
        "batch": batch,
        "classes": setup.classes,
        "loss": LOSS,
        "variant": variant,
        **timing(totals),
        "split_ms": split,
        "loss_share": split["loss"] / sum(split.values()),
    }


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def describe(record: Record) -> str:
    """Return a record as one line."""
    if record["kind"] == "skipped":
        return f"{record['step']:12s} skipped: {record['reason']}"
    parts = ", ".join(f"{part} {value:.2f}" for part, value in record["split_ms"].items())
    return (
        f"{record['step']:12s} batch {record['batch']:<5d} {record['variant']:9s} "
        f"{record['ms']:8.2f} ms per step: {parts}; loss {record['loss_share']:.1%}"
    )
