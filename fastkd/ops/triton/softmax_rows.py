"""The row skeleton of the softmax family: sums, a formula, the gradient.

One program a row. A row that fits into one tile is read once and its gradient written once, with loss and
gradient in the same launch; a longer row is swept twice.
"""

import triton
import triton.language as tl

from fastkd.ops.triton.tiles import MASKED, load_logits, row_weight, store_tile

STANDARDIZE_EPSILON = tl.constexpr(1e-7)


@triton.jit
def combine_moments(mean, squares, seen, columns, logits, classes):
    """Mean and sum of squared deviations of the part seen so far and one tile more (Chan et al.)."""
    inside = columns < classes
    count = tl.sum(inside.to(tl.float32))
    tile_mean = tl.sum(tl.where(inside, logits, 0.0)) / count
    centred = tl.where(inside, logits - tile_mean, 0.0)
    step = tile_mean - mean
    total = seen + count
    squares += tl.sum(centred * centred) + step * step * (seen * count / total)
    return mean + step * (count / total), squares, total


@triton.jit
def standardizing_scale(row, classes, temperature, TILE: tl.constexpr, ONE_TILE: tl.constexpr):
    """(slope, mean, deviation) that bring a row to (z - mean) / (std + epsilon) / T."""
    mean = 0.0
    squares = 0.0
    seen = 0.0
    if ONE_TILE:
        columns = tl.arange(0, TILE)
        logits = load_logits(row, columns, classes, "evict_last")
        mean, squares, seen = combine_moments(mean, squares, seen, columns, logits, classes)
    else:
        for start in range(0, classes, TILE):
            columns = start + tl.arange(0, TILE)
            logits = load_logits(row, columns, classes, "evict_last")
            mean, squares, seen = combine_moments(mean, squares, seen, columns, logits, classes)
    deviation = tl.sqrt(squares / (classes - 1))
    return 1.0 / ((deviation + STANDARDIZE_EPSILON) * temperature), mean, deviation


@triton.jit
def update_statistics(
    before,
    student,
    teacher,
    columns,
    label,
    classes,
    student_scale,
    teacher_scale,
    DISTILS: tl.constexpr,
    PLAIN: tl.constexpr,
    PLAIN_TEACHER: tl.constexpr,
    ENTROPY: tl.constexpr,
    TILT: tl.constexpr,
    SMOOTHED: tl.constexpr,
    OWN_SLOPES: tl.constexpr,
    STANDARDIZED: tl.constexpr,
):
    """The statistics of the part seen so far and one tile more, relative to the largest logits of both.

    The label is left out of every sum but that of the logits, so that nothing cancels. csrc/row_math.h names
    the sums; PLAIN to STANDARDIZED say which of them the formula needs.
    """
    max_s, sum_s, dot_s, moment_s, plain_s, max_t, sum_t, dot_t, moment_t, entropy_t, plain_t, total = before
    slope_s, mean_s, deviation_s = student_scale
    slope_t, mean_t, deviation_t = teacher_scale
    if SMOOTHED:
        total += tl.sum(tl.where(columns < classes, student, 0.0))
    student = tl.where(columns == label, MASKED, student)
    teacher = tl.where(columns == label, MASKED, teacher)

    top_s = tl.maximum(max_s, tl.max(student))
    exp_u = tl.exp((student - top_s) * slope_s)
    factor_s = tl.exp((max_s - top_s) * slope_s)
    sum_s = factor_s * sum_s + tl.sum(exp_u)
    if PLAIN:
        plain_s = tl.exp(max_s - top_s) * plain_s + tl.sum(tl.exp(student - top_s))
    top_t = max_t
    if DISTILS:
        top_t = tl.maximum(max_t, tl.max(teacher))
        exp_v = tl.exp((teacher - top_t) * slope_t)
        shift_t = (max_t - top_t) * slope_t
        factor_t = tl.exp(shift_t)
        difference = (teacher - student) * slope_t  # exactly 0 for equal logits
        if OWN_SLOPES:
            u = (student - mean_s) * slope_s
            difference = (teacher - mean_t) * slope_t - u
            if STANDARDIZED:
                moment_s = factor_s * moment_s + tl.sum(exp_u * u)
                moment_t = factor_t * moment_t + tl.sum(exp_v * u)
        if ENTROPY:
            above = tl.sum(exp_v * ((teacher - top_t) * slope_t))
            entropy_t = factor_t * (entropy_t + shift_t * sum_t) + above
        if PLAIN_TEACHER:
            plain_t = tl.exp(max_t - top_t) * plain_t + tl.sum(tl.exp(teacher - top_t))
        sum_t = factor_t * sum_t + tl.sum(exp_v)
        if TILT:
            dot_s = factor_s * dot_s + tl.sum(exp_u * difference)
        else:
            dot_t = factor_t * dot_t + tl.sum(exp_v * difference)
    return top_s, sum_s, dot_s, moment_s, plain_s, top_t, sum_t, dot_t, moment_t, entropy_t, plain_t, total


@triton.jit
def store_gradient(
    row,
    student,
    teacher,
    columns,
    label,
    classes,
    maxima,
    coefficients,
    student_scale,
    teacher_scale,
    weight,
    bad_label,
    DISTILS: tl.constexpr,
    PLAIN: tl.constexpr,
    TILT: tl.constexpr,
    STANDARDIZED: tl.constexpr,
):
    """One tile of the gradient, in the student's dtype."""
    max_s, max_t = maxima
    by_student, by_teacher, by_plain, constant, affine, tilt, at_label = coefficients
    slope_s, mean_s, deviation_s = student_scale
    slope_t, mean_t, deviation_t = teacher_scale
    exp_u = tl.exp((student - max_s) * slope_s)
    if TILT:
        value = exp_u * (by_student + tilt * ((teacher - student) * slope_t))
    else:
        value = by_student * exp_u
        if DISTILS:
            value = value - by_teacher * tl.exp((teacher - max_t) * slope_t)
    if PLAIN:
        value += by_plain * tl.exp(student - max_s)
    if STANDARDIZED:
        value += affine * (student - mean_s)
    value = tl.where(columns == label, at_label, value + constant) * weight
    store_tile(row, columns, classes, value, weight, bad_label)


@triton.jit(do_not_specialize=["count"])
def softmax_rows(
    student_pointer,
    teacher_pointer,
    target_pointer,
    weight_pointer,
    loss_pointer,
    terms_pointer,
    gradient_pointer,
    count,
    classes,
    student_stride,
    teacher_stride,
    target_stride,
    gradient_stride,
    scale,
    slope_s,
    slope_t,
    o0,
    o1,
    o2,
    o3,
    o4,
    o5,
    o6,
    FORMULA: tl.constexpr,
    LABELLED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    TERMS: tl.constexpr,
    GRADIENT: tl.constexpr,
    DISTILS: tl.constexpr,
    CROSS_ENTROPY: tl.constexpr,
    PLAIN: tl.constexpr,
    PLAIN_TEACHER: tl.constexpr,
    ENTROPY: tl.constexpr,
    TILT: tl.constexpr,
    SMOOTHED: tl.constexpr,
    OWN_SLOPES: tl.constexpr,
    STANDARDIZED: tl.constexpr,
    TILE: tl.constexpr,
    ONE_TILE: tl.constexpr,
):
    """Loss, terms and gradient of row ``program_id(0)``, which FORMULA makes of the row's statistics.

    ``o0`` to ``o6`` are its options. DISTILS: the teacher is read. PLAIN to STANDARDIZED: update_statistics.
    """
    row = tl.program_id(0).to(tl.int64)
    student_row = student_pointer + row * student_stride
    teacher_row = teacher_pointer + row * teacher_stride
    weight = row_weight(weight_pointer, row, scale, WEIGHTED)
    label = -1
    label_logits = (0.0, 0.0)
    bad_label = False
    if LABELLED:
        label = tl.load(target_pointer + row * target_stride)
        bad_label = (label < 0) | (label >= classes)
        label = tl.where(bad_label, 0, label)
        label_s = tl.load(student_row + label).to(tl.float32)
        label_t = tl.load(teacher_row + label).to(tl.float32)
        label_logits = (
            tl.where(label_s < MASKED, MASKED, label_s),
            tl.where(label_t < MASKED, MASKED, label_t),
        )

    student_scale = (slope_s, 0.0, 0.0)
    teacher_scale = (slope_t, 0.0, 0.0)
    if STANDARDIZED:
        student_scale = standardizing_scale(student_row, classes, o0, TILE, ONE_TILE)
        teacher_scale = standardizing_scale(teacher_row, classes, o0, TILE, ONE_TILE)

    lowest = tl.full((), MASKED, tl.float32)
    sums = (lowest, 0.0, 0.0, 0.0, 0.0, lowest, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    if ONE_TILE:
        columns = tl.arange(0, TILE)
        student = load_logits(student_row, columns, classes, "evict_first")
        teacher = load_logits(teacher_row, columns, classes, "evict_first") if DISTILS else student
        sums = update_statistics(
            sums, student, teacher, columns, label, classes, student_scale, teacher_scale,
            DISTILS, PLAIN, PLAIN_TEACHER, ENTROPY, TILT, SMOOTHED, OWN_SLOPES, STANDARDIZED,
        )  # fmt: skip
    else:
        for start in range(0, classes, TILE):
            columns = start + tl.arange(0, TILE)
            student = load_logits(student_row, columns, classes, "evict_last")
            teacher = load_logits(teacher_row, columns, classes, "evict_last") if DISTILS else student
            sums = update_statistics(
                sums, student, teacher, columns, label, classes, student_scale, teacher_scale,
                DISTILS, PLAIN, PLAIN_TEACHER, ENTROPY, TILT, SMOOTHED, OWN_SLOPES, STANDARDIZED,
            )  # fmt: skip
    max_s, sum_s, dot_s, moment_s, plain_s, max_t, sum_t, dot_t, moment_t, entropy_t, plain_t, total = sums
    # Where a formula reads sums at T = 1 that were not taken, T is 1.
    if not PLAIN:
        plain_s = sum_s
    if not PLAIN_TEACHER:
        plain_t = sum_t
    sums = (
        max_s, sum_s, dot_s, moment_s, plain_s, max_t, sum_t, dot_t, moment_t, entropy_t, plain_t, total,
    )  # fmt: skip

    options = (o0, o1, o2, o3, o4, o5, o6)
    loss, terms, coefficients = FORMULA(
        sums, options, student_scale, teacher_scale, label_logits, classes,
        LABELLED, DISTILS, CROSS_ENTROPY, STANDARDIZED,
    )  # fmt: skip
    invalid = float("nan")
    tl.store(loss_pointer + row, tl.where(weight == 0.0, 0.0, tl.where(bad_label, invalid, weight * loss)))
    if TERMS:
        for term in tl.static_range(4):
            value = tl.where(weight == 0.0, 0.0, tl.where(bad_label, invalid, weight * terms[term]))
            tl.store(terms_pointer + term * count.to(tl.int64) + row, value)
    if GRADIENT:
        by_student, by_teacher, by_plain, constant, affine, tilt, at_label = coefficients
        if not PLAIN:
            by_student += by_plain
        coefficients = (by_student, by_teacher, by_plain, constant, affine, tilt, at_label)
        maxima = (max_s, max_t)
        gradient_row = gradient_pointer + row * gradient_stride
        if ONE_TILE:
            store_gradient(
                gradient_row, student, teacher, columns, label, classes, maxima, coefficients,
                student_scale, teacher_scale, weight, bad_label, DISTILS, PLAIN, TILT, STANDARDIZED,
            )  # fmt: skip
        else:
            # Last tile first: it is the one still in cache.
            tiles = tl.cdiv(classes, TILE)
            for step in range(0, tiles):
                columns = (tiles - 1 - step) * TILE + tl.arange(0, TILE)
                student = load_logits(student_row, columns, classes, "evict_first")
                teacher = load_logits(teacher_row, columns, classes, "evict_first") if DISTILS else student
                store_gradient(
                    gradient_row, student, teacher, columns, label, classes, maxima, coefficients,
                    student_scale, teacher_scale, weight, bad_label, DISTILS, PLAIN, TILT, STANDARDIZED,
                )  # fmt: skip
