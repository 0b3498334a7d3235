"""The row skeleton of the softmax family: sums, a formula, the gradient.

Rows that fit into a tile are read once, several short rows per program. Longer rows take two passes; if there
are few of them, each is split over several programs, with one launch per phase.
"""

import triton
import triton.language as tl

from fastkd.ops.triton.formulas import Gradient, Row
from fastkd.ops.triton.moments import (
    MOMENTS_WIDTH,
    base_of_rows,
    load_moments,
    moments_of_both,
    moments_of_tile,
    slope_of_moments,
)
from fastkd.ops.triton.row_sums import sum_rows
from fastkd.ops.triton.row_weights import COUNTED, NO_MARKS, counts, rows_that_count
from fastkd.ops.triton.statistics import (
    DISTILLS,
    LABEL_SMOOTHING,
    LABELLED,
    LOG_RATIO,
    OWN_SLOPES,
    STANDARDIZED,
    STUDENT_AT_T1,
    TEACHER_AT_T1,
    WIDTH,
    Pair,
    Statistics,
    exponential,
    in_units,
    load_statistics,
    log_ratios,
    statistics_of,
    store_partial,
)
from fastkd.ops.triton.tiles import (
    EXCLUDED,
    NOT_SPECIALIZED,
    lane_columns,
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
    weighted,
)

# What a launch computes: whole rows, or one phase of rows that are split over programs.
WHOLE = tl.constexpr(0)
MOMENTS = tl.constexpr(1)
STATISTICS = tl.constexpr(2)
GRADIENT = tl.constexpr(3)


@triton.jit
def gradient_tile(
    student, teacher, columns, label, sums, gradient, paired, slopes, centre, NEEDS: tl.constexpr
):
    """The gradient of a tile; its main term is student (e^a - paired e^b) - teacher e^b."""
    a = student - sums.max_s
    exp_a = exponential(a, slopes.student)
    if LOG_RATIO & NEEDS:
        ratios = in_units(log_ratios(a, teacher - sums.max_t, slopes, NEEDS), slopes, NEEDS)
        value = exp_a * (gradient.log_ratio * (ratios - gradient.student))
    else:
        value = gradient.student * exp_a
        if DISTILLS & NEEDS:
            exp_b = exponential(teacher - sums.max_t, slopes.teacher)
            # Products that cancel are rounded alike, or not at all.
            difference = tl.fma(-paired, exp_b, exp_a)
            value = tl.fma(gradient.student, difference, -(gradient.teacher * exp_b))
    if STUDENT_AT_T1 & NEEDS:
        value = tl.fma(gradient.student_t1, exponential(a, 1.0), value)
    if STANDARDIZED & NEEDS:
        base, mean = centre
        value += gradient.affine * ((student - base) - mean)
    if LABEL_SMOOTHING & NEEDS:
        value += gradient.constant
    if LABELLED & NEEDS:
        value = tl.where(columns == label, gradient.label, value)
    return value


@triton.jit
def slopes_of(numbers, NEEDS: tl.constexpr):
    """1 / T of student and teacher. With OWN_SLOPES alone (TTM), the first option is the teacher's slope, the
    student's is 1."""
    if OWN_SLOPES & NEEDS and not STANDARDIZED & NEEDS:
        return Pair(1.0, numbers[0])
    else:
        slope = tl.div_rn(1.0, numbers[0])
        return Pair(slope, slope)


@triton.jit
def softmax_block(
    block,
    logits,
    target_pointer,
    weight_pointer,
    marks,
    divisor,
    outputs,
    partials,
    sizes,
    strides,
    scale,
    numbers,
    FORMULA: tl.constexpr,
    NEEDS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    MARKS: tl.constexpr,
    TERMS: tl.constexpr,
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
    if MARKS != NO_MARKS:
        counted = counts(marks, index, exists)
        weight = tl.where(counted, weight, 0.0)
        read &= counted
    rows = Pair(
        logits.student + row_starts(index, inner_rows, student_strides, VECTOR),
        logits.teacher + row_starts(index, inner_rows, teacher_strides, VECTOR),
    )
    partial = result * parts + part
    _, columns = lane_columns(ROWS, TILE, LANE, VECTOR)
    if ONE_TILE:
        student = load_logits(rows.student, columns, classes, read, "evict_first", True)
        teacher = student
        if DISTILLS & NEEDS:
            teacher = load_logits(rows.teacher, columns, classes, read, "evict_first", True)
    else:
        student = tl.zeros((ROWS, 1), tl.float32)
        teacher = student

    if MARKS == COUNTED:
        weight = tl.div_rn(weight, divisor)

    if PHASE == MOMENTS:
        pointer = moments_pointer + partial * (2 * MOMENTS_WIDTH)
        moments = moments_of_both(rows, classes, read, first_tile, end_tile, ROWS, TILE, LANE, VECTOR)
        store_partial(pointer, moments.student, exists)
        store_partial(pointer + MOMENTS_WIDTH, moments.teacher, exists)
    else:
        label = tl.full((ROWS, 1), -1, tl.int32)
        label_s = tl.zeros((ROWS, 1), tl.float32)
        label_t = label_s
        bad_label = False
        if LABELLED & NEEDS:
            target = tl.load(target_pointer + index * target_stride, mask=read, other=0)
            bad_label = (target < 0) | (target >= classes)
            label = tl.where(bad_label, 0, target).to(tl.int32)
            label_s = load_label_logit(rows.student, label, classes, read)
            if DISTILLS & NEEDS:
                label_t = load_label_logit(rows.teacher, label, classes, read)
        slopes = slopes_of(numbers, NEEDS)
        centre = (0.0, 0.0)
        deviation = 0.0
        label_above_mean = 0.0
        if STANDARDIZED & NEEDS:
            if ONE_TILE:
                moments = moments_of_tile(rows, student, teacher, columns, classes, read, ROWS)
            elif PHASE == WHOLE:
                moments = moments_of_both(rows, classes, read, first_tile, end_tile, ROWS, TILE, LANE, VECTOR)
            else:
                row_moments = moments_pointer + result * parts * (2 * MOMENTS_WIDTH)
                of_student = load_moments(row_moments, parts, PARTS)
                moments = Pair(of_student, load_moments(row_moments + MOMENTS_WIDTH, parts, PARTS))
            slope_s, deviation = slope_of_moments(moments.student, numbers[0])
            slope_t, _ = slope_of_moments(moments.teacher, numbers[0])
            slopes = Pair(slope_s, slope_t)
            base = base_of_rows(rows.student, classes, read, ROWS)
            centre = (base, moments.student.mean)
            label_above_mean = (label_s - base) - moments.student.mean

        if LABELLED & NEEDS and ONE_TILE:
            at_label = columns == label
            student = tl.where(at_label, EXCLUDED, student)
            teacher = tl.where(at_label, EXCLUDED, teacher)
        if PHASE == GRADIENT:
            sums = load_statistics(sums_pointer + result * parts * WIDTH, parts, slopes, NEEDS, PARTS)
        else:
            sums = statistics_of(
                rows, student, teacher, label, label_s, classes, read, slopes, centre,
                first_tile, end_tile, NEEDS, ROWS, TILE, ONE_TILE, LANE, VECTOR,
            )  # fmt: skip

        if PHASE == STATISTICS:
            store_partial(sums_pointer + partial * WIDTH, sums, exists)
        else:
            # Without these needs T is 1 if the formula reads the sums at T = 1.
            t1_s = sums.t1_s if STUDENT_AT_T1 & NEEDS else sums.sum_s
            t1_t = sums.t1_t if TEACHER_AT_T1 & NEEDS else sums.sum_t
            sums = Statistics(
                sums.max_s, sums.sum_s, t1_s, sums.max_t, sums.sum_t, t1_t,
                in_units(sums.dot, slopes, NEEDS), sums.moment_s, sums.moment_t, sums.above_label,
            )  # fmt: skip
            row = Row(sums, slopes, Pair(label_s, label_t), deviation, label_above_mean, classes)
            loss, terms, gradient = FORMULA(row, numbers, NEEDS)
            if part == 0:
                tl.store(loss_pointer + result, weighted(loss, weight, bad_label), mask=exists)
                if TERMS:
                    stride = tl.num_programs(2).to(tl.int64) * count
                    for term in tl.static_range(4):
                        value = weighted(terms[term], weight, bad_label)
                        tl.store(terms_pointer + term * stride + result, value, mask=exists)
            if WITH_GRADIENT:
                # If the sums are close: A e^a - B e^b = A (e^a - e^b) + (A - B) e^b, with A - B computed
                # without cancellation.
                near = tl.abs(sums.sum_t - sums.sum_s) < 0.5 * sums.sum_s
                paired = tl.where(near, 1.0, 0.0)
                student_factor = gradient.student
                teacher_factor = tl.where(near, -gradient.excess, gradient.teacher)
                if not STUDENT_AT_T1 & NEEDS:
                    student_factor += gradient.student_t1
                    teacher_factor -= paired * gradient.student_t1
                if not LOG_RATIO & NEEDS:
                    student_factor = weighted(student_factor, weight, bad_label)
                gradient = Gradient(
                    student_factor, weighted(teacher_factor, weight, bad_label), 0.0,
                    weighted(gradient.student_t1, weight, bad_label),
                    weighted(gradient.constant, weight, bad_label),
                    weighted(gradient.affine, weight, bad_label),
                    weighted(gradient.log_ratio, weight, bad_label),
                    weighted(gradient.label, weight, bad_label),
                )  # fmt: skip
                gradient_rows = gradient_pointer + multiple(result * gradient_stride, VECTOR)
                if ONE_TILE:
                    value = gradient_tile(
                        student, teacher, columns, label, sums, gradient, paired, slopes, centre, NEEDS
                    )
                    store_tile(gradient_rows, columns, classes, exists, value)
                else:
                    # Last tile first: it is still in cache.
                    for step in range(first_tile, end_tile):
                        tile_columns = (first_tile + end_tile - 1 - step) * TILE + columns
                        logits_s = load_logits(rows.student, tile_columns, classes, read, "evict_first")
                        logits_t = logits_s
                        if DISTILLS & NEEDS:
                            logits_t = load_logits(rows.teacher, tile_columns, classes, read, "evict_first")
                        value = gradient_tile(
                            logits_s, logits_t, tile_columns, label, sums, gradient, paired, slopes, centre,
                            NEEDS,
                        )  # fmt: skip
                        store_tile(gradient_rows, tile_columns, classes, exists, value)


@triton.jit(
    do_not_specialize=[
        *NOT_SPECIALIZED, "target_pointer", "marks_pointer", "terms_pointer", "moments_pointer",
        "sums_pointer", "blocks", "target_stride", "ignore_index",
    ]
)  # fmt: skip
def softmax_rows(
    student_pointers,
    teacher_pointers,
    target_pointer,
    weight_pointer,
    marks_pointer,
    loss_pointer,
    terms_pointer,
    gradient_pointer,
    moments_pointer,
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
    target_stride,
    ignore_index,
    weight_stride,
    gradient_stride,
    scale,
    numbers,
    FORMULA: tl.constexpr,
    NEEDS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    MARKS: tl.constexpr,
    DYNAMIC: tl.constexpr,
    TERMS: tl.constexpr,
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
    """Compute loss, terms and gradient of ``count`` rows per pair by FORMULA, from their statistics.

    Grid: (blocks of ROWS rows, parts of a row, pairs). ``numbers`` are the loss's options; a parameter named
    options would collide with the ``**options`` of the function that Triton's JIT generates. The first
    DYNAMIC of them are read from ``dynamic_pointer``. NEEDS: bits of ``statistics``. PARTS: an upper bound of
    ``parts``. LANE: columns of a tile per lane. VECTOR: divides every stride and ``classes``. MARKS: see
    ``row_weights``; with COUNTED weights are divided by the number of rows that count. SUMMED: sum over rows
    too, see ``row_sums``.
    """
    pair = tl.program_id(2)
    logits = Pair(of_pair(student_pointers, pair), of_pair(teacher_pointers, pair))
    outputs = (loss_pointer, terms_pointer, gradient_pointer)
    partials = (moments_pointer, sums_pointer)
    sizes = (count, inner_rows, parts, multiple(classes, VECTOR))
    student_strides = (student_outer_stride, student_inner_stride)
    teacher_strides = (teacher_outer_stride, teacher_inner_stride)
    strides = (student_strides, teacher_strides, target_stride, weight_stride, gradient_stride)
    marks = (marks_pointer, ignore_index)
    values = numbers_of(numbers, dynamic_pointer, DYNAMIC)
    divisor = 1.0
    if MARKS == COUNTED:
        divisor = rows_that_count(marks, count)
    if PHASE == WHOLE and not ONE_TILE:
        # Persistent programs: more rows in flight would not stay in L2 between the two passes.
        for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
            softmax_block(
                block, logits, target_pointer, weight_pointer, marks, divisor, outputs, partials, sizes,
                strides, scale, values, FORMULA, NEEDS, WEIGHTED, MARKS, TERMS, WITH_GRADIENT,
                PHASE, ROWS, TILE, ONE_TILE, PARTS, LANE, VECTOR,
            )  # fmt: skip
    else:
        softmax_block(
            tl.program_id(0), logits, target_pointer, weight_pointer, marks, divisor, outputs, partials,
            sizes, strides, scale, values, FORMULA, NEEDS, WEIGHTED, MARKS, TERMS, WITH_GRADIENT,
            PHASE, ROWS, TILE, ONE_TILE, PARTS, LANE, VECTOR,
        )  # fmt: skip
    if SUMMED:
        sum_rows(reduction, loss_pointer, terms_pointer, count, count, TERMS)
