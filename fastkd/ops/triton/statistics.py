"""Statistics of rows of logits: taken tile by tile, written for one part of a row, combined over its parts.

They are relative to the largest logits of each model that were seen, a_i = (z_s,i - max z_s) / T_s and b_i =
(z_t,i - max z_t) / T_t, so that neither an offset between the models nor a mean far above the spread is ever
added to what the losses are made of. Every part of a row may have seen other maxima; the parts are rebased
exactly and added up in their order.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastkd.ops.spec import Needs
from fastkd.ops.triton.tiles import LOWEST, MASKED, load_logits

STANDARDIZE_EPSILON = tl.constexpr(1e-7)

# Bits of NEEDS. Tested as `BIT & NEEDS`: in the interpreter NEEDS is a plain number, which cannot take a
# constexpr on its right.
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
    """Of student and teacher."""

    student: Any
    teacher: Any


class Moments(NamedTuple):
    """Of logits above a base: their mean, the sum of their squared deviations from it, their number."""

    mean: Any
    squares: Any
    count: Any


class Statistics(NamedTuple):
    """Of one row, or a part of it; x is the standardised z_s / T. Without the label, but for the last."""

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


# Numbers that a part of a row hands on.
WIDTH = tl.constexpr(len(Statistics._fields))
MOMENTS_WIDTH = tl.constexpr(len(Moments._fields))


@triton.jit
def relative(logits, top, slope):
    below = (logits - top) * slope
    return tl.where(below < LOWEST, LOWEST, below)  # keeps a NaN


@triton.jit
def rebased(total, shift, of, factor):
    """factor * (total + shift * of): a sum of e^x y whose x and y are taken from another maximum.

    Where the factor is 0 the shift may be so large that its product overflows."""
    return tl.where(factor == 0.0, 0.0, factor * (total + shift * of))


# ---- mean and deviation, for standardised logits --------------------------------------------------------


@triton.jit
def base_of_rows(rows, classes, exists, ROWS: tl.constexpr):
    """The first logit of each row. Moments are taken of what lies above it: the rounding of a mean far above
    the spread would be as large as the deviations."""
    return load_logits(rows, tl.zeros((ROWS, 1), tl.int32), classes, exists, "")


@triton.jit
def update_moments(moments, logits, base, first, columns, classes, TILE: tl.constexpr):
    """Those of the part seen so far and one tile more (Chan et al.)."""
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
    moments = Moments(zero, zero, zero)
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
    count = tl.load(of_part + 2, mask=written, other=0.0)
    total = tl.sum(count, 1, keep_dims=True)
    whole = tl.sum(mean * count, 1, keep_dims=True) / total
    apart = mean - whole
    return Moments(whole, tl.sum(squares + count * apart * apart, 1, keep_dims=True), total)


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
    """The statistics of the part seen so far and one tile more. The label is left out of every sum but the
    last, so that nothing cancels; ``centre`` is the base and mean of the student's logits."""
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
def take_statistics(
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
    """Those of tiles ``first_tile`` to ``end_tile`` of ``rows``, or of the one tile, ``student`` and
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
            of_tile = tile * TILE + columns
            logits = load_logits(rows.student, of_tile, classes, exists, "evict_last")
            others = (
                load_logits(rows.teacher, of_tile, classes, exists, "evict_last")
                if DISTILLS & NEEDS
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
    """Of the whole row, from the statistics that its parts wrote, in the order of their fields."""
    part = tl.arange(0, PARTS)[None, :]
    written = part < parts
    of_part = of_row + part * WIDTH
    part_max_s = tl.load(of_part, mask=written, other=MASKED)
    part_sum_s = tl.load(of_part + 1, mask=written, other=0.0)
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
        of_parts = tl.load(of_part + 2, mask=written, other=0.0)
        t1_s = tl.sum(tl.exp(part_max_s - max_s) * of_parts, 1, keep_dims=True)
    if LABEL_SMOOTHING & NEEDS:
        above_label = tl.sum(tl.load(of_part + 9, mask=written, other=0.0), 1, keep_dims=True)
    if DISTILLS & NEEDS:
        part_max_t = tl.load(of_part + 3, mask=written, other=MASKED)
        part_sum_t = tl.load(of_part + 4, mask=written, other=0.0)
        max_t = tl.max(part_max_t, 1, keep_dims=True)
        shift_t = relative(part_max_t, max_t, slopes.teacher)
        factor_t = tl.exp(shift_t)
        sum_t = tl.sum(factor_t * part_sum_t, 1, keep_dims=True)
        if TEACHER_AT_T1 & NEEDS:
            of_parts = tl.load(of_part + 5, mask=written, other=0.0)
            t1_t = tl.sum(tl.exp(part_max_t - max_t) * of_parts, 1, keep_dims=True)
        if not SUMS_ONLY & NEEDS:
            of_parts = tl.load(of_part + 6, mask=written, other=0.0)
            if LOG_RATIO & NEEDS:
                of_parts = rebased(of_parts, shift_t - shift_s, part_sum_s, factor_s)
            elif CROSS_TERM & NEEDS:
                of_parts = rebased(of_parts, -shift_s, part_sum_t, factor_t)
            else:
                of_parts = rebased(of_parts, shift_t - shift_s, part_sum_t, factor_t)
            dot = tl.sum(of_parts, 1, keep_dims=True)
        if STANDARDIZED & NEEDS:
            of_parts = tl.load(of_part + 7, mask=written, other=0.0)
            moment_s = tl.sum(factor_s * of_parts, 1, keep_dims=True)
            of_parts = tl.load(of_part + 8, mask=written, other=0.0)
            moment_t = tl.sum(factor_t * of_parts, 1, keep_dims=True)
    sum_s = tl.sum(factor_s * part_sum_s, 1, keep_dims=True)
    return Statistics(max_s, sum_s, t1_s, max_t, sum_t, t1_t, dot, moment_s, moment_t, above_label)
