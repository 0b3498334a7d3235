"""Row weights from labels: in the row kernel, or in one launch. Torch's operators take six or seven."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd.ops.call import Marks
from fastkd.ops.triton.launch_options import launch, on_device

# Labels that a program loads at once: up to this many rows there is one program, which reads them once.
TILE = 8192
WARPS = 16
# Each program counts the labels of all rows: with more of them torch's operators take less time.
MOST_ROWS = 65536
# Up to this many rows each program of a row kernel counts the labels itself, if all programs together read at
# most so many: 8 MB, for which the L2 cache of an H100 needs about 2 us, and a launch takes 2 to 3.
MOST_COUNTED, MOST_READ = 2048, 2**20
# Which rows a row kernel ignores by ``Marks``: none; some; and it counts the others.
NO_MARKS = tl.constexpr(0)
MARKED = tl.constexpr(1)
COUNTED = tl.constexpr(2)


@triton.jit
def counts(marks, index, exists):
    """Which rows are not ignored. ``marks``: pointer to the labels of rows, and the label of ignored ones."""
    pointer, ignore_index = marks
    return exists & (tl.load(pointer + index, mask=exists, other=0) != ignore_index)


@triton.jit
def rows_that_count(marks, count, TILE: tl.constexpr = 256):
    """How many of ``count`` rows are not ignored, at least 1, in float32."""
    rows = tl.zeros((TILE,), tl.int32)
    for first in range(0, count, TILE):
        index = first + tl.arange(0, TILE)
        rows += counts(marks, index, index < count).to(tl.int32)
    return tl.maximum(tl.sum(rows), 1).to(tl.float32)


@triton.jit(
    do_not_specialize=[
        "target_pointer", "weight_pointer", "result_pointer", "count", "target_stride", "weight_stride",
        "ignore_index",
    ]
)  # fmt: skip
def row_weights_kernel(
    target_pointer,
    weight_pointer,
    result_pointer,
    count,
    target_stride,
    weight_stride,
    ignore_index,
    WEIGHTED: tl.constexpr,
    MEAN: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid: (tiles of rows). With MEAN divided by the number of non-ignored labels, at least 1."""
    program = tl.program_id(0)
    index = program.to(tl.int64) * TILE + tl.arange(0, TILE)
    exists = index < count
    valid = exists & (tl.load(target_pointer + index * target_stride, mask=exists, other=0) != ignore_index)
    weight = tl.full((TILE,), 1.0, tl.float32)
    if WEIGHTED:
        weight = tl.load(weight_pointer + index * weight_stride, mask=exists, other=0.0).to(tl.float32)
    if MEAN:
        valid_rows = valid.to(tl.int32)
        programs = tl.num_programs(0)
        for step in range(1, programs):
            other_index = ((program + step) % programs).to(tl.int64) * TILE + tl.arange(0, TILE)
            other_exists = other_index < count
            label = tl.load(target_pointer + other_index * target_stride, mask=other_exists, other=0)
            valid_rows += (other_exists & (label != ignore_index)).to(tl.int32)
        weight = tl.div_rn(weight, tl.maximum(tl.sum(valid_rows), 1).to(tl.float32))
    tl.store(result_pointer + index, tl.where(valid, weight, 0.0), mask=exists)


def takes(target: Tensor, weight: Tensor | None) -> bool:
    """Whether ``row_weights`` has a kernel for these."""
    known = weight is None or weight.dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    return known and 0 < target.shape[0] <= MOST_ROWS


def by_row_kernel(marks: Marks, weight: Tensor | None, programs: int) -> bool:
    """Whether ``programs`` programs of a row kernel apply ``marks`` themselves."""
    count = marks.labels.shape[0]
    if marks.mean and (count > MOST_COUNTED or count * programs > MOST_READ):
        return False
    if weight is not None and (weight.dtype != torch.float32 or not weight.is_contiguous()):
        return False
    return marks.labels.is_contiguous()


def use_of(marks: Marks | None) -> int:
    """The value of MARKS."""
    if marks is None:
        return NO_MARKS.value
    return COUNTED.value if marks.mean else MARKED.value


def row_weights(marks: Marks, weight: Tensor | None) -> Tensor:
    """float32 [N]: ``weight`` [N], or 1, with ``marks`` applied; exactly 0 where a row is ignored."""
    target, ignore_index, mean = marks
    count = target.shape[0]
    result = target.new_empty(count, dtype=torch.float32)
    weights = result if weight is None else weight
    with on_device(target):
        arguments = (target, weights, result, count, target.stride(0), weights.stride(0), int(ignore_index))
        fixed = {"WEIGHTED": weight is not None, "MEAN": mean, "TILE": TILE, "num_warps": WARPS}
        launch(row_weights_kernel, (-(-count // TILE), 1, 1), arguments, fixed)
    return result
