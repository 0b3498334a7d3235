"""The Triton kernels: the row skeleton of the softmax family, the pointwise sweep, the scaling of a gradient.

One program a row. A row that fits into one tile is read once and its gradient written once, with loss and
gradient in the same launch; a longer row is swept twice, for its statistics and for its gradient.
"""

import triton
import triton.language as tl

from fastkd.ops.triton.formulas import softmax_family

# Below this a logit is a masked class; see MASKED in fastkd/reference.py.
MASKED = tl.constexpr(-1e30)
STANDARDIZE_EPSILON = tl.constexpr(1e-7)


@triton.jit
def load_logits(row, columns, classes, EVICT: tl.constexpr):
    """A tile of logits in float32; beyond the row's end, and below MASKED (-inf), it is a masked class."""
    logits = tl.load(row + columns, mask=columns < classes, other=float("-inf"), eviction_policy=EVICT)
    logits = logits.to(tl.float32)
    return tl.where(logits < MASKED, MASKED, logits)  # unlike a maximum, keeps a NaN


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
    SMOOTHED: tl.constexpr,
    STANDARDIZED: tl.constexpr,
):
    """The statistics of the part seen so far and one tile more, relative to the largest logits of both.

    The label is left out of every sum but that of the logits, so that nothing cancels.
    """
    max_s, sum_s, moment_s, max_t, sum_t, moment_t, dot, sum_1, logit_sum = before
    slope_s, mean_s, deviation_s = student_scale
    slope_t, mean_t, deviation_t = teacher_scale
    if SMOOTHED:
        logit_sum += tl.sum(tl.where(columns < classes, student, 0.0))
    student = tl.where(columns == label, MASKED, student)
    teacher = tl.where(columns == label, MASKED, teacher)

    top_s = tl.maximum(max_s, tl.max(student))
    exp_u = tl.exp((student - top_s) * slope_s)
    factor_s = tl.exp((max_s - top_s) * slope_s)
    sum_s = factor_s * sum_s + tl.sum(exp_u)
    if PLAIN:
        sum_1 = tl.exp(max_s - top_s) * sum_1 + tl.sum(tl.exp(student - top_s))
    top_t = max_t
    if DISTILS:
        top_t = tl.maximum(max_t, tl.max(teacher))
        exp_v = tl.exp((teacher - top_t) * slope_t)
        factor_t = tl.exp((max_t - top_t) * slope_t)
        sum_t = factor_t * sum_t + tl.sum(exp_v)
        if STANDARDIZED:
            centred_u = (student - mean_s) * slope_s
            difference = (teacher - mean_t) * slope_t - centred_u
            moment_s = factor_s * moment_s + tl.sum(exp_u * centred_u)
            moment_t = factor_t * moment_t + tl.sum(exp_v * centred_u)
        else:
            difference = (teacher - student) * slope_t  # exactly 0 for equal logits
        dot = factor_t * dot + tl.sum(exp_v * difference)
    return top_s, sum_s, moment_s, top_t, sum_t, moment_t, dot, sum_1, logit_sum


@triton.jit
def store_gradient(
    row,
    student,
    teacher,
    columns,
    label,
    classes,
    statistics,
    coefficients,
    student_scale,
    teacher_scale,
    weight,
    bad_label,
    DISTILS: tl.constexpr,
    PLAIN: tl.constexpr,
    STANDARDIZED: tl.constexpr,
):
    """One tile of the gradient, in the student's dtype."""
    max_s, sum_s, moment_s, max_t, sum_t, moment_t, dot, sum_1, logit_sum = statistics
    by_student, by_teacher, by_plain, constant, affine, at_label = coefficients
    slope_s, mean_s, deviation_s = student_scale
    slope_t, mean_t, deviation_t = teacher_scale
    value = by_student * tl.exp((student - max_s) * slope_s)
    if DISTILS:
        value = value - by_teacher * tl.exp((teacher - max_t) * slope_t)
    if PLAIN:
        value += by_plain * tl.exp(student - max_s)
    if STANDARDIZED:
        value += affine * (student - mean_s)
    value = tl.where(columns == label, at_label, value + constant) * weight
    value = tl.where(weight == 0.0, 0.0, tl.where(bad_label, float("nan"), value))
    tl.store(row + columns, value.to(row.dtype.element_ty), mask=columns < classes)


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
    temperature,
    w_ce,
    w_kd,
    w_t,
    w_n,
    smoothing,
    LABELLED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    TERMS: tl.constexpr,
    GRADIENT: tl.constexpr,
    DISTILS: tl.constexpr,
    CROSS_ENTROPY: tl.constexpr,
    PLAIN: tl.constexpr,
    SMOOTHED: tl.constexpr,
    STANDARDIZED: tl.constexpr,
    TILE: tl.constexpr,
    ONE_TILE: tl.constexpr,
):
    """Loss, terms and gradient of row ``program_id(0)``. PLAIN: cross-entropy needs exponentials of its own,
    because the distillation terms are not at T = 1."""
    row = tl.program_id(0).to(tl.int64)
    student_row = student_pointer + row * student_stride
    teacher_row = teacher_pointer + row * teacher_stride
    weight = scale
    if WEIGHTED:
        weight = scale * tl.load(weight_pointer + row)
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

    student_scale = (1.0 / temperature, 0.0, 0.0)
    teacher_scale = (1.0 / temperature, 0.0, 0.0)
    if STANDARDIZED:
        student_scale = standardizing_scale(student_row, classes, temperature, TILE, ONE_TILE)
        teacher_scale = standardizing_scale(teacher_row, classes, temperature, TILE, ONE_TILE)

    lowest = tl.full((), MASKED, tl.float32)
    statistics = (lowest, 0.0, 0.0, lowest, 0.0, 0.0, 0.0, 0.0, 0.0)
    if ONE_TILE:
        columns = tl.arange(0, TILE)
        student = load_logits(student_row, columns, classes, "evict_first")
        teacher = load_logits(teacher_row, columns, classes, "evict_first") if DISTILS else student
        statistics = update_statistics(
            statistics, student, teacher, columns, label, classes, student_scale, teacher_scale,
            DISTILS, PLAIN, SMOOTHED, STANDARDIZED,
        )  # fmt: skip
    else:
        for start in range(0, classes, TILE):
            columns = start + tl.arange(0, TILE)
            student = load_logits(student_row, columns, classes, "evict_last")
            teacher = load_logits(teacher_row, columns, classes, "evict_last") if DISTILS else student
            statistics = update_statistics(
                statistics, student, teacher, columns, label, classes, student_scale, teacher_scale,
                DISTILS, PLAIN, SMOOTHED, STANDARDIZED,
            )  # fmt: skip
    max_s, sum_s, moment_s, max_t, sum_t, moment_t, dot, sum_1, logit_sum = statistics
    if not PLAIN:
        sum_1 = sum_s
    statistics = (max_s, sum_s, moment_s, max_t, sum_t, moment_t, dot, sum_1, logit_sum)

    options = (temperature, w_ce, w_kd, w_t, w_n, smoothing)
    loss, terms, coefficients = softmax_family(
        statistics, options, student_scale, teacher_scale, label_logits, classes,
        LABELLED, DISTILS, CROSS_ENTROPY, STANDARDIZED,
    )  # fmt: skip
    invalid = float("nan")
    tl.store(loss_pointer + row, tl.where(weight == 0.0, 0.0, tl.where(bad_label, invalid, weight * loss)))
    if TERMS:
        for term in tl.static_range(4):
            value = tl.where(weight == 0.0, 0.0, tl.where(bad_label, invalid, weight * terms[term]))
            tl.store(terms_pointer + term * count.to(tl.int64) + row, value)
    if GRADIENT:
        by_student, by_teacher, by_plain, constant, affine, at_label = coefficients
        if not PLAIN:
            by_student += by_plain
        coefficients = (by_student, by_teacher, by_plain, constant, affine, at_label)
        gradient_row = gradient_pointer + row * gradient_stride
        if ONE_TILE:
            store_gradient(
                gradient_row, student, teacher, columns, label, classes, statistics, coefficients,
                student_scale, teacher_scale, weight, bad_label, DISTILS, PLAIN, STANDARDIZED,
            )  # fmt: skip
        else:
            # Last tile first: it is the one still in cache.
            tiles = tl.cdiv(classes, TILE)
            for step in range(0, tiles):
                columns = (tiles - 1 - step) * TILE + tl.arange(0, TILE)
                student = load_logits(student_row, columns, classes, "evict_first")
                teacher = load_logits(teacher_row, columns, classes, "evict_first") if DISTILS else student
                store_gradient(
                    gradient_row, student, teacher, columns, label, classes, statistics, coefficients,
                    student_scale, teacher_scale, weight, bad_label, DISTILS, PLAIN, STANDARDIZED,
                )  # fmt: skip


@triton.jit
def pointwise_rows(
    student_pointer,
    teacher_pointer,
    weight_pointer,
    loss_pointer,
    gradient_pointer,
    classes,
    student_stride,
    teacher_stride,
    gradient_stride,
    scale,
    temperature,
    slope_factor,
    FORMULA: tl.constexpr,
    WEIGHTED: tl.constexpr,
    GRADIENT: tl.constexpr,
    TILE: tl.constexpr,
):
    """T^2 sum_i f(z_s,i, z_t,i) of row ``program_id(0)``, FORMULA giving f and its slope.

    ``slope_factor`` is T^2 times the derivative of FORMULA's argument in z_s."""
    row = tl.program_id(0).to(tl.int64)
    weight = scale
    if WEIGHTED:
        weight = scale * tl.load(weight_pointer + row)
    total = 0.0
    for start in range(0, classes, TILE):
        columns = start + tl.arange(0, TILE)
        student = load_logits(student_pointer + row * student_stride, columns, classes, "evict_first")
        teacher = load_logits(teacher_pointer + row * teacher_stride, columns, classes, "evict_first")
        value, slope = FORMULA(student, teacher, 1.0 / temperature)
        total += tl.sum(value)
        if GRADIENT:
            gradient = tl.where(weight == 0.0, 0.0, weight * slope_factor * slope)
            gradient_row = gradient_pointer + row * gradient_stride
            tl.store(
                gradient_row + columns, gradient.to(gradient_row.dtype.element_ty), mask=columns < classes
            )
    tl.store(loss_pointer + row, tl.where(weight == 0.0, 0.0, weight * temperature * temperature * total))


@triton.jit
def scale_rows(
    gradient_pointer, upstream_pointer, classes, gradient_stride, upstream_stride, TILE: tl.constexpr
):
    """``gradient[row] *= upstream[row]`` in place. Decided on the device: a factor of 1 touches nothing."""
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(upstream_pointer + row * upstream_stride)
    if factor != 1.0:
        gradient_row = gradient_pointer + row * gradient_stride
        for start in range(0, classes, TILE):
            columns = start + tl.arange(0, TILE)
            inside = columns < classes
            gradient = tl.load(gradient_row + columns, mask=inside)
            scaled = gradient.to(tl.float32) * factor
            tl.store(gradient_row + columns, scaled.to(gradient.dtype), mask=inside)
