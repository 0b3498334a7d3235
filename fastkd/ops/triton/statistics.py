"""Statistics of rows of logits: taken tile by tile, written for one part of a row, combined over its parts.

They are relative to the largest logits of each model that were seen, a_i = (z_s,i - max z_s) / T_s and b_i =
(z_t,i - max z_t) / T_t, so that neither an offset between the models nor a mean far above the spread is ever
added to what the losses are made of. Every part of a row may have seen other maxima; the parts are rebased
exactly and added up in their order.
"""

import triton
import triton.language as tl

from fastkd.ops.triton.tiles import LOWEST, MASKED, load_logits

STANDARDIZE_EPSILON = tl.constexpr(1e-7)

# What a loss needs of the kernels, as bits of NEEDS; those of csrc/row_math.h and five more. Tested as
# `BIT & NEEDS`: in the interpreter NEEDS is a plain number, which cannot take a constexpr on its right.
DISTILS = tl.constexpr(1)  # the teacher is read
CROSS_ENTROPY = tl.constexpr(2)
PLAIN = tl.constexpr(4)  # the student's sum at T = 1
PLAIN_TEACHER = tl.constexpr(8)
CROSS = tl.constexpr(16)  # sum e^b (-a) in place of sum e^b (b - a)
TILT = tl.constexpr(32)  # sum e^a (b - a), and a gradient with a term e^a (b - a)
SMOOTHED = tl.constexpr(64)  # the sum of the student's logits above the label's
OWN_SLOPES = tl.constexpr(128)  # a and b of different slope
STANDARDIZED = tl.constexpr(256)  # of the rows' own slopes
LABELLED = tl.constexpr(512)  # a label stands apart from every sum
SUMS_ALONE = tl.constexpr(1024)  # nothing but the maxima and the sums

# Numbers of a row's statistics, as update_statistics returns them, and of its moments.
WIDTH = tl.constexpr(10)
MOMENTS_WIDTH = tl.constexpr(3)


@triton.jit
def relative(logits, top, slope):
    below = (logits - top) * slope
    return tl.where(below < LOWEST, LOWEST, below)  # keeps a NaN


@triton.jit
def rebased(total, shift, of, factor):
    """factor * (total + shift * of): a sum of e^x y whose x and y are taken from another maximum.

    Where the factor is 0 the shift may be so large that its product overflows."""
    return tl.where(factor == 0.0, 0.0, factor * (total + shift * of))


# ---- mean and deviation, for standardised logits: (mean, sum of squared deviations, how many) ---------


@triton.jit
def base_of_rows(rows, classes, exists, ROWS: tl.constexpr):
    """The first logit of each row. Moments are taken of what lies above it: the rounding of a mean far above
    the spread would be as large as the deviations."""
    return load_logits(rows, tl.zeros((ROWS, 1), tl.int32), classes, exists, "")


@triton.jit
def update_moments(moments, logits, base, first, columns, classes, TILE: tl.constexpr):
    """Those of the part seen so far and one tile more (Chan et al.)."""
    mean, squares, seen = moments
    inside = columns < classes
    count = tl.minimum(classes - first, TILE).to(tl.float32)
    above = tl.where(inside, logits - base, 0.0)
    tile_mean = tl.sum(above, 1, keep_dims=True) / count
    centred = tl.where(inside, above - tile_mean, 0.0)
    step = tile_mean - mean
    total = seen + count
    squares += tl.sum(centred * centred, 1, keep_dims=True) + step * step * (seen * count / total)
    return mean + step * (count / total), squares, total


@triton.jit
def take_moments(
    rows,
    logits,
    classes,
    exists,
    first_tile,
    end_tile,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    ONE_TILE: tl.constexpr,
):
    """Those of tiles ``first_tile`` to ``end_tile``, or of the row's one tile, which is ``logits``."""
    base = base_of_rows(rows, classes, exists, ROWS)
    zero = tl.zeros((ROWS, 1), tl.float32)
    moments = (zero, zero, zero)
    if ONE_TILE:
        columns = tl.arange(0, TILE)[None, :]
        moments = update_moments(moments, logits, base, 0, columns, classes, TILE)
    else:
        for tile in range(first_tile, end_tile):
            columns = tile * TILE + tl.arange(0, TILE)[None, :]
            of_tile = load_logits(rows, columns, classes, exists, "evict_last")
            moments = update_moments(moments, of_tile, base, tile * TILE, columns, classes, TILE)
    return moments


@triton.jit
def combine_moments(of_row, parts, PARTS: tl.constexpr):
    """Of the whole row, from the moments that its parts wrote."""
    part = tl.arange(0, PARTS)[None, :]
    written = part < parts
    of_part = of_row + part * (2 * MOMENTS_WIDTH)
    mean = tl.load(of_part, mask=written, other=0.0)
    squares = tl.load(of_part + 1, mask=written, other=0.0)
    seen = tl.load(of_part + 2, mask=written, other=0.0)
    total = tl.sum(seen, 1, keep_dims=True)
    whole = tl.sum(mean * seen, 1, keep_dims=True) / total
    apart = mean - whole
    return whole, tl.sum(squares + seen * apart * apart, 1, keep_dims=True), total


@triton.jit
def slope_of_moments(moments, temperature):
    """1 / ((std + epsilon) T), and std."""
    mean, squares, classes = moments
    deviation = tl.sqrt(squares / (classes - 1))
    return 1.0 / ((deviation + STANDARDIZE_EPSILON) * temperature), deviation


# ---- the sums of the softmax family ------------------------------------------------------------------


@triton.jit
def update_statistics(
    before, student, teacher, columns, label, label_logit, classes, slopes, centre, NEEDS: tl.constexpr
):
    """The statistics of the part seen so far and one tile more.

    (max z_s, sum e^a, sum e^(z_s - max z_s), max z_t, sum e^b, sum e^(z_t - max z_t), the dot product that
    NEEDS asks for, sum e^a x, sum e^b x, sum of z_s - z_s,y), x the standardised z_s / T. The label is left
    out of every sum but the last, so that nothing cancels.
    """
    max_s, sum_s, plain_s, max_t, sum_t, plain_t, dot, moment_s, moment_t, above_label = before
    slope_s, slope_t = slopes
    if SMOOTHED & NEEDS:
        above_label += tl.sum(tl.where(columns < classes, student - label_logit, 0.0), 1, keep_dims=True)
    if LABELLED & NEEDS:
        student = tl.where(columns == label, MASKED, student)
        teacher = tl.where(columns == label, MASKED, teacher)

    top_s = tl.maximum(max_s, tl.max(student, 1, keep_dims=True))
    a = relative(student, top_s, slope_s)
    exp_a = tl.exp(a)
    shift_s = relative(max_s, top_s, slope_s)
    factor_s = tl.exp(shift_s)
    if PLAIN & NEEDS:
        exp_z = tl.exp(student - top_s)
        plain_s = tl.exp(max_s - top_s) * plain_s + tl.sum(exp_z, 1, keep_dims=True)
    top_t = max_t
    if DISTILS & NEEDS:
        top_t = tl.maximum(max_t, tl.max(teacher, 1, keep_dims=True))
        b = relative(teacher, top_t, slope_t)
        exp_b = tl.exp(b)
        shift_t = relative(max_t, top_t, slope_t)
        factor_t = tl.exp(shift_t)
        if PLAIN_TEACHER & NEEDS:
            exp_z = tl.exp(teacher - top_t)
            plain_t = tl.exp(max_t - top_t) * plain_t + tl.sum(exp_z, 1, keep_dims=True)
        if TILT & NEEDS:
            new = tl.sum(exp_a * (b - a), 1, keep_dims=True)
            dot = rebased(dot, shift_t - shift_s, sum_s, factor_s) + new
        elif CROSS & NEEDS:
            dot = rebased(dot, -shift_s, sum_t, factor_t) - tl.sum(exp_b * a, 1, keep_dims=True)
        elif not SUMS_ALONE & NEEDS:
            new = tl.sum(exp_b * (b - a), 1, keep_dims=True)
            dot = rebased(dot, shift_t - shift_s, sum_t, factor_t) + new
        if STANDARDIZED & NEEDS:
            base, mean = centre
            x = relative(student - base, mean, slope_s)
            moment_s = factor_s * moment_s + tl.sum(exp_a * x, 1, keep_dims=True)
            moment_t = factor_t * moment_t + tl.sum(exp_b * x, 1, keep_dims=True)
        sum_t = factor_t * sum_t + tl.sum(exp_b, 1, keep_dims=True)
    sum_s = factor_s * sum_s + tl.sum(exp_a, 1, keep_dims=True)
    return top_s, sum_s, plain_s, top_t, sum_t, plain_t, dot, moment_s, moment_t, above_label


@triton.jit
def take_statistics(
    student_rows,
    teacher_rows,
    student,
    teacher,
    label,
    label_logit,
    classes,
    exists,
    slopes,
    centre,
    first_tile,
    end_tile,
    NEEDS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    ONE_TILE: tl.constexpr,
):
    """Those of tiles ``first_tile`` to ``end_tile``, or of the one tile, ``student`` and ``teacher``."""
    zero = tl.zeros((ROWS, 1), tl.float32)
    lowest = tl.full((ROWS, 1), MASKED, tl.float32)
    sums = (lowest, zero, zero, lowest, zero, zero, zero, zero, zero, zero)
    columns = tl.arange(0, TILE)[None, :]
    if ONE_TILE:
        sums = update_statistics(
            sums, student, teacher, columns, label, label_logit, classes, slopes, centre, NEEDS
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
                sums, logits, others, of_tile, label, label_logit, classes, slopes, centre, NEEDS
            )
    return sums


@triton.jit
def store_partial(place, values, exists):
    """What one part of a row found, for the next launch to combine."""
    for which in tl.static_range(len(values)):
        tl.store(place + which, values[which], mask=exists)


@triton.jit
def combine_statistics(of_row, parts, slopes, NEEDS: tl.constexpr, PARTS: tl.constexpr):
    """Of the whole row, from the statistics that its parts wrote."""
    slope_s, slope_t = slopes
    part = tl.arange(0, PARTS)[None, :]
    written = part < parts
    of_part = of_row + part * WIDTH
    max_s = tl.load(of_part, mask=written, other=MASKED)
    sum_s = tl.load(of_part + 1, mask=written, other=0.0)
    top_s = tl.max(max_s, 1, keep_dims=True)
    shift_s = relative(max_s, top_s, slope_s)
    factor_s = tl.exp(shift_s)
    zero = tl.zeros_like(top_s)
    plain_s = zero
    top_t = zero
    whole_t = zero
    plain_t = zero
    dot = zero
    moment_s = zero
    moment_t = zero
    above_label = zero
    if PLAIN & NEEDS:
        plain = tl.load(of_part + 2, mask=written, other=0.0)
        plain_s = tl.sum(tl.exp(max_s - top_s) * plain, 1, keep_dims=True)
    if SMOOTHED & NEEDS:
        above_label = tl.sum(tl.load(of_part + 9, mask=written, other=0.0), 1, keep_dims=True)
    if DISTILS & NEEDS:
        max_t = tl.load(of_part + 3, mask=written, other=MASKED)
        sum_t = tl.load(of_part + 4, mask=written, other=0.0)
        top_t = tl.max(max_t, 1, keep_dims=True)
        shift_t = relative(max_t, top_t, slope_t)
        factor_t = tl.exp(shift_t)
        whole_t = tl.sum(factor_t * sum_t, 1, keep_dims=True)
        if PLAIN_TEACHER & NEEDS:
            plain = tl.load(of_part + 5, mask=written, other=0.0)
            plain_t = tl.sum(tl.exp(max_t - top_t) * plain, 1, keep_dims=True)
        if not SUMS_ALONE & NEEDS:
            of_parts = tl.load(of_part + 6, mask=written, other=0.0)
            if TILT & NEEDS:
                of_parts = rebased(of_parts, shift_t - shift_s, sum_s, factor_s)
            elif CROSS & NEEDS:
                of_parts = rebased(of_parts, -shift_s, sum_t, factor_t)
            else:
                of_parts = rebased(of_parts, shift_t - shift_s, sum_t, factor_t)
            dot = tl.sum(of_parts, 1, keep_dims=True)
        if STANDARDIZED & NEEDS:
            of_parts = tl.load(of_part + 7, mask=written, other=0.0)
            moment_s = tl.sum(factor_s * of_parts, 1, keep_dims=True)
            of_parts = tl.load(of_part + 8, mask=written, other=0.0)
            moment_t = tl.sum(factor_t * of_parts, 1, keep_dims=True)
    whole_s = tl.sum(factor_s * sum_s, 1, keep_dims=True)
    return top_s, whole_s, plain_s, top_t, whole_t, plain_t, dot, moment_s, moment_t, above_label
