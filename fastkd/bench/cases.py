"""The cases that are measured: losses, shapes, dtypes and passes, within a bound on memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from fastkd.losses.cases import call_of
from fastkd.ops.plan import ELEMENT_BYTES
from fastkd.ops.spec import CASES

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

# In the order of tables and pictures; cases that are not named here follow in the order of ops/spec.py.
_FIRST = ("kd", "dkd", "binary-kl-norm", "ce-kd", "lskd", "jsd")
_CASES = [case for _, case in CASES.values()]
_CASES.sort(key=lambda case: _FIRST.index(case.name) if case.name in _FIRST else len(_FIRST))
# As published: DKD with alpha 1 and beta 8, CE + KD with 0.1 and 0.9, logit standardisation at T 2.
FASTKD: dict[str, Callable[..., Tensor]] = {case.name: call_of(case) for case in _CASES}
LOSSES = tuple(case.name for case in _CASES if case.benchmarked)  # unless others are asked for
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Memory accesses per element that every implementation needs: read two tensors, write one.
FLOOR_ACCESSES = {"forward": 2, "forward+backward": 3}
PASSES = tuple(FLOOR_ACCESSES)

# Few and many rows for each number of classes: CIFAR-10 and -100, ImageNet, the glyphs, ImageNet-21k, a
# vocabulary and a million classes. The usual ones come first, for runs with a time limit.
SHAPES = (
    (256, 1000), (128, 21841), (64, 131072), (1024, 2263), (1024, 100), (8192, 10), (4, 131072), (8192, 1000),
    (4, 10), (4, 1_000_000), (2048, 131072), (256, 1_000_000), (8192, 131072),
)  # fmt: skip
QUICK = [(loss, 256, 1000) for loss in LOSSES] + [("kd", 64, 21841), ("dkd", 64, 21841)]


class AnyCase(Protocol):
    """What a suite asks of its cases."""

    live_tensors: ClassVar[int]  # most float32 tensors [rows, classes] that are alive at once

    @property
    def elements(self) -> int: ...

    @property
    def about(self) -> dict[str, Any]:
        """The fields of each of its records."""


@dataclass(frozen=True)
class Case:
    loss: str
    rows: int
    classes: int
    dtype: str
    mode: str  # of PASSES

    live_tensors: ClassVar[int] = 16  # inputs, and what eager torch saves for DKD

    def __str__(self) -> str:
        return f"{self.loss} {self.rows} x {self.classes} {self.dtype} {self.mode}"

    @property
    def elements(self) -> int:
        return self.rows * self.classes

    @property
    def bytes(self) -> int:
        """Memory traffic of the floor: three accesses per element, two without a gradient."""
        return FLOOR_ACCESSES[self.mode] * self.elements * ELEMENT_BYTES[DTYPES[self.dtype]]

    @property
    def backward(self) -> bool:
        return self.mode == "forward+backward"

    @property
    def about(self) -> dict[str, Any]:
        return {
            "loss": self.loss,
            "rows": self.rows,
            "classes": self.classes,
            "dtype": self.dtype,
            "pass": self.mode,
        }


def suite(
    *,
    losses: Sequence[str] = LOSSES,
    shapes: Iterable[tuple[int, int]] = SHAPES,
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    passes: Sequence[str] = PASSES,
) -> Iterator[Case]:
    """Yield the product, shape by shape; with the backward pass first."""
    for mode in sorted(passes, key=PASSES.index, reverse=True):
        for dtype in dtypes:
            for rows, classes in shapes:
                for loss in losses:
                    yield Case(loss, rows, classes, dtype, mode)


def quick_suite() -> Iterator[Case]:
    for loss, rows, classes in QUICK:
        yield Case(loss, rows, classes, "float32", "forward+backward")


def memory_bound(device: str) -> int:
    """Return the bytes that a case may take: 0.8 of a GPU's free or half of the host's available memory."""
    if device == "cuda":
        return int(0.8 * torch.cuda.mem_get_info()[0])
    try:
        with open("/proc/meminfo") as lines:
            available = next(line for line in lines if line.startswith("MemAvailable"))
        return int(available.split()[1]) * 1024 // 2
    except (OSError, StopIteration):
        return 4 * 2**30


def needs_too_much(case: AnyCase, bound: int) -> str | None:
    """Return why a case is skipped, or None. Half types count as float32, to which peers convert them."""
    need = case.live_tensors * case.elements * 4
    if need <= bound:
        return None
    return f"it needs up to {need / 2**30:.0f} GiB with its peers, the bound is {bound / 2**30:.0f} GiB"


def make_inputs(case: Case, device: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return random student and teacher logits (spread 3) and labels; the student requires grad."""
    generator = torch.Generator(device).manual_seed(seed)
    size = (case.rows, case.classes)
    student, teacher = (
        torch.randn(size, device=device, generator=generator).mul_(3).to(DTYPES[case.dtype]) for _ in range(2)
    )
    target = torch.randint(0, case.classes, (case.rows,), device=device, generator=generator)
    return student.requires_grad_(case.backward), teacher, target
