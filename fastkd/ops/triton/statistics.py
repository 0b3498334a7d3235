"""Statistics of rows of logits: accumulated tile by tile, and combined over the lanes and parts of a row.

They are relative to the running maximum of each model, a_i = z_s,i - max z_s and b_i = z_t,i - max z_t, so
that neither an offset between the models nor a mean far above the spread enters the sums that make up the
losses. The parts of a row may have different maxima: they are rebased and added.

A long row has one set of statistics per lane, a thread or half of one (``tiles.lane_columns``): nothing is
exchanged between threads until the row ends.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastkd.ops.spec import Needs
from fastkd.ops.triton.tiles import (
    EXCLUDED,
    LOWEST,
    MASKED,
    lane_columns,
    load_logits,
    reduced_pair,
    sums_of_four,
)

LOG2E = tl.constexpr(1.4426950408889634)

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


class Statistics(NamedTuple):
    """Sums over a row, or a lane or a part of it; x is the standardised z_s / T. All but the last exclude the
    label."""

    max_s: Any
    sum_s: Any  # of e^(a / T_s)
    t1_s: Any  # of e^a
    max_t: Any
    sum_t: Any  # of e^(b / T_t)
    t1_t: Any  # of e^b
    dot: Any  # of e^(b / T) (b - a), with LOG_RATIO e^(a / T) (b - a), with CROSS_TERM e^(b / T) (-a)
    moment_s: Any  # of e^(a / T) x
    moment_t: Any  # of e^(b / T) x
    above_label: Any  # of z_s - z_s,y


# Size of the partial results of a part of a row.
WIDTH = tl.constexpr(len(Statistics._fields))


@triton.jit
def exponential(above, slope):
    """e^(slope above) for the difference of a logit to a maximum, which subtracts equal logits to equal
    bits; -inf, for a masked class at a small temperature, gives 0."""
    return tl.exp2(above * (slope * LOG2E))


@triton.jit
def scaled(above, slope):
    product = above * slope
    return tl.where(product < LOWEST, LOWEST, product)  # unlike a maximum, propagates NaN


@triton.jit
def log_ratios(a, b, slopes, NEEDS: tl.constexpr):
    """b - a, divided by their temperatures if these differ; see ``in_units``."""
    if OWN_SLOPES & NEEDS:
        return scaled(b, slopes.teacher) - scaled(a, slopes.student)
    else:
        return b - a


@triton.jit
def in_units(dot, slopes, NEEDS: tl.constexpr):
    """``dot`` of logits divided by the temperature."""
    return dot if OWN_SLOPES & NEEDS else dot * slopes.student


@triton.jit
def statistics_of_tile(
    student, teacher, columns, max_s, max_t, label, label_logit, classes, slopes, centre, NEEDS: tl.constexpr
):
    """Statistics of a tile relative to these maxima, along its second axis, without the label's logits."""
    a = student - max_s
    exp_a = exponential(a, slopes.student)
    sum_s = tl.sum(exp_a, 1, keep_dims=True)
    zero = tl.zeros_like(sum_s)
    t1_s = zero
    sum_t = zero
    t1_t = zero
    dot = zero
    moment_s = zero
    moment_t = zero
    above_label = zero
    if LABEL_SMOOTHING & NEEDS:
        counted = (columns < classes) & (columns != label)
        above_label = tl.sum(tl.where(counted, student - label_logit, 0.0), 1, keep_dims=True)
    if STUDENT_AT_T1 & NEEDS:
        t1_s = tl.sum(exponential(a, 1.0), 1, keep_dims=True)
    if DISTILLS & NEEDS:
        b = teacher - max_t
        exp_b = exponential(b, slopes.teacher)
        if TEACHER_AT_T1 & NEEDS:
            t1_t = tl.sum(exponential(b, 1.0), 1, keep_dims=True)
        if LOG_RATIO & NEEDS:
            dot = tl.sum(exp_a * log_ratios(a, b, slopes, NEEDS), 1, keep_dims=True)
        elif CROSS_TERM & NEEDS:
            dot = -tl.sum(exp_b * a, 1, keep_dims=True)
        elif not SUMS_ONLY & NEEDS:
            dot = tl.sum(exp_b * log_ratios(a, b, slopes, NEEDS), 1, keep_dims=True)
        if STANDARDIZED & NEEDS:
            base, mean = centre
            x = scaled((student - base) - mean, slopes.student)
            moment_s = tl.sum(exp_a * x, 1, keep_dims=True)
            moment_t = tl.sum(exp_b * x, 1, keep_dims=True)
        sum_t = tl.sum(exp_b, 1, keep_dims=True)
    return Statistics(max_s, sum_s, t1_s, max_t, sum_t, t1_t, dot, moment_s, moment_t, above_label)


@triton.jit
def rebased(sums, max_s, max_t, slopes, NEEDS: tl.constexpr):
    """The same statistics relative to larger maxima."""
    shift_s = sums.max_s - max_s
    factor_s = exponential(shift_s, slopes.student)
    sum_s = sums.sum_s * factor_s
    t1_s = sums.t1_s
    sum_t = sums.sum_t
    t1_t = sums.t1_t
    dot = sums.dot
    moment_s = sums.moment_s
    moment_t = sums.moment_t
    if STUDENT_AT_T1 & NEEDS:
        t1_s *= exponential(shift_s, 1.0)
    if DISTILLS & NEEDS:
        shift_t = sums.max_t - max_t
        factor_t = exponential(shift_t, slopes.teacher)
        if TEACHER_AT_T1 & NEEDS:
            t1_t *= exponential(shift_t, 1.0)
        if LOG_RATIO & NEEDS:
            dot = moved(dot, log_ratios(shift_s, shift_t, slopes, NEEDS), sums.sum_s, factor_s)
        elif CROSS_TERM & NEEDS:
            dot = moved(dot, -shift_s, sum_t, factor_t)
        elif not SUMS_ONLY & NEEDS:
            dot = moved(dot, log_ratios(shift_s, shift_t, slopes, NEEDS), sum_t, factor_t)
        if STANDARDIZED & NEEDS:
            moment_s *= factor_s
            moment_t *= factor_t
        sum_t *= factor_t
    return Statistics(max_s, sum_s, t1_s, max_t, sum_t, t1_t, dot, moment_s, moment_t, sums.above_label)


@triton.jit
def moved(total, shift, of, factor):
    """factor * (total + shift * of): a sum of e^x y relative to a new maximum.

    If the factor is 0, shift * of may overflow."""
    return tl.where(factor == 0.0, 0.0, factor * (total + shift * of))


@triton.jit
def largest_of_both(max_s, max_t, NEEDS: tl.constexpr):
    """The largest along the first axis."""
    if DISTILLS & NEEDS:
        max_s, max_t = reduced_pair(max_s, max_t, True)
    else:
        max_s = tl.max(max_s, 0, keep_dims=True)
        max_t = max_s
    return max_s, max_t


@triton.jit
def combine_statistics(parts, slopes, NEEDS: tl.constexpr):
    """Statistics of a whole, from those of its parts along the first axis."""
    max_s, max_t = largest_of_both(parts.max_s, parts.max_t, NEEDS)
    return summed(rebased(parts, max_s, max_t, slopes, NEEDS), max_s, max_t, NEEDS)


@triton.jit
def summed(parts, max_s, max_t, NEEDS: tl.constexpr):
    """The sums along the first axis of parts that are relative to the same maxima."""
    zero = tl.zeros_like(max_s)
    sum_t = zero
    dot = zero
    t1_s = zero
    if DISTILLS & NEEDS:
        sum_s, sum_t, dot, t1_s = sums_of_four(parts.sum_s, parts.sum_t, parts.dot, parts.t1_s)
    elif STUDENT_AT_T1 & NEEDS:
        sum_s, t1_s = reduced_pair(parts.sum_s, parts.t1_s, False)
    else:
        sum_s = tl.sum(parts.sum_s, 0, keep_dims=True)
    t1_t = tl.sum(parts.t1_t, 0, keep_dims=True) if TEACHER_AT_T1 & NEEDS else zero
    moment_s = zero
    moment_t = zero
    if STANDARDIZED & NEEDS:
        moment_s, moment_t = reduced_pair(parts.moment_s, parts.moment_t, False)
    above_label = tl.sum(parts.above_label, 0, keep_dims=True) if LABEL_SMOOTHING & NEEDS else zero
    return Statistics(max_s, sum_s, t1_s, max_t, sum_t, t1_t, dot, moment_s, moment_t, above_label)


@triton.jit
def statistics_of(
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
    LANE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Statistics of tiles ``first_tile`` to ``end_tile`` of ``rows``, or of the only tile, ``student`` and
    ``teacher`` without the labels."""
    if ONE_TILE:
        _, columns = lane_columns(ROWS, TILE, LANE, VECTOR)
        max_s = tl.max(student, 1, keep_dims=True)
        max_t = tl.max(teacher, 1, keep_dims=True) if DISTILLS & NEEDS else max_s
        if ROWS > 1:
            return statistics_of_tile(
                student, teacher, columns, max_s, max_t, label, label_logit, classes, slopes, centre, NEEDS
            )
        else:
            max_s, max_t = largest_of_both(max_s, max_t, NEEDS)
            of_lanes = statistics_of_tile(
                student, teacher, columns, max_s, max_t, label, label_logit, classes, slopes,
                centre, NEEDS,
            )  # fmt: skip
            return summed(of_lanes, max_s, max_t, NEEDS)
    else:
        first, columns = lane_columns(ROWS, TILE, LANE, VECTOR)
        zero = tl.zeros_like(first).to(tl.float32)
        lowest = zero + MASKED
        sums = Statistics(lowest, zero, zero, lowest, zero, zero, zero, zero, zero, zero)
        for tile in range(first_tile, end_tile):
            tile_columns = tile * TILE + columns
            logits = load_logits(rows.student, tile_columns, classes, exists, "evict_last", True)
            others = logits
            if DISTILLS & NEEDS:
                others = load_logits(rows.teacher, tile_columns, classes, exists, "evict_last", True)
            if LABELLED & NEEDS:
                at_label = tile_columns == label
                logits = tl.where(at_label, EXCLUDED, logits)
                others = tl.where(at_label, EXCLUDED, others)
            max_s = tl.maximum(sums.max_s, tl.max(logits, 1, keep_dims=True))
            max_t = max_s
            if DISTILLS & NEEDS:
                max_t = tl.maximum(sums.max_t, tl.max(others, 1, keep_dims=True))
            before = rebased(sums, max_s, max_t, slopes, NEEDS)
            of_tile = statistics_of_tile(
                logits, others, tile_columns, max_s, max_t, label, label_logit, classes, slopes, centre, NEEDS
            )
            sums = Statistics(
                max_s, before.sum_s + of_tile.sum_s, before.t1_s + of_tile.t1_s,
                max_t, before.sum_t + of_tile.sum_t, before.t1_t + of_tile.t1_t, before.dot + of_tile.dot,
                before.moment_s + of_tile.moment_s, before.moment_t + of_tile.moment_t,
                before.above_label + of_tile.above_label,
            )  # fmt: skip
        if ROWS == 1:
            sums = combine_statistics(sums, slopes, NEEDS)
        return sums


@triton.jit
def store_partial(pointer, values, exists):
    """Store the partial results of a part of a row, for the next launch."""
    for field in tl.static_range(len(values)):
        tl.store(pointer + field, values[field], mask=exists)


@triton.jit
def load_statistics(row_pointer, parts, slopes, NEEDS: tl.constexpr, PARTS: tl.constexpr):
    """Statistics of the whole row, from those of its parts in memory; offsets are the order of the fields."""
    part = tl.arange(0, PARTS)[:, None]
    written = part < parts
    pointer = row_pointer + part * WIDTH
    max_s = tl.load(pointer, mask=written, other=MASKED)
    sum_s = tl.load(pointer + 1, mask=written, other=0.0)
    zero = tl.zeros_like(sum_s)
    t1_s = tl.load(pointer + 2, mask=written, other=0.0) if STUDENT_AT_T1 & NEEDS else zero
    max_t = max_s
    sum_t = zero
    if DISTILLS & NEEDS:
        max_t = tl.load(pointer + 3, mask=written, other=MASKED)
        sum_t = tl.load(pointer + 4, mask=written, other=0.0)
    t1_t = tl.load(pointer + 5, mask=written, other=0.0) if TEACHER_AT_T1 & NEEDS else zero
    dot = zero
    if DISTILLS & NEEDS and not SUMS_ONLY & NEEDS:
        dot = tl.load(pointer + 6, mask=written, other=0.0)
    moment_s = tl.load(pointer + 7, mask=written, other=0.0) if STANDARDIZED & NEEDS else zero
    moment_t = tl.load(pointer + 8, mask=written, other=0.0) if STANDARDIZED & NEEDS else zero
    above_label = tl.load(pointer + 9, mask=written, other=0.0) if LABEL_SMOOTHING & NEEDS else zero
    sums = Statistics(max_s, sum_s, t1_s, max_t, sum_t, t1_t, dot, moment_s, moment_t, above_label)
    return combine_statistics(sums, slopes, NEEDS)
