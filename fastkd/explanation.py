"""``fastkd.explain``: which path a loss of given size takes, and how much memory traffic that is.

Not called explain.py: ``fastkd.explain`` is the function, also after an import of this module.
"""

import time
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch

from fastkd.losses.arguments import check_size
from fastkd.ops import backend
from fastkd.ops.chunks import chunk_rows_of
from fastkd.ops.plan import ELEMENT_BYTES, Device, device_of, kind_of, plan_known, plan_rows
from fastkd.ops.spec import CASES, Family, Needs, needs_of
from fastkd.ops.team_plan import WARP, TeamPlan, plan_team

# Most exponentials of a row that a thread of the CPU kernels caches (csrc/cpu/isa_kernels.h).
CACHED_FLOATS = 1 << 23
LOSSES = tuple(name.replace("-", "_") for name in CASES)


@dataclass(frozen=True)
class Explanation:
    """What ``explain`` returns; printed, it reads as text. In seconds and bytes per second."""

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
    chunk_rows: int | None = None  # of LinearLogits; the following too
    buffer_bytes: int = 0  # of a chunk's logits of each layer, and their gradient if it has its own buffer
    held_bytes: int = 0  # of gradients in float32, from the loss until backward
    choice: str = ""  # why auto took this backend, where it has a choice

    @property
    def seconds(self) -> float:
        """The time of the bytes at the bandwidth of a copy measured now, which other programs lower."""
        return self.bytes / self.bandwidth

    def __str__(self) -> str:
        warps = "" if self.warps is None else f", {self.warps} warps"
        text = (
            f"{self.loss} of {self.rows} x {self.classes} {str(self.dtype).removeprefix('torch.')} on "
            f"{self.device}, loss and gradient: backend {self.backend}{self.choice and f' ({self.choice})'}\n"
            f"  path: {self.path}\n"
            f"  tile: {self.tile} classes{warps}\n"
            f"  memory: {self.accesses:.3g} accesses per element, {self.bytes / 1e6:.1f} MB; at the "
            f"{self.bandwidth / 1e9:.0f} GB/s of a copy measured now about {self.seconds * 1e3:.3f} ms"
        )
        if self.chunk_rows is None:
            return text
        return (
            f"{text}\n"
            f"  linear layers: chunks of {self.chunk_rows} rows, {self.buffer_bytes / 1e6:.1f} MB; gradients "
            f"of weight (4 C H bytes) and hidden, held until backward, {self.held_bytes / 1e6:.1f} MB; "
            "the time of the matmuls comes on top"
        )


def explain(
    rows: int,
    classes: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    loss: str = "kd",
    hidden: tuple[int, int] | None = None,
    known: int | None = None,
) -> Explanation:
    """Say how a loss and its gradient over ``[rows, classes]`` logits will be computed, and at what cost.

    ``loss`` is a case of ``fastkd.ops.spec``, such as kd, lskd, dkd, ce_kd, nkd, ttm, reverse_kl, jsd or
    binary_kl. The time is that of the memory traffic alone, at the bandwidth of a copy that is measured once
    per device. ``hidden`` are the widths of the student's and the teacher's last layers, if their logits are
    ``LinearLogits``; ``known`` is K of a teacher that is ``TopKLogits``. With both the student alone has a
    layer, and the teacher's width is not used.
    """
    if rows < 1 or classes < 2:
        raise ValueError(f"rows is {rows} and classes {classes}; expected at least 1 row and 2 classes")
    work = _work_of(loss)
    if dtype not in ELEMENT_BYTES:
        raise TypeError(f"dtype is {dtype!r}; expected torch.float32, bfloat16, float16 or float64")
    kind = backend.checked_device(device, "device").type
    chosen = backend.resolve(backend.get_backend(), kind, dtype)
    if hidden is None and known is None:
        on = torch.device(device)
        chosen = backend.faster_for(chosen, on, work.family, work.labelled, rows, classes, dtype)
    chunk = None
    if hidden is not None:
        chunk = _chunk_of(hidden, chosen, rows, classes, dtype, kind)
    if known is None:
        path = _path(chosen, work, chunk or rows, classes, dtype, torch.device(device))
    else:
        path = _top_k_path(loss, known, chosen, chunk or rows, classes, dtype, torch.device(device))
    if chunk is None and dtype == torch.float16 and chosen != "eager":
        # The rows are computed once for the losses, which writes nothing, and once more for the gradient.
        again = max(1 if known else work.reads, path.accesses - work.reads - 1)
        path = path._replace(
            words=f"{path.words}; in float16 once more in backward, for the gradient",
            accesses=path.accesses + again,
        )
    moved = round(path.accesses * rows * classes * ELEMENT_BYTES[dtype])
    choice = ""
    if kind == "cuda" and backend.get_backend() == "auto" and hidden is None and known is None:
        measured = "measured to be" if chosen == "native" else "native is not measured to be"
        choice = f"auto: {measured} faster for such rows"
    of_call = (loss, rows, classes, dtype, device, chosen)
    explained = Explanation(*of_call, *path, moved, copy_bandwidth(device), choice=choice)
    if hidden is None or chunk is None:
        return explained
    stored = work.reads if known is None else 1  # a teacher known at K classes has no logits in a chunk
    return replace(
        explained,
        chunk_rows=chunk,
        buffer_bytes=(stored + (not work.in_place)) * chunk * classes * ELEMENT_BYTES[dtype],
        held_bytes=4 * hidden[0] * (classes + rows),
    )


def _chunk_of(
    hidden: tuple[int, int], chosen: str, rows: int, classes: int, dtype: torch.dtype, kind: str
) -> int | None:
    """Rows per chunk; None with the eager backend, which stores the logits."""
    expected = "expected two whole numbers, the widths of the student's and the teacher's layer"
    if not isinstance(hidden, tuple | list) or any(type(width) is not int for width in hidden):
        raise TypeError(f"hidden is {hidden!r}; {expected}")
    if len(hidden) != 2 or min(hidden) < 1:
        raise ValueError(f"hidden is {hidden!r}; {expected}")
    return None if chosen == "eager" else chunk_rows_of(0, rows, classes, ELEMENT_BYTES[dtype], kind)


class _Work(NamedTuple):
    """What a case asks of the row kernels."""

    family: Family
    kind: str  # of ops.plan
    labelled: bool
    reads: int  # models whose logits are read
    in_place: bool  # a linear layer's gradient replaces the logits of a chunk, if there is no softcap

    @property
    def standardized(self) -> bool:
        return self.kind == "standardized"


def _work_of(loss: str) -> _Work:
    name = loss.replace("_", "-")
    if name not in CASES:
        raise ValueError(f"loss is {loss!r}; expected one of {', '.join(LOSSES)}")
    spec, case = CASES[name]
    needs = needs_of(spec, tuple(case.options), case.labelled)
    reads = 2 if needs & Needs.DISTILLS else 1
    return _Work(spec.family, kind_of(spec.family, needs), case.labelled, reads, spec.may_alias)


class _Path(NamedTuple):
    words: str
    tile: int
    warps: int | None
    accesses: float  # of memory, per element


def _path(
    chosen: str, work: _Work, rows: int, classes: int, dtype: torch.dtype, device: torch.device
) -> _Path:
    if chosen == "eager":
        return _Path("plain torch, one kernel per operation", classes, None, 19)
    if chosen == "native" and device.type == "cuda":
        return _team_path(work, rows, classes, dtype, device_of(device))
    if chosen == "native":
        return _cpu_path(work, rows, classes, dtype)
    return _triton_path(work, rows, classes, dtype, device_of(device))


def _top_k_path(
    loss: str, known: int, chosen: str, rows: int, classes: int, dtype: torch.dtype, device: torch.device
) -> _Path:
    spec, case = CASES[loss.replace("_", "-")]
    reason = spec.undefined_at_k(case.options)
    if reason is not None:
        raise ValueError(f"loss is {loss!r}, which is not defined for a teacher known at K classes {reason}")
    check_size("known", known, 1, classes, "the number of classes")
    words = f"one class for all but {known}; the loss of {known + 1} classes; the gradient from their shares"
    if chosen == "eager":
        return _Path(f"plain torch: {words}", classes, None, 13)
    if chosen == "triton":
        plan = plan_known(rows, classes, device_of(device))
        return _Path(f"two passes over the student's logits: {words}", plan.tile, plan.warps, 3)
    if device.type == "cuda":
        on = device_of(device)
        team = plan_team(rows, classes, ELEMENT_BYTES[dtype], on.capability, on.multiprocessors, False)
        sharing = f"{team.threads_per_row * team.blocks_per_row} threads per row"
        return _Path(f"{sharing}, two passes over the student's logits: {words}", 8, _warps_of(team), 3)
    cached = "exponentials cached" if classes <= CACHED_FLOATS else "exponentials computed twice"
    accesses = 2 if classes <= CACHED_FLOATS else 3
    return _Path(f"rows over threads; logits read in blocks, {cached}: {words}", 1024, None, accesses)


def _cpu_path(work: _Work, rows: int, classes: int, dtype: torch.dtype) -> _Path:
    threads = torch.get_num_threads()
    sharing = "rows over threads" if rows >= threads else "each row over several threads"
    if work.family == "pointwise":
        return _Path(f"{sharing}, one pass", 1024, None, work.reads + 1)
    # The student's exponentials of a float32 row are cached in its gradient.
    cached = classes * (1 if dtype == torch.float32 else 2) * (rows if rows < threads else 1)
    if cached > CACHED_FLOATS:
        words = "two passes in blocks, exponentials computed in both"
        return _Path(f"{sharing}; {words}", 1024, None, 2 * work.reads + 1)
    words = "logits read once in blocks, exponentials cached for the gradient"
    return _Path(f"{sharing}; {words}", 1024, None, work.reads + 1)


def _triton_path(work: _Work, rows: int, classes: int, dtype: torch.dtype, device: Device) -> _Path:
    plan = plan_rows(work.kind, rows, classes, ELEMENT_BYTES[dtype], device)
    if plan.parts > 1:
        sharing = f"{plan.parts} programs per row"
    elif plan.rows > 1:
        sharing = f"{plan.rows} rows per program"
    else:
        sharing = "one program per row"
    if work.family == "pointwise":
        return _Path(f"{sharing}, one pass over tiles", plan.tile, plan.warps, work.reads + 1)
    if plan.one_tile:
        return _Path(f"{sharing}, the row in registers, one launch", plan.tile, plan.warps, work.reads + 1)
    # Statistics and gradient; sums over the mixture, or mean and deviation of the rows.
    passes = 2 + (work.family == "mixture" or work.standardized)
    words = f"{sharing}, {passes} passes over tiles"
    if plan.parts > 1:
        words += f", {passes} launches"
    elif plan.programs < rows:
        words += f", {plan.programs} rows at a time"
    return _Path(words, plan.tile, plan.warps, work.reads * passes + 1)


def _team_path(work: _Work, rows: int, classes: int, dtype: torch.dtype, device: Device) -> _Path:
    """Of the native CUDA kernels."""
    caches = work.family != "pointwise"
    element_bytes = 2 * ELEMENT_BYTES[dtype]
    team = plan_team(rows, classes, element_bytes, device.capability, device.multiprocessors, caches)
    accesses = work.reads + 1.0
    if caches:
        further = 2 if work.standardized or work.family == "mixture" else 1  # passes after the first
        accesses += work.reads * further * (1 - team.cached(classes))
        words = team.describe(classes)
    else:
        words = f"{team.threads_per_row * team.blocks_per_row} threads per row, one pass"
    return _Path(words, 8, _warps_of(team), accesses)


def _warps_of(team: TeamPlan) -> int:
    """Per block."""
    return team.threads_per_row * team.rows_per_block // WARP or 1


@cache
def copy_bandwidth(device: str) -> float:
    """Bytes read and written per second by a copy of 64 MiB on this device, the median of nine."""
    source = torch.ones(1 << 24, device=device, dtype=torch.float32)
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
