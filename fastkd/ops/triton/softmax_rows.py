"""The row skeleton of the softmax family: sums, a formula, the gradient.

Rows that fit into a tile are read once and their gradient written once, several short rows to a program. A
longer row is passed over twice; where there are few of them each is shared by several programs, a launch per
phase.
"""

import triton
import triton.language as tl

from fastkd.ops.triton.statistics import (
    DISTILS,
    LABELLED,
    MOMENTS_WIDTH,
    OWN_SLOPES,
    PLAIN,
    PLAIN_TEACHER,
    STANDARDIZED,
    TILT,
    WIDTH,
    base_of_rows,
    combine_moments,
    combine_statistics,
    relative,
    slope_of_moments,
    store_partial,
    take_moments,
    take_statistics,
)
from fastkd.ops.triton.tiles import (
    NOT_SPECIALIZED,
    load_label_logit,
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
    slopes,
    centre,
    weight,
    NEEDS: tl.constexpr,
):
    max_s, max_t = maxima
    by_student, by_teacher, paired, by_plain, constant, affine, tilt, at_label = coefficients
    slope_s, slope_t = slopes
    base, mean = centre
    a = relative(student, max_s, slope_s)
    exp_a = tl.exp(a)
    if TILT & NEEDS:
        value = exp_a * (by_student + tilt * (relative(teacher, max_t, slope_t) - a))
    else:
        value = by_student * exp_a
        if DISTILS & NEEDS:
            exp_b = tl.exp(relative(teacher, max_t, slope_t))
            value = by_student * (exp_a - paired * exp_b) - by_teacher * exp_b
    if PLAIN & NEEDS:
        value += by_plain * tl.exp(student - max_s)
    if STANDARDIZED & NEEDS:
        value += affine * ((student - base) - mean)
    value += constant
    if LABELLED & NEEDS:
        value = tl.where(columns == label, at_label, value)
    return value * weight


@triton.jit
def slopes_of(numbers, NEEDS: tl.constexpr):
    """1 / T of student and teacher; TTM's option is the teacher's slope itself, and the student's is 1."""
    if OWN_SLOPES & NEEDS and not STANDARDIZED & NEEDS:
        return 1.0, numbers[0]
    else:
        slope = tl.div_rn(1.0, numbers[0])
        return slope, slope


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
    VECTOR: tl.constexpr,
):
    """One block of rows, or this program's part of it."""
    students, teachers = logits
    loss_pointer, terms_pointer, gradient_pointer = outputs
    moments_pointer, sums_pointer = partials
    count, inner_rows, parts, classes = sizes
    student_strides, teacher_strides, target_stride, weight_stride, gradient_stride = strides

    part = tl.program_id(1)
    pair = tl.program_id(2).to(tl.int64)
    first_tile, end_tile = tiles_of_part(part, parts, classes, TILE)
    index, exists = rows_of_block(block, count, ROWS)
    result = pair * count + index
    weight, read = weight_of_rows(weight_pointer, weight_stride, pair, index, exists, scale, WEIGHTED)
    student_rows = students + row_starts(index, inner_rows, student_strides, VECTOR)
    teacher_rows = teachers + row_starts(index, inner_rows, teacher_strides, VECTOR)
    partial = result * parts + part
    columns = tl.arange(0, TILE)[None, :]
    student = tl.zeros((ROWS, 1), tl.float32)
    teacher = student
    if ONE_TILE:
        student = load_logits(student_rows, columns, classes, read, "evict_first")
        if DISTILS & NEEDS:
            teacher = load_logits(teacher_rows, columns, classes, read, "evict_first")
        else:
            teacher = student

    if PHASE == MOMENTS:
        place = moments_pointer + partial * (2 * MOMENTS_WIDTH)
        moments_s = take_moments(
            student_rows, student, classes, read, first_tile, end_tile, ROWS, TILE, ONE_TILE
        )
        store_partial(place, moments_s, exists)
        moments_t = take_moments(
            teacher_rows, teacher, classes, read, first_tile, end_tile, ROWS, TILE, ONE_TILE
        )
        store_partial(place + MOMENTS_WIDTH, moments_t, exists)
    else:
        label = tl.full((ROWS, 1), -1, tl.int32)
        label_s = tl.zeros((ROWS, 1), tl.float32)
        label_t = label_s
        bad_label = False
        if LABELLED & NEEDS:
            target = tl.load(target_pointer + index * target_stride, mask=read, other=0)
            bad_label = (target < 0) | (target >= classes)
            label = tl.where(bad_label, 0, target).to(tl.int32)
            label_s = load_label_logit(student_rows, label, classes, read)
            if DISTILS & NEEDS:
                label_t = load_label_logit(teacher_rows, label, classes, read)
        slopes = slopes_of(numbers, NEEDS)
        centre = (0.0, 0.0)
        deviation = 0.0
        label_above_mean = 0.0
        if STANDARDIZED & NEEDS:
            if PHASE == WHOLE:
                moments_s = take_moments(
                    student_rows, student, classes, read, first_tile, end_tile, ROWS, TILE, ONE_TILE
                )
                moments_t = take_moments(
                    teacher_rows, teacher, classes, read, first_tile, end_tile, ROWS, TILE, ONE_TILE
                )
            else:
                moments_of_row = moments_pointer + result * parts * (2 * MOMENTS_WIDTH)
                moments_s = combine_moments(moments_of_row, parts, PARTS)
                moments_t = combine_moments(moments_of_row + MOMENTS_WIDTH, parts, PARTS)
            slope_s, deviation = slope_of_moments(moments_s, numbers[0])
            slope_t, _ = slope_of_moments(moments_t, numbers[0])
            slopes = (slope_s, slope_t)
            base = base_of_rows(student_rows, classes, read, ROWS)
            centre = (base, moments_s[0])
            label_above_mean = (label_s - base) - moments_s[0]

        if PHASE == GRADIENT:
            sums = combine_statistics(sums_pointer + result * parts * WIDTH, parts, slopes, NEEDS, PARTS)
        else:
            sums = take_statistics(
                student_rows, teacher_rows, student, teacher, label, label_s, classes, read, slopes, centre,
                first_tile, end_tile, NEEDS, ROWS, TILE, ONE_TILE,
            )  # fmt: skip

        if PHASE == STATISTICS:
            store_partial(sums_pointer + partial * WIDTH, sums, exists)
        else:
            max_s, sum_s, plain_s, max_t, sum_t, plain_t, dot, moment_s, moment_t, above_label = sums
            # Where a formula reads sums at T = 1 that were not taken, T is 1.
            if not PLAIN & NEEDS:
                plain_s = sum_s
            if not PLAIN_TEACHER & NEEDS:
                plain_t = sum_t
            sums = (max_s, sum_s, plain_s, max_t, sum_t, plain_t, dot, moment_s, moment_t, above_label)
            loss, terms, coefficients = FORMULA(
                sums, numbers, slopes, deviation, label_above_mean, (label_s, label_t), classes, NEEDS
            )
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
                by_student, by_teacher, excess, by_plain, constant, affine, tilt, at_label = coefficients
                # Where the sums are near: A e^a - B e^b = A (e^a - e^b) + (A - B) e^b, which rounds neither A
                # nor B apart.
                near = tl.abs(sum_t - sum_s) < 0.5 * sum_s
                paired = tl.where(near, 1.0, 0.0)
                by_teacher = tl.where(near, -excess, by_teacher)
                if not PLAIN & NEEDS:
                    by_student += by_plain
                    by_teacher -= paired * by_plain
                coefficients = (
                    by_student, by_teacher, paired, by_plain, constant, affine, tilt, at_label,
                )  # fmt: skip
                maxima = (max_s, max_t)
                gradient_rows = gradient_pointer + multiple(result * gradient_stride, VECTOR)
                if ONE_TILE:
                    value = gradient_tile(
                        student, teacher, columns, label, maxima, coefficients, slopes, centre,
                        weight, NEEDS,
                    )  # fmt: skip
                    store_tile(gradient_rows, columns, classes, exists, value, weight, bad_label)
                else:
                    # Last tile first: it is the one still in cache.
                    for step in range(first_tile, end_tile):
                        of_tile = (first_tile + end_tile - 1 - step) * TILE + tl.arange(0, TILE)[None, :]
                        logits_s = load_logits(student_rows, of_tile, classes, read, "evict_first")
                        logits_t = logits_s
                        if DISTILS & NEEDS:
                            logits_t = load_logits(teacher_rows, of_tile, classes, read, "evict_first")
                        value = gradient_tile(
                            logits_s, logits_t, of_tile, label, maxima, coefficients, slopes, centre,
                            weight, NEEDS,
                        )  # fmt: skip
                        store_tile(gradient_rows, of_tile, classes, exists, value, weight, bad_label)


@triton.jit(
    do_not_specialize=[
        *NOT_SPECIALIZED, "target_pointer", "terms_pointer", "moments_pointer", "sums_pointer", "blocks",
        "target_stride",
    ]
)  # fmt: skip
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
    target_stride,
    weight_stride,
    gradient_stride,
    scale,
    numbers,
    FORMULA: tl.constexpr,
    NEEDS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    DYNAMIC: tl.constexpr,
    TERMS: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    PHASE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    ONE_TILE: tl.constexpr,
    PARTS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Loss, terms and gradient of ``count`` rows of each pair: what FORMULA makes of their statistics.

    Programs: (blocks of ROWS rows, parts of a row, pairs). ``numbers`` are the loss's options; a parameter of
    that name would collide with the ``**options`` of the function that Triton's JIT generates. DYNAMIC: how
    many of them are read from ``dynamic_pointer``. NEEDS: bits of ``statistics``. PARTS: the most that
    ``parts`` may be. VECTOR: divides every stride and ``classes``.
    """
    pair = tl.program_id(2)
    logits = (of_pair(student_pointers, pair), of_pair(teacher_pointers, pair))
    outputs = (loss_pointer, terms_pointer, gradient_pointer)
    partials = (moments_pointer, sums_pointer)
    sizes = (count, inner_rows, parts, multiple(classes, VECTOR))
    student_strides = (student_outer_stride, student_inner_stride)
    teacher_strides = (teacher_outer_stride, teacher_inner_stride)
    strides = (student_strides, teacher_strides, target_stride, weight_stride, gradient_stride)
    values = numbers_of(numbers, dynamic_pointer, DYNAMIC)
    if PHASE == WHOLE and not ONE_TILE:
        # Fewer programs than rows where more rows at once would leave the cache between the two passes.
        for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
            softmax_block(
                block, logits, target_pointer, weight_pointer, outputs, partials, sizes, strides, scale,
                values, FORMULA, NEEDS, WEIGHTED, TERMS, WITH_GRADIENT,
                PHASE, ROWS, TILE, ONE_TILE, PARTS, VECTOR,
            )  # fmt: skip
    else:
        softmax_block(
            tl.program_id(0), logits, target_pointer, weight_pointer, outputs, partials, sizes, strides,
            scale, values, FORMULA, NEEDS, WEIGHTED, TERMS, WITH_GRADIENT,
            PHASE, ROWS, TILE, ONE_TILE, PARTS, VECTOR,
        )  # fmt: skip
