"""The generalised Jensen-Shannon divergence."""

import triton
import triton.language as tl

from fastkd.ops.triton.softmax_rows import GRADIENT, STATISTICS, WHOLE
from fastkd.ops.triton.statistics import DISTILS, combine_statistics, store_partial, sweep_statistics
from fastkd.ops.triton.tiles import (
    load_logits,
    of_pair,
    rows_of_block,
    store_tile,
    tiles_of_part,
    weight_of_rows,
)

# The phase between STATISTICS and GRADIENT.
MIXTURE = tl.constexpr(4)


@triton.jit
def times_log_ratio(x, m):
    """x log(x / m) of probabilities; 0 at x = 0."""
    positive = x > 0
    return x * tl.log(tl.where(positive, x, 1.0) / tl.where(positive, m, 1.0))


@triton.jit
def mixture_tile(
    student_rows, teacher_rows, columns, classes, exists, sums, slope, beta, EVICT: tl.constexpr
):
    """q, q log(q / m) and p log(p / m) of a tile, m = beta p + (1 - beta) q."""
    max_s, sum_s, dot_s, moment_s, plain_s, max_t, sum_t, dot_t, moment_t, entropy_t, plain_t, total = sums
    student = load_logits(student_rows, columns, classes, exists, EVICT)
    teacher = load_logits(teacher_rows, columns, classes, exists, EVICT)
    q = tl.exp((student - max_s) * slope) * (1.0 / sum_s)
    p = tl.exp((teacher - max_t) * slope) * (1.0 / sum_t)
    # m from the difference: at p = q it is q exactly, and both logarithms are 0.
    m = tl.where(beta <= 0.5, q + beta * (p - q), p - (1.0 - beta) * (p - q))
    return q, times_log_ratio(q, m), times_log_ratio(p, m)


@triton.jit
def combine_kl(of_row, parts, PARTS: tl.constexpr):
    part = tl.arange(0, PARTS)[None, :]
    return tl.sum(tl.load(of_row + part * 2, mask=part < parts, other=0.0), 1, keep_dims=True)


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
):
    """One block of rows, or this program's part of it."""
    students, teachers = logits
    loss_pointer, gradient_pointer = outputs
    kl_pointer, sums_pointer = partials
    count, parts, classes = sizes
    student_stride, teacher_stride, gradient_stride = strides
    part = tl.program_id(1)
    first_tile, end_tile = tiles_of_part(part, parts, classes, TILE)
    common = (slope, 0.0, 0.0)
    index, exists = rows_of_block(block, count, ROWS)
    result = tl.program_id(2).to(tl.int64) * count + index
    student_rows = students + index * student_stride
    teacher_rows = teachers + index * teacher_stride
    partial = result * parts + part

    if PHASE == WHOLE or PHASE == STATISTICS:  # noqa: SIM109
        no_label = tl.full((ROWS, 1), -1, tl.int64)
        sums, _, _, _ = sweep_statistics(
            student_rows, teacher_rows, no_label, classes, exists, common, common, first_tile, end_tile,
            DISTILS, ROWS, TILE, False,
        )  # fmt: skip
    else:
        sums = combine_statistics(sums_pointer + result * parts * 12, parts, common, common, PARTS)

    if PHASE == STATISTICS:
        store_partial(sums_pointer + partial * 12, sums, exists)
    else:
        student_kl = tl.zeros((ROWS, 1), tl.float32)
        teacher_kl = tl.zeros((ROWS, 1), tl.float32)
        if PHASE == GRADIENT:
            student_kl = combine_kl(kl_pointer + result * parts * 2, parts, PARTS)
            teacher_kl = combine_kl(kl_pointer + result * parts * 2 + 1, parts, PARTS)
        else:
            for tile in range(first_tile, end_tile):
                columns = tile * TILE + tl.arange(0, TILE)[None, :]
                q, q_log, p_log = mixture_tile(
                    student_rows, teacher_rows, columns, classes, exists, sums, slope, beta, "evict_last"
                )
                student_kl += tl.sum(q_log, 1, keep_dims=True)
                teacher_kl += tl.sum(p_log, 1, keep_dims=True)

        if PHASE == MIXTURE:
            store_partial(kl_pointer + partial * 2, (student_kl, teacher_kl), exists)
        else:
            weight = weight_of_rows(weight_pointer, index, exists, scale, WEIGHTED)
            if part == 0:
                loss = weight * (beta * teacher_kl + (1.0 - beta) * student_kl)
                tl.store(loss_pointer + result, tl.where(weight == 0.0, 0.0, loss), mask=exists)
            if WITH_GRADIENT:
                gradient_rows = gradient_pointer + result * gradient_stride
                for tile in range(first_tile, end_tile):
                    columns = tile * TILE + tl.arange(0, TILE)[None, :]
                    q, q_log, p_log = mixture_tile(
                        student_rows, teacher_rows, columns, classes, exists, sums, slope, beta, "evict_first"
                    )
                    value = weight * (1.0 - beta) * slope * (q_log - q * student_kl)
                    store_tile(gradient_rows, columns, classes, exists, value, weight, False)


@triton.jit(do_not_specialize=["count", "blocks", "parts"])
def jsd_rows(
    student_pointers,
    teacher_pointers,
    weight_pointer,
    loss_pointer,
    gradient_pointer,
    kl_pointer,
    sums_pointer,
    count,
    blocks,
    parts,
    classes,
    student_stride,
    teacher_stride,
    gradient_stride,
    scale,
    slope,
    beta,
    WEIGHTED: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    PHASE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    PARTS: tl.constexpr,
):
    """beta KL(p || m) + (1 - beta) KL(q || m).

    The mixture needs both distributions normalised first, so a row is swept three times; a short one comes
    from cache the second and third. Programs as in softmax_rows.
    """
    pair = tl.program_id(2)
    logits = (of_pair(student_pointers, pair), of_pair(teacher_pointers, pair))
    outputs = (loss_pointer, gradient_pointer)
    partials = (kl_pointer, sums_pointer)
    sizes = (count, parts, classes)
    strides = (student_stride, teacher_stride, gradient_stride)
    if PHASE == WHOLE:
        for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
            jsd_block(
                block, logits, weight_pointer, outputs, partials, sizes, strides, scale, slope, beta,
                WEIGHTED, WITH_GRADIENT, PHASE, ROWS, TILE, PARTS,
            )  # fmt: skip
    else:
        jsd_block(
            tl.program_id(0), logits, weight_pointer, outputs, partials, sizes, strides, scale, slope, beta,
            WEIGHTED, WITH_GRADIENT, PHASE, ROWS, TILE, PARTS,
        )  # fmt: skip
