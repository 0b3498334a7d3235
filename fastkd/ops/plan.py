"""How a loss of given size will be computed: which path, which tile, how many bytes; and ``explain``."""

import time
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch

from fastkd import backend

# A row of this many classes still fits into the registers of one program: every logit is read once.
RESIDENT_CLASSES = 8192
# Sixteen warps: with eight the standardised losses spill registers on sm_80 (benchmarks/compile_kernels.py).
STREAMED_TILE = 4096
STREAMED_WARPS = 16

ELEMENT_BYTES = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2, torch.float64: 8}
POINTWISE = ("binary_kl", "binary_kl_norm")
# Losses whose gradient needs sums over a mixture or a mean that needs a sweep of its own.
EXTRA_SWEEPS = {"jsd": 1, "lskd": 1}
LOSSES = ("kd", "lskd", "dkd", "dckd", "ce_kd", "nkd", "ttm", "reverse_kl", "jsd", *POINTWISE)


class Plan(NamedTuple):
    tile: int
    one_tile: bool
    warps: int


def plan_rows(classes: int) -> Plan:
    """One tile where the row fits on chip (3 accesses an element), else two sweeps of tiles (5)."""
    if classes <= RESIDENT_CLASSES:
        tile = max(16, 1 << (classes - 1).bit_length())
        return Plan(tile, True, min(16, max(1, tile // 512)))
    return Plan(STREAMED_TILE, False, STREAMED_WARPS)


def plan_tile(classes: int) -> tuple[int, int]:
    """Tile and warps of a kernel that walks along the row."""
    plan = plan_rows(min(classes, STREAMED_TILE))
    return plan.tile, plan.warps


@dataclass(frozen=True)
class Explanation:
    """What ``explain`` returns; printed, it reads as text. Times in seconds, bandwidth in bytes a second."""

    loss: str
    rows: int
    classes: int
    dtype: torch.dtype
    device: str
    backend: str
    path: str
    tile: int
    warps: int | None
    accesses: int
    bytes: int
    bandwidth: float

    @property
    def seconds(self) -> float:
        """The time that the bytes take at the bandwidth of a copy measured here: a lower bound."""
        return self.bytes / self.bandwidth

    def __str__(self) -> str:
        warps = "" if self.warps is None else f", {self.warps} warps"
        return (
            f"{self.loss} of {self.rows} x {self.classes} {str(self.dtype).removeprefix('torch.')} on "
            f"{self.device}, loss and gradient: backend {self.backend}\n"
            f"  path: {self.path}\n"
            f"  tile: {self.tile} classes{warps}\n"
            f"  memory: {self.accesses} accesses an element, {self.bytes / 1e6:.1f} MB; at the "
            f"{self.bandwidth / 1e9:.0f} GB/s of a copy measured here at least {self.seconds * 1e3:.3f} ms"
        )


def explain(
    rows: int, classes: int, dtype: torch.dtype = torch.float32, device: str = "cpu", *, loss: str = "kd"
) -> Explanation:
    """Say how a loss and its gradient over ``[rows, classes]`` logits will be computed, and at what cost.

    ``loss`` is one of kd, lskd, dkd, dckd, ce_kd, nkd, ttm, reverse_kl, jsd, binary_kl, binary_kl_norm. The
    time is that of the memory traffic alone, at the bandwidth of a copy that is measured once a device.
    """
    if rows < 1 or classes < 2:
        raise ValueError(f"rows is {rows} and classes {classes}; expected at least 1 row and 2 classes")
    if loss not in LOSSES:
        raise ValueError(f"loss is {loss!r}; expected one of {', '.join(LOSSES)}")
    if dtype not in ELEMENT_BYTES:
        raise TypeError(f"dtype is {dtype}; expected float32, bfloat16, float16 or float64")
    kind = torch.device(device).type
    chosen = backend.resolve(backend.get_backend(), kind, dtype)
    path, tile, warps, accesses = _path(chosen, classes, loss)
    moved = accesses * rows * classes * ELEMENT_BYTES[dtype]
    return Explanation(
        loss, rows, classes, dtype, device, chosen, path, tile, warps, accesses, moved, copy_bandwidth(device)
    )


def _path(chosen: str, classes: int, loss: str) -> tuple[str, int, int | None, int]:
    """(words, tile, warps, memory accesses an element)."""
    if chosen == "eager":
        return "plain torch, one kernel an operation", classes, None, 19
    if chosen == "native":
        if loss in POINTWISE:
            return "rows over threads, one sweep", 1024, None, 3
        words = "rows over threads; logits read once in blocks, exponentials kept in cache for the gradient"
        return words, 1024, None, 3
    if loss in POINTWISE:
        return "one program a row, one sweep of tiles", *plan_tile(classes), 3
    plan = plan_rows(classes)
    if loss == "jsd" or not plan.one_tile:
        tile, warps = plan_tile(classes) if loss == "jsd" else (plan.tile, plan.warps)
        sweeps = 2 + EXTRA_SWEEPS.get(loss, 0)
        return f"one program a row, {sweeps} sweeps of tiles", tile, warps, 2 * sweeps + 1
    return "one program a row, the row in registers, one launch", plan.tile, plan.warps, 3


@cache
def copy_bandwidth(device: str) -> float:
    """Bytes read and written a second by a copy of 64 MiB on this device, the median of nine."""
    source = torch.ones(1 << 24, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(11):
        if source.is_cuda:
            torch.cuda.synchronize(source.device)
        begin = time.perf_counter()
        target.copy_(source)
        if source.is_cuda:
            torch.cuda.synchronize(source.device)
        times.append(time.perf_counter() - begin)
    return 2 * source.numel() * 4 / sorted(times[2:])[4]
