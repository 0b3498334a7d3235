"""Functions common to all row kernels: indices, loads, weights and stores of tiles of logits, reductions.

A program works on tiles of ``[ROWS, TILE]``, or of ``[lanes, LANE]`` columns of one long row; a value per row
is a ``[ROWS, 1]`` tensor. A long row may be split over ``parts`` programs, each with its own range of tiles.
"""

import triton
import triton.language as tl

from fastkd.ops.triton.runtime import interpreting

COMPILED = tl.constexpr(not interpreting())

# Arguments of the row kernels that must not trigger a recompilation: Triton specialises on integers that are
# 1 or multiples of 16 and on aligned pointers. The divisibility that kernels use is in VECTOR.
NOT_SPECIALIZED = [
    "weight_pointer", "loss_pointer", "dynamic_pointer", "count", "inner_rows", "parts", "classes",
    "student_outer_stride", "student_inner_stride", "teacher_outer_stride", "teacher_inner_stride",
    "weight_stride", "gradient_stride",
]  # fmt: skip
# Below this a logit is a masked class; see MASKED in fastkd/reference.py.
MASKED = tl.constexpr(-(2.0**100))
# What is in no sum, past the end of a row or the label: it counts 0 even where all that count are masked.
EXCLUDED = tl.constexpr(-(2.0**101))
# Lower bound of relative logits, in units of the temperature: finite, so that the difference of two masked
# classes is 0, and 0 times a relative logit is 0, whatever the slope.
LOWEST = tl.constexpr(-1e37)


@triton.jit
def of_pair(pointers, pair):
    """The pointer of a pair, among those of the launch."""
    chosen = pointers[0]
    for other in tl.static_range(1, len(pointers)):
        if pair == other:
            chosen = pointers[other]
    return chosen


@triton.jit
def multiple(number, VECTOR: tl.constexpr):
    """``number``, a multiple of VECTOR, in a form from which the compiler infers that: it enables wide loads.

    Specialisation on the value would recompile for other strides and class counts."""
    if VECTOR > 1:
        number = number // VECTOR * VECTOR
    return number


@triton.jit
def row_starts(index, inner_rows, strides, VECTOR: tl.constexpr):
    """Offsets of rows of [M, inner_rows, C]; [N, C] counts as [N, 1, C]."""
    outer_stride, inner_stride = strides
    outer = index // inner_rows
    return multiple(outer * outer_stride + (index - outer * inner_rows) * inner_stride, VECTOR)


@triton.jit
def rows_of_block(block, count, ROWS: tl.constexpr):
    """Indices [ROWS, 1] of a block of rows, and the mask of those that exist."""
    index = block * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
    return index, index < count


@triton.jit
def tiles_of_part(part, parts, classes, TILE: tl.constexpr):
    """The range of tiles of a part of the row."""
    tiles = tl.cdiv(classes, TILE)
    each = tl.cdiv(tiles, parts)
    return part * each, tl.minimum((part + 1) * each, tiles)


@triton.jit
def lane_columns(ROWS: tl.constexpr, TILE: tl.constexpr, LANE: tl.constexpr, VECTOR: tl.constexpr):
    """The columns [lanes, LANE] of a tile, and the first of each lane.

    A lane's columns are in the registers of one thread: neighbours if they can be loaded together, else as
    far apart as the lanes are many, so that the threads of a warp load neighbours. With several rows per
    program a lane is a row."""
    if ROWS > 1:
        first = tl.zeros((ROWS, 1), tl.int32)
        columns = tl.arange(0, TILE)[None, :]
    elif VECTOR > 1:
        first = tl.arange(0, TILE // LANE)[:, None] * LANE
        columns = first + tl.arange(0, LANE)[None, :]
    else:
        first = tl.arange(0, TILE // LANE)[:, None]
        columns = first + tl.arange(0, LANE)[None, :] * (TILE // LANE)
    return first, columns


@triton.jit
def numbers_of(numbers, dynamic_pointer, DYNAMIC: tl.constexpr):
    """The options of a loss; the first DYNAMIC of them are read from memory."""
    values = ()
    for which in tl.static_range(len(numbers)):
        value = tl.load(dynamic_pointer + which) if which < DYNAMIC else numbers[which]
        # The JIT supports neither unpacking nor a variable annotated with a non-constexpr type.
        values = values + (value,)  # type: ignore[assignment]  # noqa: RUF005
    return values


@triton.jit
def load_logits(rows, columns, classes, exists, EVICT: tl.constexpr, SUMMED: tl.constexpr = False):
    """A tile of logits in float32; those below MASKED (-inf) are MASKED, and those past the end of the row,
    or EXCLUDED if exponentials are summed."""
    inside = columns < classes
    logits = tl.load(rows + columns, mask=inside & exists, other=float("-inf"), eviction_policy=EVICT)
    lowest = tl.where(inside, MASKED, EXCLUDED) if SUMMED else MASKED
    return tl.maximum(logits.to(tl.float32), lowest, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def load_label_logit(rows, label, classes, exists):
    """The label's logit, NaN if +inf: in sums +inf becomes NaN, but the label is excluded from them."""
    logit = load_logits(rows, label, classes, exists, "")
    return tl.where(logit == float("inf"), float("nan"), logit)


@triton.jit
def weight_of_rows(weight_pointer, weight_stride, pair, index, exists, scale, WEIGHTED: tl.constexpr):
    """Weights of the rows, and the mask of rows to read: those of weight 0 are not read."""
    weight = tl.where(exists, scale, 0.0)
    if WEIGHTED:
        weight *= tl.load(weight_pointer + pair * weight_stride + index, mask=exists, other=0.0)
    return weight, exists & (weight != 0.0)


@triton.jit
def weighted(value, weight, bad_label):
    """``weight * value``; 0 for rows of weight 0, NaN for labels out of range."""
    return tl.where(weight == 0.0, 0.0, tl.where(bad_label, float("nan"), weight * value))


@triton.jit
def store_tile(rows, columns, classes, exists, value):
    """Store the gradient."""
    tl.store(rows + columns, value.to(rows.dtype.element_ty), mask=(columns < classes) & exists)


# Sums of several columns of values [n, 1] in one exchange between threads. The interpreter adds the rows of a
# wider tensor one by one, which loses digits: it sums each column alone.


@triton.jit
def reduced_pair(a, b, LARGEST: tl.constexpr):
    """The sums, or the largest, of two columns."""
    if COMPILED:
        both = tl.join(a, b)
        first, second = tl.split(tl.max(both, 0) if LARGEST else tl.sum(both, 0))
        return first[:, None], second[:, None]
    elif LARGEST:
        return tl.max(a, 0, keep_dims=True), tl.max(b, 0, keep_dims=True)
    else:
        return tl.sum(a, 0, keep_dims=True), tl.sum(b, 0, keep_dims=True)


@triton.jit
def sums_of_tiles(a, b, ROWS: tl.constexpr):
    """The sums of two tiles over their columns."""
    a = tl.sum(a, 1, keep_dims=True)
    b = tl.sum(b, 1, keep_dims=True)
    if ROWS == 1:
        a, b = reduced_pair(a, b, False)
    return a, b


@triton.jit
def sums_of_four(a, b, c, d):
    """The sums of four columns."""
    if COMPILED:
        first, second = tl.split(tl.sum(tl.join(tl.join(a, b), tl.join(c, d)), 0))
        a, b = tl.split(first)
        c, d = tl.split(second)
        return a[:, None], b[:, None], c[:, None], d[:, None]
    else:
        a, b = reduced_pair(a, b, False)
        c, d = reduced_pair(c, d, False)
        return a, b, c, d
