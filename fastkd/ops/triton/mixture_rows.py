"""The row skeleton of the mixture family: sums over classes of a function of q and p.

q and p need the normalising sums, so there are three passes: softmax sums, loss, gradient. The second and
third read short rows from cache.
"""

import triton
import triton.language as tl

from fastkd.ops.triton.formulas import Probabilities, expm1_of_negative, log_ratio
from fastkd.ops.triton.row_sums import sum_rows
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
    tiles_of_part,
    weight_of_rows,
    weighted,
)

# The phase between STATISTICS and GRADIENT.
MIXTURE = tl.constexpr(4)
NEEDS = tl.constexpr(DISTILLS.value | SUMS_ONLY.value)
# Size of the partial results of that phase.
TOTALS = tl.constexpr(4)


@triton.jit
def tile_probabilities(rows, columns, classes, exists, sums, slope, EVICT: tl.constexpr):
    """q, p and their differences of a tile."""
    a = load_logits(rows.student, columns, classes, exists, EVICT) - sums.max_s
    b = load_logits(rows.teacher, columns, classes, exists, EVICT) - sums.max_t
    q = exponential(a, slope) * (1.0 / sums.sum_s)
    p = exponential(b, slope) * (1.0 / sums.sum_t)
    d = scaled(b - a, slope) - log_ratio(sums.sum_t, sums.sum_s)
    difference = tl.where(d > 0, -p, q) * expm1_of_negative(-tl.abs(d))
    return Probabilities(q, p, difference, d)


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

    if PHASE == WHOLE or PHASE == STATISTICS:  # noqa: SIM109
        no_label = tl.full((ROWS, 1), -1, tl.int32)
        sums = statistics_of(
            rows, 0.0, 0.0, no_label, 0.0, classes, read, slopes, (0.0, 0.0), first_tile, end_tile, NEEDS,
            ROWS, TILE, False, LANE, VECTOR,
        )  # fmt: skip
    else:
        sums = load_statistics(sums_pointer + result * parts * WIDTH, parts, slopes, NEEDS, PARTS)

    if PHASE == STATISTICS:
        store_partial(sums_pointer + partial * WIDTH, sums, exists)
    else:
        first, columns = lane_columns(ROWS, TILE, LANE, VECTOR)
        if PHASE == GRADIENT:
            row_totals = totals_pointer + result * parts * TOTALS
            loss = combine_total(row_totals, parts, PARTS)
            slope_sum = combine_total(row_totals + 1, parts, PARTS)
            q_first = combine_total(row_totals + 2, parts, PARTS)
            q_second = combine_total(row_totals + 3, parts, PARTS)
        else:
            loss = tl.zeros_like(first).to(tl.float32)
            slope_sum = loss
            q_first = loss  # of the classes at the first origin
            q_second = loss
            for tile in range(first_tile, end_tile):
                tile_columns = tile * TILE + columns
                probs = tile_probabilities(rows, tile_columns, classes, read, sums, slope, "evict_last")
                value, weighted_slope, shifted, _ = FORMULA(probs, numbers)
                loss += tl.sum(value, 1, keep_dims=True)
                slope_sum += tl.sum(weighted_slope, 1, keep_dims=True)
                q_first += tl.sum(tl.where(shifted, 0.0, probs.q), 1, keep_dims=True)
                q_second += tl.sum(tl.where(shifted, probs.q, 0.0), 1, keep_dims=True)
            if ROWS == 1:
                loss = tl.sum(loss, 0, keep_dims=True)
                slope_sum = tl.sum(slope_sum, 0, keep_dims=True)
                q_first = tl.sum(q_first, 0, keep_dims=True)
                q_second = tl.sum(q_second, 0, keep_dims=True)

        if PHASE == MIXTURE:
            store_partial(totals_pointer + partial * TOTALS, (loss, slope_sum, q_first, q_second), exists)
        else:
            if part == 0:
                tl.store(loss_pointer + result, weighted(loss, weight, False), mask=exists)
            if WITH_GRADIENT:
                # The mean of h relative to an origin is a sum divided by the sum of these q rather than by 1:
                # their common rounding error cancels in h - mean. A NaN loss propagates to the gradient.
                q_sum = q_first + q_second
                factor = weighted(slope / tl.where(loss == loss, q_sum, loss), weight, False)
                gradient_rows = gradient_pointer + multiple(result * gradient_stride, VECTOR)
                for tile in range(first_tile, end_tile):
                    tile_columns = tile * TILE + columns
                    probs = tile_probabilities(rows, tile_columns, classes, read, sums, slope, "evict_first")
                    _, weighted_slope, shifted, step = FORMULA(probs, numbers)
                    mean = tl.where(shifted, slope_sum - step * q_first, slope_sum + step * q_second)
                    value = factor * (weighted_slope * q_sum - probs.q * mean)
                    store_tile(gradient_rows, tile_columns, classes, exists, value)


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
    if PHASE == WHOLE:
        for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
            mixture_block(
                block, logits, weight_pointer, outputs, partials, sizes, strides, scale, values, FORMULA,
                WEIGHTED, WITH_GRADIENT, PHASE, ROWS, TILE, PARTS, LANE, VECTOR,
            )  # fmt: skip
    else:
        mixture_block(
            tl.program_id(0), logits, weight_pointer, outputs, partials, sizes, strides, scale, values,
            FORMULA, WEIGHTED, WITH_GRADIENT, PHASE, ROWS, TILE, PARTS, LANE, VECTOR,
        )  # fmt: skip
    if SUMMED:
        sum_rows(reduction, loss_pointer, loss_pointer, count, count, False)
