"""Mean and deviation of rows of logits, for standardised losses."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastkd.ops.triton.statistics import Pair
from fastkd.ops.triton.tiles import lane_columns, load_logits, sums_of_tiles

STANDARDIZE_EPSILON = tl.constexpr(1e-7)


class Moments(NamedTuple):
    """Mean, sum of squared deviations and count of logits relative to a base."""

    mean: Any
    squares: Any
    count: Any


MOMENTS_WIDTH = tl.constexpr(len(Moments._fields))


@triton.jit
def base_of_rows(rows, classes, exists, ROWS: tl.constexpr):
    """The first logit of each row. Moments are relative to it: for a mean far above the spread, the rounding
    of the mean would be as large as the deviations."""
    return load_logits(rows, tl.zeros((ROWS, 1), tl.int32), classes, exists, "")


@triton.jit
def moments_of(rows, classes, exists, first_tile, end_tile, ROWS: tl.constexpr, TILE: tl.constexpr,
               LANE: tl.constexpr, VECTOR: tl.constexpr):  # fmt: skip
    """Moments of tiles ``first_tile`` to ``end_tile``.

    Each lane's deviations are from its own first logit, which has the row's mean within a few deviations: the
    difference of the squares loses little."""
    base = base_of_rows(rows, classes, exists, ROWS)
    first, columns = lane_columns(ROWS, TILE, LANE, VECTOR)
    own = load_logits(rows, first_tile * TILE + first, classes, exists, "evict_last")
    total = tl.zeros_like(own)
    squares = tl.zeros_like(own)
    count = tl.zeros_like(own)
    for tile in range(first_tile, end_tile):
        tile_columns = tile * TILE + columns
        inside = tile_columns < classes
        above = load_logits(rows, tile_columns, classes, exists, "evict_last") - own
        above = tl.where(inside, above, 0.0)
        total += tl.sum(above, 1, keep_dims=True)
        squares += tl.sum(above * above, 1, keep_dims=True)
        count += tl.sum(inside.to(tl.float32), 1, keep_dims=True)
    some = tl.maximum(count, 1.0)
    mean = tl.where(count > 0, (own - base) + total / some, 0.0)
    return combine_moments(Moments(mean, squares - total * (total / some), count))


@triton.jit
def moments_of_tile(rows, student, teacher, columns, classes, exists, ROWS: tl.constexpr):
    """Moments of both models' rows that are one tile."""
    inside = columns < classes
    above_s = tl.where(inside, student - base_of_rows(rows.student, classes, exists, ROWS), 0.0)
    above_t = tl.where(inside, teacher - base_of_rows(rows.teacher, classes, exists, ROWS), 0.0)
    total_s, total_t = sums_of_tiles(above_s, above_t, ROWS)
    count = classes.to(tl.float32) + tl.zeros_like(total_s)
    mean_s = total_s / count
    mean_t = total_t / count
    centred_s = tl.where(inside, above_s - mean_s, 0.0)
    centred_t = tl.where(inside, above_t - mean_t, 0.0)
    squares_s, squares_t = sums_of_tiles(centred_s * centred_s, centred_t * centred_t, ROWS)
    return Pair(Moments(mean_s, squares_s, count), Moments(mean_t, squares_t, count))


@triton.jit
def moments_of_both(rows, classes, exists, first_tile, end_tile, ROWS: tl.constexpr, TILE: tl.constexpr,
                    LANE: tl.constexpr, VECTOR: tl.constexpr):  # fmt: skip
    of_student = moments_of(rows.student, classes, exists, first_tile, end_tile, ROWS, TILE, LANE, VECTOR)
    of_teacher = moments_of(rows.teacher, classes, exists, first_tile, end_tile, ROWS, TILE, LANE, VECTOR)
    return Pair(of_student, of_teacher)


@triton.jit
def combine_moments(parts):
    """Moments of a whole, from those of its parts along the first axis (Chan et al.)."""
    total = tl.sum(parts.count, 0, keep_dims=True)
    mean = tl.sum(parts.mean * parts.count, 0, keep_dims=True) / total
    deviation = parts.mean - mean
    return Moments(
        mean, tl.sum(parts.squares + parts.count * deviation * deviation, 0, keep_dims=True), total
    )


@triton.jit
def load_moments(row_pointer, parts, PARTS: tl.constexpr):
    """Moments of the whole row, from those of its parts in memory."""
    part = tl.arange(0, PARTS)[:, None]
    written = part < parts
    pointer = row_pointer + part * (2 * MOMENTS_WIDTH)
    mean = tl.load(pointer, mask=written, other=0.0)
    squares = tl.load(pointer + 1, mask=written, other=0.0)
    return combine_moments(Moments(mean, squares, tl.load(pointer + 2, mask=written, other=0.0)))


@triton.jit
def slope_of_moments(moments, temperature):
    """1 / ((std + epsilon) T), and std."""
    deviation = tl.sqrt(moments.squares / (moments.count - 1))
    return 1.0 / ((deviation + STANDARDIZE_EPSILON) * temperature), deviation
