"""The generalised Jensen-Shannon divergence."""

import triton
import triton.language as tl

from fastkd.ops.triton.formulas import expm1_of_negative, log1p_of_negative, log_ratio
from fastkd.ops.triton.softmax_rows import GRADIENT, STATISTICS, WHOLE
from fastkd.ops.triton.statistics import (
    DISTILS,
    SUMS_ALONE,
    WIDTH,
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
NEEDS = tl.constexpr(DISTILS.value | SUMS_ALONE.value)


@triton.jit
def mixture_tile(
    student_rows, teacher_rows, columns, classes, exists, sums, slope, beta, EVICT: tl.constexpr
):
    """q, p, p - q, log(q / m) and log(p / m) of a tile, m = beta p + (1 - beta) q.

    All from q, p and d = log(p / q), which is exact near equality and where a probability is 1 to rounding: m
    is the larger of the two times 1 + w (e^-|d| - 1), w being the other's share.
    """
    max_s, sum_s, plain_s, max_t, sum_t, plain_t, dot, moment_s, moment_t, above_label = sums
    a = relative(load_logits(student_rows, columns, classes, exists, EVICT), max_s, slope)
    b = relative(load_logits(teacher_rows, columns, classes, exists, EVICT), max_t, slope)
    q = tl.exp(a) * (1.0 / sum_s)
    p = tl.exp(b) * (1.0 / sum_t)
    d = (b - a) - log_ratio(sum_t, sum_s)
    teacher_larger = d > 0
    fraction = expm1_of_negative(-tl.abs(d))
    difference = tl.where(teacher_larger, -p, q) * fraction
    log_larger = -log1p_of_negative(tl.where(teacher_larger, 1.0 - beta, beta) * fraction)
    log_q = tl.where(teacher_larger, log_larger - d, log_larger)
    log_p = tl.where(teacher_larger, log_larger, log_larger + d)
    return q, p, difference, log_q, log_p


@triton.jit
def combine_kl(of_row, parts, PARTS: tl.constexpr):
    part = tl.arange(0, PARTS)[None, :]
    return tl.sum(tl.load(of_row + part * 3, mask=part < parts, other=0.0), 1, keep_dims=True)


@triton.jit
def jsd_block(
    block,
    logits,
    weight_pointer,
    outputs,
    partials,
    sizes,
    strides,
    scale,
    slope,
    beta,
    WEIGHTED: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    PHASE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    PARTS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """One block of rows, or this program's part of it."""
    students, teachers = logits
    loss_pointer, gradient_pointer = outputs
    kl_pointer, sums_pointer = partials
    count, inner_rows, parts, classes = sizes
    student_strides, teacher_strides, weight_stride, gradient_stride = strides
    part = tl.program_id(1)
    pair = tl.program_id(2).to(tl.int64)
    first_tile, end_tile = tiles_of_part(part, parts, classes, TILE)
    index, exists = rows_of_block(block, count, ROWS)
    result = pair * count + index
    weight, read = weight_of_rows(weight_pointer, weight_stride, pair, index, exists, scale, WEIGHTED)
    student_rows = students + row_starts(index, inner_rows, student_strides, VECTOR)
    teacher_rows = teachers + row_starts(index, inner_rows, teacher_strides, VECTOR)
    partial = result * parts + part
    slopes = (slope, slope)

    if PHASE == WHOLE or PHASE == STATISTICS:  # noqa: SIM109
        no_label = tl.full((ROWS, 1), -1, tl.int32)
        sums = take_statistics(
            student_rows, teacher_rows, 0.0, 0.0, no_label, 0.0, classes, read, slopes, (0.0, 0.0),
            first_tile, end_tile, NEEDS, ROWS, TILE, False,
        )  # fmt: skip
    else:
        sums = combine_statistics(sums_pointer + result * parts * WIDTH, parts, slopes, NEEDS, PARTS)

    if PHASE == STATISTICS:
        store_partial(sums_pointer + partial * WIDTH, sums, exists)
    else:
        student_kl = tl.zeros((ROWS, 1), tl.float32)
        teacher_kl = tl.zeros((ROWS, 1), tl.float32)
        mean_log_q = tl.zeros((ROWS, 1), tl.float32)
        if PHASE == GRADIENT:
            kl_of_row = kl_pointer + result * parts * 3
            student_kl = combine_kl(kl_of_row, parts, PARTS)
            teacher_kl = combine_kl(kl_of_row + 1, parts, PARTS)
            mean_log_q = combine_kl(kl_of_row + 2, parts, PARTS)
        else:
            for tile in range(first_tile, end_tile):
                columns = tile * TILE + tl.arange(0, TILE)[None, :]
                q, p, difference, log_q, log_p = mixture_tile(
                    student_rows, teacher_rows, columns, classes, read, sums, slope, beta, "evict_last"
                )
                # The sums of m - q and m - p are 0; with them each class's number is positive, and near
                # equality nothing cancels.
                student_kl += tl.sum(q * log_q + beta * difference, 1, keep_dims=True)
                teacher_kl += tl.sum(p * log_p - (1.0 - beta) * difference, 1, keep_dims=True)
                # KL(q || m) again, with the very errors of log q / m, which cancel in the gradient.
                mean_log_q += tl.sum(q * log_q, 1, keep_dims=True)

        if PHASE == MIXTURE:
            store_partial(kl_pointer + partial * 3, (student_kl, teacher_kl, mean_log_q), exists)
        else:
            if part == 0:
                loss = weight * (beta * teacher_kl + (1.0 - beta) * student_kl)
                tl.store(loss_pointer + result, tl.where(weight == 0.0, 0.0, loss), mask=exists)
            if WITH_GRADIENT:
                gradient_rows = gradient_pointer + multiple(result * gradient_stride, VECTOR)
                for tile in range(first_tile, end_tile):
                    columns = tile * TILE + tl.arange(0, TILE)[None, :]
                    q, p, difference, log_q, log_p = mixture_tile(
                        student_rows, teacher_rows, columns, classes, read, sums, slope, beta, "evict_first"
                    )
                    value = weight * (1.0 - beta) * slope * (q * (log_q - mean_log_q))
                    store_tile(gradient_rows, columns, classes, exists, value, weight, False)


@triton.jit(do_not_specialize=[*NOT_SPECIALIZED, "kl_pointer", "sums_pointer", "blocks"])
def jsd_rows(
    student_pointers,
    teacher_pointers,
    weight_pointer,
    loss_pointer,
    gradient_pointer,
    kl_pointer,
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
    WEIGHTED: tl.constexpr,
    DYNAMIC: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    PHASE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    PARTS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """beta KL(p || m) + (1 - beta) KL(q || m).

    The mixture needs both distributions normalised first, so there are three passes over a row; a short one
    comes from cache the second and third time. Programs, ``numbers``, DYNAMIC and VECTOR as in softmax_rows.
    """
    pair = tl.program_id(2)
    logits = (of_pair(student_pointers, pair), of_pair(teacher_pointers, pair))
    outputs = (loss_pointer, gradient_pointer)
    partials = (kl_pointer, sums_pointer)
    sizes = (count, inner_rows, parts, multiple(classes, VECTOR))
    student_strides = (student_outer_stride, student_inner_stride)
    teacher_strides = (teacher_outer_stride, teacher_inner_stride)
    strides = (student_strides, teacher_strides, weight_stride, gradient_stride)
    values = numbers_of(numbers, dynamic_pointer, DYNAMIC)
    slope = tl.div_rn(1.0, values[0])
    beta = values[1]
    if PHASE == WHOLE:
        for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
            jsd_block(
                block, logits, weight_pointer, outputs, partials, sizes, strides, scale, slope, beta,
                WEIGHTED, WITH_GRADIENT, PHASE, ROWS, TILE, PARTS, VECTOR,
            )  # fmt: skip
    else:
        jsd_block(
            tl.program_id(0), logits, weight_pointer, outputs, partials, sizes, strides, scale, slope, beta,
            WEIGHTED, WITH_GRADIENT, PHASE, ROWS, TILE, PARTS, VECTOR,
        )  # fmt: skip
