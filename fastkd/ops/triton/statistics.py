"""Statistics of rows of logits: swept tile by tile, written for one part of a row, combined over its parts.

``csrc/row_math.h`` names the sums. They are relative to the largest logits seen; every part of a row may see
others, and the parts are added up in their order.
"""

import triton
import triton.language as tl

from fastkd.ops.triton.tiles import MASKED, load_logits

STANDARDIZE_EPSILON = tl.constexpr(1e-7)

# What a loss needs of the kernels, as bits of NEEDS; those of csrc/row_math.h and four more. Tested as
# `BIT & NEEDS`: in the interpreter NEEDS is a plain number, which cannot take a constexpr on its right.
DISTILS = tl.constexpr(1)  # the teacher is read
CROSS_ENTROPY = tl.constexpr(2)
PLAIN = tl.constexpr(4)  # the student's sum at T = 1
PLAIN_TEACHER = tl.constexpr(8)
ENTROPY = tl.constexpr(16)  # the teacher's sum of exp(v - max v) (v - max v)
TILT = tl.constexpr(32)  # gradient with a term exp(u) (v - u), and the sum of it
SMOOTHED = tl.constexpr(64)  # the sum of the student's logits
OWN_SLOPES = tl.constexpr(128)  # u and v of different slope
STANDARDIZED = tl.constexpr(256)  # and of different mean
LABELLED = tl.constexpr(512)  # a label stands apart from every sum


# ---- mean and deviation, for standardised logits: (mean, sum of squared deviations, how many) ---------


@triton.jit
def update_moments(moments, columns, logits, classes):
    """Those of the part seen so far and one tile more (Chan et al.)."""
    mean, squares, seen = moments
    inside = columns < classes
    count = tl.sum(inside.to(tl.float32), 1, keep_dims=True)
    tile_mean = tl.sum(tl.where(inside, logits, 0.0), 1, keep_dims=True) / count
    centred = tl.where(inside, logits - tile_mean, 0.0)
    step = tile_mean - mean
    total = seen + count
    squares += tl.sum(centred * centred, 1, keep_dims=True) + step * step * (seen * count / total)
    return mean + step * (count / total), squares, total


@triton.jit
def sweep_moments(
    rows,
    classes,
    exists,
    first_tile,
    end_tile,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    ONE_TILE: tl.constexpr,
):
    zero = tl.zeros((ROWS, 1), tl.float32)
    moments = (zero, zero, zero)
    if ONE_TILE:
        columns = tl.arange(0, TILE)[None, :]
        moments = update_moments(
            moments, columns, load_logits(rows, columns, classes, exists, "evict_last"), classes
        )
    else:
        for tile in range(first_tile, end_tile):
            columns = tile * TILE + tl.arange(0, TILE)[None, :]
            logits = load_logits(rows, columns, classes, exists, "evict_last")
            moments = update_moments(moments, columns, logits, classes)
    return moments


@triton.jit
def combine_moments(of_row, parts, PARTS: tl.constexpr):
    """Of the whole row, from the moments that its parts wrote."""
    part = tl.arange(0, PARTS)[None, :]
    written = part < parts
    mean = tl.load(of_row + part * 6, mask=written, other=0.0)
    squares = tl.load(of_row + part * 6 + 1, mask=written, other=0.0)
    seen = tl.load(of_row + part * 6 + 2, mask=written, other=0.0)
    total = tl.sum(seen, 1, keep_dims=True)
    whole = tl.sum(mean * seen, 1, keep_dims=True) / total
    apart = mean - whole
    return whole, tl.sum(squares + seen * apart * apart, 1, keep_dims=True), total


@triton.jit
def scale_of_moments(moments, temperature):
    """(slope, mean, deviation) that bring a row to (z - mean) / (std + epsilon) / T."""
    mean, squares, classes = moments
    deviation = tl.sqrt(squares / (classes - 1))
    return 1.0 / ((deviation + STANDARDIZE_EPSILON) * temperature), mean, deviation


# ---- the sums of the softmax family ------------------------------------------------------------------


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
    NEEDS: tl.constexpr,
):
    """The statistics of the part seen so far and one tile more, relative to the largest logits of both.

    The label is left out of every sum but that of the logits, so that nothing cancels.
    """
    max_s, sum_s, dot_s, moment_s, plain_s, max_t, sum_t, dot_t, moment_t, entropy_t, plain_t, total = before
    slope_s, mean_s, deviation_s = student_scale
    slope_t, mean_t, deviation_t = teacher_scale
    if SMOOTHED & NEEDS:
        total += tl.sum(tl.where(columns < classes, student, 0.0), 1, keep_dims=True)
    student = tl.where(columns == label, MASKED, student)
    teacher = tl.where(columns == label, MASKED, teacher)

    top_s = tl.maximum(max_s, tl.max(student, 1, keep_dims=True))
    exp_u = tl.exp((student - top_s) * slope_s)
    factor_s = tl.exp((max_s - top_s) * slope_s)
    sum_s = factor_s * sum_s + tl.sum(exp_u, 1, keep_dims=True)
    if PLAIN & NEEDS:
        exp_z = tl.exp(student - top_s)
        plain_s = tl.exp(max_s - top_s) * plain_s + tl.sum(exp_z, 1, keep_dims=True)
    top_t = max_t
    if DISTILS & NEEDS:
        top_t = tl.maximum(max_t, tl.max(teacher, 1, keep_dims=True))
        exp_v = tl.exp((teacher - top_t) * slope_t)
        shift_t = (max_t - top_t) * slope_t
        factor_t = tl.exp(shift_t)
        difference = (teacher - student) * slope_t  # exactly 0 for equal logits
        if OWN_SLOPES & NEEDS:
            u = (student - mean_s) * slope_s
            difference = (teacher - mean_t) * slope_t - u
            if STANDARDIZED & NEEDS:
                moment_s = factor_s * moment_s + tl.sum(exp_u * u, 1, keep_dims=True)
                moment_t = factor_t * moment_t + tl.sum(exp_v * u, 1, keep_dims=True)
        if ENTROPY & NEEDS:
            above = tl.sum(exp_v * ((teacher - top_t) * slope_t), 1, keep_dims=True)
            entropy_t = factor_t * (entropy_t + shift_t * sum_t) + above
        if PLAIN_TEACHER & NEEDS:
            exp_plain = tl.exp(teacher - top_t)
            plain_t = tl.exp(max_t - top_t) * plain_t + tl.sum(exp_plain, 1, keep_dims=True)
        sum_t = factor_t * sum_t + tl.sum(exp_v, 1, keep_dims=True)
        if TILT & NEEDS:
            dot_s = factor_s * dot_s + tl.sum(exp_u * difference, 1, keep_dims=True)
        else:
            dot_t = factor_t * dot_t + tl.sum(exp_v * difference, 1, keep_dims=True)
    return top_s, sum_s, dot_s, moment_s, plain_s, top_t, sum_t, dot_t, moment_t, entropy_t, plain_t, total


@triton.jit
def sweep_statistics(
    student_rows,
    teacher_rows,
    label,
    classes,
    exists,
    student_scale,
    teacher_scale,
    first_tile,
    end_tile,
    NEEDS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    ONE_TILE: tl.constexpr,
):
    """The statistics of tiles ``first_tile`` to ``end_tile``; and, for rows of one tile, that tile."""
    zero = tl.zeros((ROWS, 1), tl.float32)
    lowest = tl.full((ROWS, 1), MASKED, tl.float32)
    sums = (lowest, zero, zero, zero, zero, lowest, zero, zero, zero, zero, zero, zero)
    columns = tl.arange(0, TILE)[None, :]
    student = zero
    teacher = zero
    if ONE_TILE:
        student = load_logits(student_rows, columns, classes, exists, "evict_first")
        teacher = (
            load_logits(teacher_rows, columns, classes, exists, "evict_first") if DISTILS & NEEDS else student
        )
        sums = update_statistics(
            sums, student, teacher, columns, label, classes, student_scale, teacher_scale, NEEDS
        )
    else:
        for tile in range(first_tile, end_tile):
            of_tile = tile * TILE + columns
            logits = load_logits(student_rows, of_tile, classes, exists, "evict_last")
            others = (
                load_logits(teacher_rows, of_tile, classes, exists, "evict_last")
                if DISTILS & NEEDS
                else logits
            )
            sums = update_statistics(
                sums, logits, others, of_tile, label, classes, student_scale, teacher_scale, NEEDS
            )
    return sums, student, teacher, columns


@triton.jit
def store_partial(place, values, exists):
    """What one part of a row found, for the next launch to combine."""
    for which in tl.static_range(len(values)):
        tl.store(place + which, values[which], mask=exists)


@triton.jit
def partial_sum(of_row, which, part, parts):
    return tl.load(of_row + part * 12 + which, mask=part < parts, other=0.0)


@triton.jit
def combine_statistics(of_row, parts, student_scale, teacher_scale, PARTS: tl.constexpr):
    """Of the whole row, from the sums that its parts wrote."""
    slope_s, mean_s, deviation_s = student_scale
    slope_t, mean_t, deviation_t = teacher_scale
    part = tl.arange(0, PARTS)[None, :]
    written = part < parts
    max_s = tl.load(of_row + part * 12, mask=written, other=MASKED)
    max_t = tl.load(of_row + part * 12 + 5, mask=written, other=MASKED)
    top_s = tl.max(max_s, 1, keep_dims=True)
    top_t = tl.max(max_t, 1, keep_dims=True)
    factor_s = tl.exp((max_s - top_s) * slope_s)
    plain_factor_s = tl.exp(max_s - top_s)
    shift_t = (max_t - top_t) * slope_t
    factor_t = tl.exp(shift_t)
    plain_factor_t = tl.exp(max_t - top_t)
    sum_t = partial_sum(of_row, 6, part, parts)
    shifted = tl.where(factor_t == 0.0, 0.0, shift_t * sum_t)  # the shift may be infinite
    return (
        top_s,
        tl.sum(factor_s * partial_sum(of_row, 1, part, parts), 1, keep_dims=True),
        tl.sum(factor_s * partial_sum(of_row, 2, part, parts), 1, keep_dims=True),
        tl.sum(factor_s * partial_sum(of_row, 3, part, parts), 1, keep_dims=True),
        tl.sum(plain_factor_s * partial_sum(of_row, 4, part, parts), 1, keep_dims=True),
        top_t,
        tl.sum(factor_t * sum_t, 1, keep_dims=True),
        tl.sum(factor_t * partial_sum(of_row, 7, part, parts), 1, keep_dims=True),
        tl.sum(factor_t * partial_sum(of_row, 8, part, parts), 1, keep_dims=True),
        tl.sum(factor_t * (partial_sum(of_row, 9, part, parts) + shifted), 1, keep_dims=True),
        tl.sum(plain_factor_t * partial_sum(of_row, 10, part, parts), 1, keep_dims=True),
        tl.sum(partial_sum(of_row, 11, part, parts), 1, keep_dims=True),
    )
