"""The row skeleton of losses that are a sum over classes of a function of q and p.

The distributions have to be normalised first, so there are three passes over a row; a short one comes from
cache the second and third time.
"""

import triton
import triton.language as tl

from fastkd.ops.triton.formulas import Probabilities, expm1_of_negative, log_ratio
from fastkd.ops.triton.softmax_rows import GRADIENT, STATISTICS, WHOLE
from fastkd.ops.triton.statistics import (
    DISTILLS,
    SUMS_ONLY,
    WIDTH,
    Pair,
    combine_statistics,
    relative,
    store_partial,
    take_statistics,
)
from fastkd.ops.triton.tiles import (
    NOT_SPECIALIZED,
    load_logits,
    multiple,
    numbers_of,
    of_pair,
    row_starts,
    rows_of_block,
    store_tile,
    tiles_of_part,
    weight_of_rows,
)

# The phase between STATISTICS and GRADIENT.
MIXTURE = tl.constexpr(4)
NEEDS = tl.constexpr(DISTILLS.value | SUMS_ONLY.value)
# Numbers that a part of a row hands on in that phase.
TOTALS = tl.constexpr(3)


@triton.jit
def probabilities_of(rows, columns, classes, exists, sums, slope, EVICT: tl.constexpr):
    """Of a tile."""
    a = relative(load_logits(rows.student, columns, classes, exists, EVICT), sums.max_s, slope)
    b = relative(load_logits(rows.teacher, columns, classes, exists, EVICT), sums.max_t, slope)
    q = tl.exp(a) * (1.0 / sums.sum_s)
    p = tl.exp(b) * (1.0 / sums.sum_t)
    d = (b - a) - log_ratio(sums.sum_t, sums.sum_s)
    difference = tl.where(d > 0, -p, q) * expm1_of_negative(-tl.abs(d))
    return Probabilities(q, p, difference, d)


@triton.jit
def combine_total(of_row, parts, PARTS: tl.constexpr):
    part = tl.arange(0, PARTS)[None, :]
    return tl.sum(tl.load(of_row + part * TOTALS, mask=part < parts, other=0.0), 1, keep_dims=True)


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
    VECTOR: tl.constexpr,
):
    """One block of rows, or this program's part of it."""
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
        sums = take_statistics(
            rows, 0.0, 0.0, no_label, 0.0, classes, read, slopes, (0.0, 0.0), first_tile, end_tile, NEEDS,
            ROWS, TILE, False,
        )  # fmt: skip
    else:
        sums = combine_statistics(sums_pointer + result * parts * WIDTH, parts, slopes, NEEDS, PARTS)

    if PHASE == STATISTICS:
        store_partial(sums_pointer + partial * WIDTH, sums, exists)
    else:
        loss = tl.zeros((ROWS, 1), tl.float32)
        slope_sum = tl.zeros((ROWS, 1), tl.float32)
        q_sum = tl.zeros((ROWS, 1), tl.float32)
        if PHASE == GRADIENT:
            totals_of_row = totals_pointer + result * parts * TOTALS
            loss = combine_total(totals_of_row, parts, PARTS)
            slope_sum = combine_total(totals_of_row + 1, parts, PARTS)
            q_sum = combine_total(totals_of_row + 2, parts, PARTS)
        else:
            for tile in range(first_tile, end_tile):
                columns = tile * TILE + tl.arange(0, TILE)[None, :]
                at = probabilities_of(rows, columns, classes, read, sums, slope, "evict_last")
                value, weighted_slope = FORMULA(at, numbers)
                loss += tl.sum(value, 1, keep_dims=True)
                slope_sum += tl.sum(weighted_slope, 1, keep_dims=True)
                q_sum += tl.sum(at.q, 1, keep_dims=True)

        if PHASE == MIXTURE:
            store_partial(totals_pointer + partial * TOTALS, (loss, slope_sum, q_sum), exists)
        else:
            if part == 0:
                tl.store(loss_pointer + result, tl.where(weight == 0.0, 0.0, weight * loss), mask=exists)
            if WITH_GRADIENT:
                # The mean of h is slope_sum / q_sum, of the very q: what rounding did to all of them cancels
                # in h - mean. A NaN of the teacher's makes the gradient NaN too.
                factor = weight * slope / tl.where(loss == loss, q_sum, loss)
                gradient_rows = gradient_pointer + multiple(result * gradient_stride, VECTOR)
                for tile in range(first_tile, end_tile):
                    columns = tile * TILE + tl.arange(0, TILE)[None, :]
                    at = probabilities_of(rows, columns, classes, read, sums, slope, "evict_first")
                    _, weighted_slope = FORMULA(at, numbers)
                    value = factor * (weighted_slope * q_sum - at.q * slope_sum)
                    store_tile(gradient_rows, columns, classes, exists, value, weight, False)


@triton.jit(do_not_specialize=[*NOT_SPECIALIZED, "totals_pointer", "sums_pointer", "blocks"])
def mixture_rows(
    student_pointers,
    teacher_pointers,
    weight_pointer,
    loss_pointer,
    gradient_pointer,
    totals_pointer,
    sums_pointer,
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
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    PARTS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Losses and gradient of ``count`` rows of each pair. Programs, ``numbers``, DYNAMIC and VECTOR as in
    softmax_rows."""
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
                WEIGHTED, WITH_GRADIENT, PHASE, ROWS, TILE, PARTS, VECTOR,
            )  # fmt: skip
    else:
        mixture_block(
            tl.program_id(0), logits, weight_pointer, outputs, partials, sizes, strides, scale, values,
            FORMULA, WEIGHTED, WITH_GRADIENT, PHASE, ROWS, TILE, PARTS, VECTOR,
        )  # fmt: skip
