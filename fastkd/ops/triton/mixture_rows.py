"""The row skeleton of the mixture family: sums over classes of a function of q and p.

q and p need the normalising sums, and the gradient the mean of a function under q. A row that is one tile is
read once: what the gradient needs of each class stays in registers. Longer rows take three passes: softmax
sums, loss, gradient.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastkd.ops.triton.formulas import Probabilities
from fastkd.ops.triton.row_sums import sum_rows
from fastkd.ops.triton.scalar_math import expm1_of_negative, log_ratio
from fastkd.ops.triton.softmax_rows import GRADIENT, STATISTICS, WHOLE
from fastkd.ops.triton.statistics import (
    DISTILLS,
    SUMS_ONLY,
    WIDTH,
    Pair,
    exponential,
    load_statistics,
    scaled,
    statistics_of,
    store_partial,
)
from fastkd.ops.triton.tiles import (
    NOT_SPECIALIZED,
    lane_columns,
    load_logits,
    multiple,
    numbers_of,
    of_pair,
    row_starts,
    rows_of_block,
    store_tile,
    sums_of_four,
    tiles_of_part,
    weight_of_rows,
    weighted,
)

# The phase between STATISTICS and GRADIENT.
MIXTURE = tl.constexpr(4)
NEEDS = tl.constexpr(DISTILLS.value | SUMS_ONLY.value)


@triton.jit
def load_tile(rows, columns, classes, exists, EVICT: tl.constexpr, SUMMED: tl.constexpr):
    student = load_logits(rows.student, columns, classes, exists, EVICT, SUMMED)
    return Pair(student, load_logits(rows.teacher, columns, classes, exists, EVICT, SUMMED))


@triton.jit
def probabilities(tile, sums, slope):
    """q, p and their differences of a tile."""
    a = tile.student - sums.max_s
    b = tile.teacher - sums.max_t
    q = exponential(a, slope) * (1.0 / sums.sum_s)
    p = exponential(b, slope) * (1.0 / sums.sum_t)
    d = scaled(b - a, slope) - log_ratio(sums.sum_t, sums.sum_s)
    difference = tl.where(d > 0, -p, q) * expm1_of_negative(-tl.abs(d))
    return Probabilities(q, p, difference, d)


class Totals(NamedTuple):
    """Sums over a row, or a lane or a part of it."""

    loss: Any
    slope: Any  # of the classes' weighted slopes
    q_first: Any  # of q, of the classes at the first origin
    q_second: Any


# Size of the partial results of a part of a row.
TOTALS = tl.constexpr(len(Totals._fields))


@triton.jit
def totals_of_tile(value, weighted_slope, shifted, q):
    """Along the second axis of a tile."""
    return Totals(
        tl.sum(value, 1, keep_dims=True),
        tl.sum(weighted_slope, 1, keep_dims=True),
        tl.sum(tl.where(shifted, 0.0, q), 1, keep_dims=True),
        tl.sum(tl.where(shifted, q, 0.0), 1, keep_dims=True),
    )


@triton.jit
def gradient_of_classes(q, weighted_slope, shifted, step, totals, factor):
    mean = tl.where(shifted, totals.slope - step * totals.q_first, totals.slope + step * totals.q_second)
    return factor * (weighted_slope * (totals.q_first + totals.q_second) - q * mean)


@triton.jit
def combine_total(row_pointer, parts, PARTS: tl.constexpr):
    # Down a column, as statistics are: of a row Triton 3.6 gives every thread all parts, and spills them.
    part = tl.arange(0, PARTS)[:, None]
    return tl.sum(tl.load(row_pointer + part * TOTALS, mask=part < parts, other=0.0), 0, keep_dims=True)


@triton.jit
def mixture_block(
    block,
    logits,
    weight_pointer,
    outputs,
    partials,
    sizes,
    strides,
    scale,
    numbers,
    FORMULA: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    PHASE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    ONE_TILE: tl.constexpr,
    PARTS: tl.constexpr,
    LANE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Compute a block of rows, or this program's part of it."""
    loss_pointer, gradient_pointer = outputs
    totals_pointer, sums_pointer = partials
    count, inner_rows, parts, classes = sizes
    student_strides, teacher_strides, weight_stride, gradient_stride = strides
    part = tl.program_id(1)
    pair = tl.program_id(2).to(tl.int64)
    first_tile, end_tile = tiles_of_part(part, parts, classes, TILE)
    index, exists = rows_of_block(block, count, ROWS)
    result = pair * count + index
    weight, read = weight_of_rows(weight_pointer, weight_stride, pair, index, exists, scale, WEIGHTED)
    rows = Pair(
        logits.student + row_starts(index, inner_rows, student_strides, VECTOR),
        logits.teacher + row_starts(index, inner_rows, teacher_strides, VECTOR),
    )
    partial = result * parts + part
    slope = tl.div_rn(1.0, numbers[0])
    slopes = Pair(slope, slope)

    first, columns = lane_columns(ROWS, TILE, LANE, VECTOR)
    only = Pair(0.0, 0.0)
    if ONE_TILE:
        only = load_tile(rows, columns, classes, read, "evict_first", True)

    if PHASE == WHOLE or PHASE == STATISTICS:  # noqa: SIM109
        no_label = tl.full((ROWS, 1), -1, tl.int32)
        sums = statistics_of(
            rows, only.student, only.teacher, no_label, 0.0, classes, read, slopes, (0.0, 0.0),
            first_tile, end_tile, NEEDS, ROWS, TILE, ONE_TILE, LANE, VECTOR,
        )  # fmt: skip
    else:
        sums = load_statistics(sums_pointer + result * parts * WIDTH, parts, slopes, NEEDS, PARTS)

    if PHASE == STATISTICS:
        store_partial(sums_pointer + partial * WIDTH, sums, exists)
    else:
        if PHASE == GRADIENT:
            row_totals = totals_pointer + result * parts * TOTALS
            totals = Totals(
                combine_total(row_totals, parts, PARTS), combine_total(row_totals + 1, parts, PARTS),
                combine_total(row_totals + 2, parts, PARTS), combine_total(row_totals + 3, parts, PARTS),
            )  # fmt: skip
        else:
            if ONE_TILE:
                probs = probabilities(only, sums, slope)
                value, weighted_slope, shifted, step = FORMULA(probs, numbers)
                totals = totals_of_tile(value, weighted_slope, shifted, probs.q)
            else:
                zero = tl.zeros_like(first).to(tl.float32)
                totals = Totals(zero, zero, zero, zero)
                for number in range(first_tile, end_tile):
                    tile = load_tile(rows, number * TILE + columns, classes, read, "evict_last", True)
                    probs = probabilities(tile, sums, slope)
                    value, weighted_slope, shifted, _ = FORMULA(probs, numbers)
                    of_tile = totals_of_tile(value, weighted_slope, shifted, probs.q)
                    totals = Totals(
                        totals.loss + of_tile.loss, totals.slope + of_tile.slope,
                        totals.q_first + of_tile.q_first, totals.q_second + of_tile.q_second,
                    )  # fmt: skip
            if ROWS == 1:
                loss, slope_sum, q_first, q_second = sums_of_four(
                    totals.loss, totals.slope, totals.q_first, totals.q_second
                )
                totals = Totals(loss, slope_sum, q_first, q_second)

        if PHASE == MIXTURE:
            store_partial(totals_pointer + partial * TOTALS, totals, exists)
        else:
            if part == 0:
                tl.store(loss_pointer + result, weighted(totals.loss, weight, False), mask=exists)
            if WITH_GRADIENT:
                # The mean of h relative to an origin is a sum divided by the sum of these q rather than by 1:
                # their common rounding error cancels in h - mean. A NaN loss propagates to the gradient.
                q_sum = totals.q_first + totals.q_second
                factor = weighted(
                    slope / tl.where(totals.loss == totals.loss, q_sum, totals.loss), weight, False
                )
                gradient_rows = gradient_pointer + multiple(result * gradient_stride, VECTOR)
                if ONE_TILE:
                    gradient = gradient_of_classes(probs.q, weighted_slope, shifted, step, totals, factor)
                    store_tile(gradient_rows, columns, classes, exists, gradient)
                else:
                    for number in range(first_tile, end_tile):
                        tile_columns = number * TILE + columns
                        tile = load_tile(rows, tile_columns, classes, read, "evict_first", False)
                        probs = probabilities(tile, sums, slope)
                        _, weighted_slope, shifted, step = FORMULA(probs, numbers)
                        gradient = gradient_of_classes(probs.q, weighted_slope, shifted, step, totals, factor)
                        store_tile(gradient_rows, tile_columns, classes, exists, gradient)


@triton.jit(do_not_specialize=[*NOT_SPECIALIZED, "totals_pointer", "sums_pointer", "blocks"])
def mixture_rows(
    student_pointers,
    teacher_pointers,
    weight_pointer,
    loss_pointer,
    gradient_pointer,
    totals_pointer,
    sums_pointer,
    reduction,
    dynamic_pointer,
    count,
    inner_rows,
    blocks,
    parts,
    classes,
    student_outer_stride,
    student_inner_stride,
    teacher_outer_stride,
    teacher_inner_stride,
    weight_stride,
    gradient_stride,
    scale,
    numbers,
    FORMULA: tl.constexpr,
    WEIGHTED: tl.constexpr,
    DYNAMIC: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    PHASE: tl.constexpr,
    SUMMED: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    ONE_TILE: tl.constexpr,
    PARTS: tl.constexpr,
    LANE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Compute losses and gradient of ``count`` rows per pair. Grid, ``numbers``, DYNAMIC, VECTOR and SUMMED
    as in softmax_rows."""
    pair = tl.program_id(2)
    logits = Pair(of_pair(student_pointers, pair), of_pair(teacher_pointers, pair))
    outputs = (loss_pointer, gradient_pointer)
    partials = (totals_pointer, sums_pointer)
    sizes = (count, inner_rows, parts, multiple(classes, VECTOR))
    student_strides = (student_outer_stride, student_inner_stride)
    teacher_strides = (teacher_outer_stride, teacher_inner_stride)
    strides = (student_strides, teacher_strides, weight_stride, gradient_stride)
    values = numbers_of(numbers, dynamic_pointer, DYNAMIC)
    if PHASE == WHOLE and not ONE_TILE:
        for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
            mixture_block(
                block, logits, weight_pointer, outputs, partials, sizes, strides, scale, values, FORMULA,
                WEIGHTED, WITH_GRADIENT, PHASE, ROWS, TILE, ONE_TILE, PARTS, LANE, VECTOR,
            )  # fmt: skip
    else:
        mixture_block(
            tl.program_id(0), logits, weight_pointer, outputs, partials, sizes, strides, scale, values,
            FORMULA, WEIGHTED, WITH_GRADIENT, PHASE, ROWS, TILE, ONE_TILE, PARTS, LANE, VECTOR,
        )  # fmt: skip
    if SUMMED:
        sum_rows(reduction, loss_pointer, loss_pointer, count, count, False)
