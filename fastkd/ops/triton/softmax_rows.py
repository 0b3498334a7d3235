"""The row skeleton of the softmax family: sums, a formula, the gradient.

Rows that fit into a tile are read once and their gradient written once, several short rows to a program. A
longer row is swept twice; where there are few of them each is shared by several programs, a launch a phase.
"""

import triton
import triton.language as tl

from fastkd.ops.triton.statistics import (
    DISTILS,
    LABELLED,
    PLAIN,
    PLAIN_TEACHER,
    STANDARDIZED,
    TILT,
    combine_moments,
    combine_statistics,
    scale_of_moments,
    store_partial,
    sweep_moments,
    sweep_statistics,
)
from fastkd.ops.triton.tiles import (
    load_logits,
    of_pair,
    rows_of_block,
    store_tile,
    tiles_of_part,
    weight_of_rows,
)

# What a launch does: all of a row; or, of a row that programs share, one phase over what the last one found.
WHOLE = tl.constexpr(0)
MOMENTS = tl.constexpr(1)
STATISTICS = tl.constexpr(2)
GRADIENT = tl.constexpr(3)


@triton.jit
def gradient_tile(
    student,
    teacher,
    columns,
    label,
    maxima,
    coefficients,
    student_scale,
    teacher_scale,
    weight,
    NEEDS: tl.constexpr,
):
    max_s, max_t = maxima
    by_student, by_teacher, by_plain, constant, affine, tilt, at_label = coefficients
    slope_s, mean_s, deviation_s = student_scale
    slope_t, mean_t, deviation_t = teacher_scale
    exp_u = tl.exp((student - max_s) * slope_s)
    if TILT & NEEDS:
        value = exp_u * (by_student + tilt * ((teacher - student) * slope_t))
    else:
        value = by_student * exp_u
        if DISTILS & NEEDS:
            value = value - by_teacher * tl.exp((teacher - max_t) * slope_t)
    if PLAIN & NEEDS:
        value += by_plain * tl.exp(student - max_s)
    if STANDARDIZED & NEEDS:
        value += affine * (student - mean_s)
    return tl.where(columns == label, at_label, value + constant) * weight


@triton.jit
def softmax_block(
    block,
    logits,
    target_pointer,
    weight_pointer,
    outputs,
    partials,
    sizes,
    strides,
    scale,
    slopes,
    numbers,
    FORMULA: tl.constexpr,
    NEEDS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    TERMS: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    PHASE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    ONE_TILE: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One block of rows, or this program's part of it."""
    students, teachers = logits
    loss_pointer, terms_pointer, gradient_pointer = outputs
    moments_pointer, sums_pointer = partials
    count, parts, classes = sizes
    student_stride, teacher_stride, target_stride, gradient_stride = strides
    slope_s, slope_t = slopes

    part = tl.program_id(1)
    first_tile, end_tile = tiles_of_part(part, parts, classes, TILE)
    index, exists = rows_of_block(block, count, ROWS)
    result = tl.program_id(2).to(tl.int64) * count + index
    student_rows = students + index * student_stride
    teacher_rows = teachers + index * teacher_stride
    partial = result * parts + part

    if PHASE == MOMENTS:
        student_moments = sweep_moments(
            student_rows, classes, exists, first_tile, end_tile, ROWS, TILE, ONE_TILE
        )
        teacher_moments = sweep_moments(
            teacher_rows, classes, exists, first_tile, end_tile, ROWS, TILE, ONE_TILE
        )
        store_partial(moments_pointer + partial * 6, student_moments, exists)
        store_partial(moments_pointer + partial * 6 + 3, teacher_moments, exists)
    else:
        label = tl.full((ROWS, 1), -1, tl.int64)
        label_logits = (0.0, 0.0)
        bad_label = False
        if LABELLED & NEEDS:
            label = tl.load(target_pointer + index * target_stride, mask=exists, other=0)
            bad_label = (label < 0) | (label >= classes)
            label = tl.where(bad_label, 0, label)
            label_logits = (
                load_logits(student_rows, label, classes, exists, ""),
                load_logits(teacher_rows, label, classes, exists, ""),
            )
        student_scale = (slope_s, 0.0, 0.0)
        teacher_scale = (slope_t, 0.0, 0.0)
        if STANDARDIZED & NEEDS:
            if PHASE == WHOLE:
                student_moments = sweep_moments(
                    student_rows, classes, exists, first_tile, end_tile, ROWS, TILE, ONE_TILE
                )
                teacher_moments = sweep_moments(
                    teacher_rows, classes, exists, first_tile, end_tile, ROWS, TILE, ONE_TILE
                )
            else:
                moments_of_row = moments_pointer + result * parts * 6
                student_moments = combine_moments(moments_of_row, parts, PARTS)
                teacher_moments = combine_moments(moments_of_row + 3, parts, PARTS)
            student_scale = scale_of_moments(student_moments, numbers[0])
            teacher_scale = scale_of_moments(teacher_moments, numbers[0])

        if PHASE == GRADIENT:
            sums = combine_statistics(
                sums_pointer + result * parts * 12, parts, student_scale, teacher_scale, PARTS
            )
        else:
            sums, student, teacher, columns = sweep_statistics(
                student_rows, teacher_rows, label, classes, exists, student_scale, teacher_scale,
                first_tile, end_tile, NEEDS, ROWS, TILE, ONE_TILE,
            )  # fmt: skip

        if PHASE == STATISTICS:
            store_partial(sums_pointer + partial * 12, sums, exists)
        else:
            (
                max_s, sum_s, dot_s, moment_s, plain_s,
                max_t, sum_t, dot_t, moment_t, entropy_t, plain_t, total,
            ) = sums  # fmt: skip
            # Where a formula reads sums at T = 1 that were not taken, T is 1.
            if not PLAIN & NEEDS:
                plain_s = sum_s
            if not PLAIN_TEACHER & NEEDS:
                plain_t = sum_t
            sums = (
                max_s, sum_s, dot_s, moment_s, plain_s,
                max_t, sum_t, dot_t, moment_t, entropy_t, plain_t, total,
            )  # fmt: skip
            loss, terms, coefficients = FORMULA(
                sums, numbers, student_scale, teacher_scale, label_logits, classes, NEEDS
            )
            weight = weight_of_rows(weight_pointer, index, exists, scale, WEIGHTED)
            invalid = float("nan")
            if part == 0:
                value = tl.where(weight == 0.0, 0.0, tl.where(bad_label, invalid, weight * loss))
                tl.store(loss_pointer + result, value, mask=exists)
                if TERMS:
                    stride = tl.num_programs(2).to(tl.int64) * count
                    for term in tl.static_range(4):
                        value = weight * terms[term]
                        value = tl.where(weight == 0.0, 0.0, tl.where(bad_label, invalid, value))
                        tl.store(terms_pointer + term * stride + result, value, mask=exists)
            if WITH_GRADIENT:
                by_student, by_teacher, by_plain, constant, affine, tilt, at_label = coefficients
                if not PLAIN & NEEDS:
                    by_student += by_plain
                coefficients = (by_student, by_teacher, by_plain, constant, affine, tilt, at_label)
                maxima = (max_s, max_t)
                gradient_rows = gradient_pointer + result * gradient_stride
                if ONE_TILE:
                    value = gradient_tile(
                        student, teacher, columns, label, maxima, coefficients,
                        student_scale, teacher_scale, weight, NEEDS,
                    )  # fmt: skip
                    store_tile(gradient_rows, columns, classes, exists, value, weight, bad_label)
                else:
                    # Last tile first: it is the one still in cache.
                    for step in range(first_tile, end_tile):
                        of_tile = (first_tile + end_tile - 1 - step) * TILE + tl.arange(0, TILE)[None, :]
                        logits_s = load_logits(student_rows, of_tile, classes, exists, "evict_first")
                        logits_t = logits_s
                        if DISTILS & NEEDS:
                            logits_t = load_logits(teacher_rows, of_tile, classes, exists, "evict_first")
                        value = gradient_tile(
                            logits_s, logits_t, of_tile, label, maxima, coefficients,
                            student_scale, teacher_scale, weight, NEEDS,
                        )  # fmt: skip
                        store_tile(gradient_rows, of_tile, classes, exists, value, weight, bad_label)


@triton.jit(do_not_specialize=["count", "blocks", "parts"])
def softmax_rows(
    student_pointers,
    teacher_pointers,
    target_pointer,
    weight_pointer,
    loss_pointer,
    terms_pointer,
    gradient_pointer,
    moments_pointer,
    sums_pointer,
    count,
    blocks,
    parts,
    classes,
    student_stride,
    teacher_stride,
    target_stride,
    gradient_stride,
    scale,
    slope_s,
    slope_t,
    numbers,
    FORMULA: tl.constexpr,
    NEEDS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    TERMS: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    PHASE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    ONE_TILE: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Loss, terms and gradient of ``count`` rows of each pair: what FORMULA makes of their statistics.

    Programs: (blocks of ROWS rows, parts of a row, pairs). ``numbers`` are the loss's options; a parameter of
    that name would collide with the ``**options`` of the function that Triton's JIT generates. NEEDS:
    bits of ``statistics``. PARTS: the most that ``parts`` may be.
    """
    pair = tl.program_id(2)
    logits = (of_pair(student_pointers, pair), of_pair(teacher_pointers, pair))
    outputs = (loss_pointer, terms_pointer, gradient_pointer)
    partials = (moments_pointer, sums_pointer)
    sizes = (count, parts, classes)
    strides = (student_stride, teacher_stride, target_stride, gradient_stride)
    slopes = (slope_s, slope_t)
    if PHASE == WHOLE and not ONE_TILE:
        # Fewer programs than rows where more rows at once would leave the cache between their sweeps.
        for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
            softmax_block(
                block, logits, target_pointer, weight_pointer, outputs, partials, sizes, strides, scale,
                slopes, numbers, FORMULA, NEEDS, WEIGHTED, TERMS, WITH_GRADIENT,
                PHASE, ROWS, TILE, ONE_TILE, PARTS,
            )  # fmt: skip
    else:
        softmax_block(
            tl.program_id(0), logits, target_pointer, weight_pointer, outputs, partials, sizes, strides,
            scale, slopes, numbers, FORMULA, NEEDS, WEIGHTED, TERMS, WITH_GRADIENT,
            PHASE, ROWS, TILE, ONE_TILE, PARTS,
        )  # fmt: skip
