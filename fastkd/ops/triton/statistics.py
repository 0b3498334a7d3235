"""Statistics of rows of logits: accumulated tile by tile, and combined over the parts of a row.

They are relative to the running maximum of each model, a_i = (z_s,i - max z_s) / T_s and b_i = (z_t,i - max
z_t) / T_t, so that neither an offset between the models nor a mean far above the spread enters the sums that
make up the losses. The parts of a row may have different maxima: they are rebased and added in order.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastkd.ops.spec import Needs
from fastkd.ops.triton.tiles import LOWEST, MASKED, load_logits

STANDARDIZE_EPSILON = tl.constexpr(1e-7)

# Bits of NEEDS. Tested as `BIT & NEEDS`, not `NEEDS & BIT`: in the interpreter NEEDS is an int, which does
# not support a constexpr as right operand.
DISTILLS = tl.constexpr(Needs.DISTILLS.value)
CROSS_ENTROPY = tl.constexpr(Needs.CROSS_ENTROPY.value)
STUDENT_AT_T1 = tl.constexpr(Needs.STUDENT_AT_T1.value)
TEACHER_AT_T1 = tl.constexpr(Needs.TEACHER_AT_T1.value)
CROSS_TERM = tl.constexpr(Needs.CROSS_TERM.value)
LOG_RATIO = tl.constexpr(Needs.LOG_RATIO.value)
OWN_SLOPES = tl.constexpr(Needs.OWN_SLOPES.value)
STANDARDIZED = tl.constexpr(Needs.STANDARDIZED.value)
LABEL_SMOOTHING = tl.constexpr(Needs.LABEL_SMOOTHING.value)
SUMS_ONLY = tl.constexpr(Needs.SUMS_ONLY.value)
LABELLED = tl.constexpr(Needs.LABELLED.value)


class Pair(NamedTuple):
    """Values of student and teacher."""

    student: Any
    teacher: Any


class Moments(NamedTuple):
    """Mean, sum of squared deviations and count of logits relative to a base."""

    mean: Any
    squares: Any
    count: Any


class Statistics(NamedTuple):
    """Sums over a row or a part of it; x is the standardised z_s / T. All but the last exclude the label."""

    max_s: Any
    sum_s: Any  # of e^a
    t1_s: Any  # of e^(z_s - max z_s)
    max_t: Any
    sum_t: Any  # of e^b
    t1_t: Any  # of e^(z_t - max z_t)
    dot: Any  # of e^b (b - a), with LOG_RATIO e^a (b - a), with CROSS_TERM e^b (-a)
    moment_s: Any  # of e^a x
    moment_t: Any  # of e^b x
    above_label: Any  # of z_s - z_s,y


# Size of the partial results of a part of a row.
WIDTH = tl.constexpr(len(Statistics._fields))
MOMENTS_WIDTH = tl.constexpr(len(Moments._fields))


@triton.jit
def relative(logits, top, slope):
    below = (logits - top) * slope
    return tl.where(below < LOWEST, LOWEST, below)  # unlike a maximum, propagates NaN


@triton.jit
def rebased(total, shift, of, factor):
    """factor * (total + shift * of): rebases a sum of e^x y to a new maximum.

    If the factor is 0, shift * of may overflow."""
    return tl.where(factor == 0.0, 0.0, factor * (total + shift * of))


# ---- mean and deviation, for standardised logits --------------------------------------------------------


@triton.jit
def base_of_rows(rows, classes, exists, ROWS: tl.constexpr):
    """The first logit of each row. Moments are relative to it: for a mean far above the spread, the rounding
    of the mean would be as large as the deviations."""
    return load_logits(rows, tl.zeros((ROWS, 1), tl.int32), classes, exists, "")


@triton.jit
def update_moments(moments, logits, base, first, columns, classes, TILE: tl.constexpr):
    """Add a tile (Chan et al.)."""
    inside = columns < classes
    count = tl.minimum(classes - first, TILE).to(tl.float32)
    above = tl.where(inside, logits - base, 0.0)
    tile_mean = tl.sum(above, 1, keep_dims=True) / count
    centred = tl.where(inside, above - tile_mean, 0.0)
    step = tile_mean - moments.mean
    total = moments.count + count
    squares = tl.sum(centred * centred, 1, keep_dims=True) + step * step * (moments.count * count / total)
    return Moments(moments.mean + step * (count / total), moments.squares + squares, total)


@triton.jit
def compute_moments(
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
    """Moments of tiles ``first_tile`` to ``end_tile``, or of the row's only tile, ``logits``."""
    base = base_of_rows(rows, classes, exists, ROWS)
    zero = tl.zeros((ROWS, 1), tl.float32)
    moments = Moments(zero, zero, zero)
    if ONE_TILE:
        columns = tl.arange(0, TILE)[None, :]
        moments = update_moments(moments, logits, base, 0, columns, classes, TILE)
    else:
        for tile in range(first_tile, end_tile):
            columns = tile * TILE + tl.arange(0, TILE)[None, :]
            tile_logits = load_logits(rows, columns, classes, exists, "evict_last")
            moments = update_moments(moments, tile_logits, base, tile * TILE, columns, classes, TILE)
    return moments


@triton.jit
def combine_moments(row_pointer, parts, PARTS: tl.constexpr):
    """Moments of the whole row, from those of its parts."""
    part = tl.arange(0, PARTS)[None, :]
    written = part < parts
    part_pointer = row_pointer + part * (2 * MOMENTS_WIDTH)
    mean = tl.load(part_pointer, mask=written, other=0.0)
    squares = tl.load(part_pointer + 1, mask=written, other=0.0)
    count = tl.load(part_pointer + 2, mask=written, other=0.0)
    total = tl.sum(count, 1, keep_dims=True)
    whole = tl.sum(mean * count, 1, keep_dims=True) / total
    deviation = mean - whole
    return Moments(whole, tl.sum(squares + count * deviation * deviation, 1, keep_dims=True), total)


@triton.jit
def slope_of_moments(moments, temperature):
    """1 / ((std + epsilon) T), and std."""
    deviation = tl.sqrt(moments.squares / (moments.count - 1))
    return 1.0 / ((deviation + STANDARDIZE_EPSILON) * temperature), deviation


# ---- the sums of the softmax family ------------------------------------------------------------------


@triton.jit
def update_statistics(
    before, student, teacher, columns, label, label_logit, classes, slopes, centre, NEEDS: tl.constexpr
):
    """Add a tile. The label is excluded from all sums but the last, which avoids cancellation; ``centre`` is
    the base and mean of the student's logits."""
    sum_s = before.sum_s
    t1_s = before.t1_s
    max_t = before.max_t
    sum_t = before.sum_t
    t1_t = before.t1_t
    dot = before.dot
    moment_s = before.moment_s
    moment_t = before.moment_t
    above_label = before.above_label
    if LABEL_SMOOTHING & NEEDS:
        above_label += tl.sum(tl.where(columns < classes, student - label_logit, 0.0), 1, keep_dims=True)
    if LABELLED & NEEDS:
        student = tl.where(columns == label, MASKED, student)
        teacher = tl.where(columns == label, MASKED, teacher)

    max_s = tl.maximum(before.max_s, tl.max(student, 1, keep_dims=True))
    a = relative(student, max_s, slopes.student)
    exp_a = tl.exp(a)
    shift_s = relative(before.max_s, max_s, slopes.student)
    factor_s = tl.exp(shift_s)
    if STUDENT_AT_T1 & NEEDS:
        exp_z = tl.exp(student - max_s)
        t1_s = tl.exp(before.max_s - max_s) * t1_s + tl.sum(exp_z, 1, keep_dims=True)
    if DISTILLS & NEEDS:
        max_t = tl.maximum(before.max_t, tl.max(teacher, 1, keep_dims=True))
        b = relative(teacher, max_t, slopes.teacher)
        exp_b = tl.exp(b)
        shift_t = relative(before.max_t, max_t, slopes.teacher)
        factor_t = tl.exp(shift_t)
        if TEACHER_AT_T1 & NEEDS:
            exp_z = tl.exp(teacher - max_t)
            t1_t = tl.exp(before.max_t - max_t) * t1_t + tl.sum(exp_z, 1, keep_dims=True)
        if LOG_RATIO & NEEDS:
            new = tl.sum(exp_a * (b - a), 1, keep_dims=True)
            dot = rebased(dot, shift_t - shift_s, sum_s, factor_s) + new
        elif CROSS_TERM & NEEDS:
            dot = rebased(dot, -shift_s, sum_t, factor_t) - tl.sum(exp_b * a, 1, keep_dims=True)
        elif not SUMS_ONLY & NEEDS:
            new = tl.sum(exp_b * (b - a), 1, keep_dims=True)
            dot = rebased(dot, shift_t - shift_s, sum_t, factor_t) + new
        if STANDARDIZED & NEEDS:
            base, mean = centre
            x = relative(student - base, mean, slopes.student)
            moment_s = factor_s * moment_s + tl.sum(exp_a * x, 1, keep_dims=True)
            moment_t = factor_t * moment_t + tl.sum(exp_b * x, 1, keep_dims=True)
        sum_t = factor_t * sum_t + tl.sum(exp_b, 1, keep_dims=True)
    sum_s = factor_s * sum_s + tl.sum(exp_a, 1, keep_dims=True)
    return Statistics(max_s, sum_s, t1_s, max_t, sum_t, t1_t, dot, moment_s, moment_t, above_label)


@triton.jit
def compute_statistics(
    rows,
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
    """Statistics of tiles ``first_tile`` to ``end_tile`` of ``rows``, or of the only tile, ``student`` and
    ``teacher``."""
    zero = tl.zeros((ROWS, 1), tl.float32)
    lowest = tl.full((ROWS, 1), MASKED, tl.float32)
    sums = Statistics(lowest, zero, zero, lowest, zero, zero, zero, zero, zero, zero)
    columns = tl.arange(0, TILE)[None, :]
    if ONE_TILE:
        sums = update_statistics(
            sums, student, teacher, columns, label, label_logit, classes, slopes, centre, NEEDS
        )
    else:
        for tile in range(first_tile, end_tile):
            tile_columns = tile * TILE + columns
            logits = load_logits(rows.student, tile_columns, classes, exists, "evict_last")
            others = (
                load_logits(rows.teacher, tile_columns, classes, exists, "evict_last")
                if DISTILLS & NEEDS
                else logits
            )
            sums = update_statistics(
                sums, logits, others, tile_columns, label, label_logit, classes, slopes, centre, NEEDS
            )
    return sums


@triton.jit
def store_partial(pointer, values, exists):
    """Store the partial results of a part of a row, for the next launch."""
    for field in tl.static_range(len(values)):
        tl.store(pointer + field, values[field], mask=exists)


@triton.jit
def combine_statistics(row_pointer, parts, slopes, NEEDS: tl.constexpr, PARTS: tl.constexpr):
    """Statistics of the whole row, from those of its parts; offsets are the order of the fields."""
    part = tl.arange(0, PARTS)[None, :]
    written = part < parts
    part_pointer = row_pointer + part * WIDTH
    part_max_s = tl.load(part_pointer, mask=written, other=MASKED)
    part_sum_s = tl.load(part_pointer + 1, mask=written, other=0.0)
    max_s = tl.max(part_max_s, 1, keep_dims=True)
    shift_s = relative(part_max_s, max_s, slopes.student)
    factor_s = tl.exp(shift_s)
    zero = tl.zeros_like(max_s)
    t1_s = zero
    max_t = zero
    sum_t = zero
    t1_t = zero
    dot = zero
    moment_s = zero
    moment_t = zero
    above_label = zero
    if STUDENT_AT_T1 & NEEDS:
        part_values = tl.load(part_pointer + 2, mask=written, other=0.0)
        t1_s = tl.sum(tl.exp(part_max_s - max_s) * part_values, 1, keep_dims=True)
    if LABEL_SMOOTHING & NEEDS:
        above_label = tl.sum(tl.load(part_pointer + 9, mask=written, other=0.0), 1, keep_dims=True)
    if DISTILLS & NEEDS:
        part_max_t = tl.load(part_pointer + 3, mask=written, other=MASKED)
        part_sum_t = tl.load(part_pointer + 4, mask=written, other=0.0)
        max_t = tl.max(part_max_t, 1, keep_dims=True)
        shift_t = relative(part_max_t, max_t, slopes.teacher)
        factor_t = tl.exp(shift_t)
        sum_t = tl.sum(factor_t * part_sum_t, 1, keep_dims=True)
        if TEACHER_AT_T1 & NEEDS:
            part_values = tl.load(part_pointer + 5, mask=written, other=0.0)
            t1_t = tl.sum(tl.exp(part_max_t - max_t) * part_values, 1, keep_dims=True)
        if not SUMS_ONLY & NEEDS:
            part_values = tl.load(part_pointer + 6, mask=written, other=0.0)
            if LOG_RATIO & NEEDS:
                part_values = rebased(part_values, shift_t - shift_s, part_sum_s, factor_s)
            elif CROSS_TERM & NEEDS:
                part_values = rebased(part_values, -shift_s, part_sum_t, factor_t)
            else:
                part_values = rebased(part_values, shift_t - shift_s, part_sum_t, factor_t)
            dot = tl.sum(part_values, 1, keep_dims=True)
        if STANDARDIZED & NEEDS:
            part_values = tl.load(part_pointer + 7, mask=written, other=0.0)
            moment_s = tl.sum(factor_s * part_values, 1, keep_dims=True)
            part_values = tl.load(part_pointer + 8, mask=written, other=0.0)
            moment_t = tl.sum(factor_t * part_values, 1, keep_dims=True)
    sum_s = tl.sum(factor_s * part_sum_s, 1, keep_dims=True)
    return Statistics(max_s, sum_s, t1_s, max_t, sum_t, t1_t, dot, moment_s, moment_t, above_label)
