"""How a loss of given size will be computed: which path, which tile, how many bytes; and ``explain``."""

import time
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

import torch

from fastkd import backend
from fastkd.ops.spec import Family
from fastkd.ops.team_plan import plan_team

# A row of this many classes still fits into the registers of one program: every logit is read once.
RESIDENT_CLASSES = 8192
# The same for standardised logits, whose moments and further sums take registers of their own.
RESIDENT_STANDARDIZED = 4096
# Sixteen warps: with eight the standardised losses spill registers on sm_80 (benchmarks/compile_kernels.py).
STREAMED_TILE = 4096
STREAMED_WARPS = 16
# Logits of a row that one warp works on; shorter rows share a program of up to four warps.
ELEMENTS_A_WARP = 512
# Of the second-level cache, what the rows in flight may fill between their two passes.
CACHE_SHARE = 0.6
MAX_PARTS = 128
# The CPU: exponentials of its row that a thread caches, at most (csrc/cpu/isa_kernels.h).
KEPT_FLOATS = 1 << 23

ELEMENT_BYTES = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2, torch.float64: 8}
POINTWISE = ("binary_kl", "binary_kl_norm")
# Losses whose gradient needs sums over a mixture or a mean that needs a sweep of its own.
EXTRA_SWEEPS = {"jsd": 1, "lskd": 1}
LOSSES = ("kd", "lskd", "dkd", "dckd", "ce_kd", "nkd", "ttm", "reverse_kl", "jsd", *POINTWISE)


class Device(NamedTuple):
    """What the planner wants to know of a GPU."""

    multiprocessors: int
    cache_bytes: int
    capability: tuple[int, int] = (9, 0)


class Plan(NamedTuple):
    """How the Triton kernels share out rows; the numbers of programs do not change the compiled kernel."""

    rows: int  # to a program
    tile: int
    one_tile: bool
    warps: int
    parts: int  # programs to a row
    programs: int  # of one part of the rows, at most


@cache
def device_of(device: torch.device) -> Device:
    if device.type != "cuda":
        return Device(132, 50 << 20)  # Triton's interpreter: planned as for an H100
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    return Device(properties.multi_processor_count, properties.L2_cache_size, capability)


def plan_rows(
    family: Family | Literal["scale"],
    rows: int,
    classes: int,
    element_bytes: int,
    device: Device,
    standardized: bool = False,
) -> Plan:
    """Rows that fit on chip are read once (3 accesses per element); longer ones take two passes (5).

    ``family`` is a loss's, or "scale" for the scaling of a gradient. The kernel that is compiled depends on
    ``family`` and ``classes`` alone, not on the number of rows.
    """
    resident = family == "softmax"
    longest = RESIDENT_CLASSES if resident else STREAMED_TILE
    if standardized:
        longest = RESIDENT_STANDARDIZED
    if classes <= longest:
        tile = max(16, 1 << (classes - 1).bit_length())
        together = 1 if family == "scale" else max(1, ELEMENTS_A_WARP // tile)
        # Half as many logits a warp where a class costs more arithmetic, hence more registers.
        a_warp = ELEMENTS_A_WARP if resident else ELEMENTS_A_WARP // 2
        warps = min(4, together) if together > 1 else min(16, max(1, tile // a_warp))
        return Plan(together, tile, resident, warps, 1, rows)
    tiles = -(-classes // STREAMED_TILE)
    parts = 1
    if rows < device.multiprocessors:
        parts = min(tiles, MAX_PARTS, -(-2 * device.multiprocessors // max(rows, 1)))
    cached_rows = int(CACHE_SHARE * device.cache_bytes) // (2 * classes * element_bytes)
    programs = max(device.multiprocessors, cached_rows)
    return Plan(1, STREAMED_TILE, False, STREAMED_WARPS, parts, programs)


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
    accesses: float
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
            f"  memory: {self.accesses:.3g} accesses an element, {self.bytes / 1e6:.1f} MB; at the "
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
    kind = backend.checked_device(device, "device").type
    chosen = backend.resolve(backend.get_backend(), kind, dtype)
    path = _path(chosen, loss, rows, classes, dtype, torch.device(device))
    if dtype == torch.float16 and chosen != "eager":
        # The rows are computed once for the losses, which writes nothing, and once more for the gradient.
        again = max(2.0, path.accesses - 3)
        path = path._replace(
            words=f"{path.words}; in float16 once more in backward, for the gradient",
            accesses=path.accesses + again,
        )
    moved = round(path.accesses * rows * classes * ELEMENT_BYTES[dtype])
    return Explanation(loss, rows, classes, dtype, device, chosen, *path, moved, copy_bandwidth(device))


class _Path(NamedTuple):
    words: str
    tile: int
    warps: int | None
    accesses: float  # of memory, an element


def _path(chosen: str, loss: str, rows: int, classes: int, dtype: torch.dtype, device: torch.device) -> _Path:
    if chosen == "eager":
        return _Path("plain torch, one kernel an operation", classes, None, 19)
    if chosen == "native" and device.type == "cuda":
        return _team_path(loss, rows, classes, dtype, device_of(device))
    if chosen == "native":
        threads = torch.get_num_threads()
        sharing = "rows over threads" if rows >= threads else "each row over several threads"
        if loss in POINTWISE:
            return _Path(f"{sharing}, one sweep", 1024, None, 3)
        # A float32 row's gradient is itself where the student's are kept.
        kept = classes * (1 if dtype == torch.float32 else 2) * (rows if rows < threads else 1)
        if kept > KEPT_FLOATS:
            return _Path(f"{sharing}; two sweeps in blocks, exponentials computed in both", 1024, None, 5)
        words = "logits read once in blocks, exponentials kept for the gradient"
        return _Path(f"{sharing}; {words}", 1024, None, 3)
    family: Family = "mixture" if loss == "jsd" else "pointwise" if loss in POINTWISE else "softmax"
    plan = plan_rows(family, rows, classes, ELEMENT_BYTES[dtype], device_of(device), loss == "lskd")
    if plan.parts > 1:
        sharing = f"{plan.parts} programs a row"
    elif plan.rows > 1:
        sharing = f"{plan.rows} rows a program"
    else:
        sharing = "one program a row"
    if loss in POINTWISE:
        return _Path(f"{sharing}, one sweep of tiles", plan.tile, plan.warps, 3)
    if plan.one_tile:
        return _Path(f"{sharing}, the row in registers, one launch", plan.tile, plan.warps, 3)
    sweeps = 2 + EXTRA_SWEEPS.get(loss, 0)
    words = f"{sharing}, {sweeps} sweeps of tiles"
    if plan.parts > 1:
        words += f", {sweeps} launches"
    elif plan.programs < rows:
        words += f", {plan.programs} rows at a time"
    return _Path(words, plan.tile, plan.warps, 2 * sweeps + 1)


def _team_path(loss: str, rows: int, classes: int, dtype: torch.dtype, device: Device) -> _Path:
    """Of the native CUDA kernels."""
    keeps = loss not in POINTWISE
    element_bytes = 2 * ELEMENT_BYTES[dtype]
    team = plan_team(rows, classes, element_bytes, device.capability, device.multiprocessors, keeps)
    again = 0 if not keeps else {"jsd": 2, "lskd": 3}.get(loss, 1)  # sweeps after the first
    accesses = 3 + 2 * again * (1 - team.cached(classes)) if keeps else 3
    words = (
        team.describe(classes)
        if keeps
        else f"{team.threads_a_row * team.blocks_a_row} threads a row, one sweep"
    )
    return _Path(words, 8, team.threads_a_row * team.rows_a_block // 32 or 1, accesses)


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
