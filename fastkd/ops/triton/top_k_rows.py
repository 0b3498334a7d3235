"""The row kernels for a teacher known at K classes: the student's side of ``reference.known_classes``.

The classes of a student's row are the known ones, the label if the call has a cross-entropy, and the others.
Sums over the others exclude the rest, which is added afterwards, so that nothing cancels. Three kernels:
``rest_sums`` over the others, ``known_logits`` for the row of K + 1 logits and the cross-entropy, and, once
the gradient of those is computed, ``expand`` for that of all classes.

A tile is [V, TILE / V]: each thread has V classes of a column, and accumulates its own maximum and sums,
which are reduced over threads once per row.
"""

import triton
import triton.language as tl

from fastkd.ops.triton.formulas import Row, softmax
from fastkd.ops.triton.known_classes import (
    LOG2E,
    first_known,
    hide,
    label_of,
    load_index,
    places_of,
    slope_of,
    temperature_of,
)
from fastkd.ops.triton.statistics import (
    CROSS_ENTROPY,
    LABEL_SMOOTHING,
    STUDENT_AT_T1,
    Pair,
    Statistics,
    store_partial,
)
from fastkd.ops.triton.tiles import (
    MASKED,
    load_label_logit,
    load_logits,
    multiple,
    numbers_of,
    row_starts,
    tiles_of_part,
    weight_of_rows,
)

# As NOT_SPECIALIZED in tiles.py.
NOT_SPECIALIZED = [
    "indices_pointer", "target_pointer", "weight_pointer", "dynamic_pointer", "partial_pointer",
    "result_pointer", "of_student_pointer", "small_pointer", "position_pointer", "inner_rows", "parts",
    "classes", "known", "student_outer_stride", "student_inner_stride", "indices_stride", "target_stride",
    "gradient_stride",
]  # fmt: skip
# Sizes of the results of ``rest_sums`` for a part of a row, and of ``known_logits`` for a row.
PARTIALS = tl.constexpr(4)
RESULTS = tl.constexpr(8)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def rest_sums(
    student_pointer,
    indices_pointer,
    target_pointer,
    weight_pointer,
    partial_pointer,
    dynamic_pointer,
    inner_rows,
    parts,
    classes,
    known,
    student_outer_stride,
    student_inner_stride,
    indices_stride,
    target_stride,
    numbers,
    NEEDS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    DYNAMIC: tl.constexpr,
    TILE: tl.constexpr,
    V: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Per part of a row: the maximum z of the other classes, their sums of e^((z - max) / T) and e^(z - max),
    and the sum over all classes of z - z_label.

    Grid: (rows, parts of a row). ``numbers``, DYNAMIC and VECTOR as in softmax_rows.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    classes = multiple(classes, VECTOR)
    weight, read = weight_of_rows(weight_pointer, 0, 0, row, row >= 0, 1.0, WEIGHTED)
    if read:
        student = student_pointer + row_starts(
            row, inner_rows, (student_outer_stride, student_inner_stride), VECTOR
        )
        indices = indices_pointer + row * indices_stride
        label, bad_label = label_of(target_pointer, target_stride, row, classes, CROSS_ENTROPY & NEEDS)
        label_logit = 0.0
        if LABEL_SMOOTHING & NEEDS:
            label_logit = load_label_logit(student, tl.maximum(label, 0), classes, read)
        slope = slope_of(numbers_of(numbers, dynamic_pointer, DYNAMIC), NEEDS)
        first_tile, end_tile = tiles_of_part(part, parts, classes, TILE)
        at = known * 0
        if part > 0:
            at = first_known(indices, known, first_tile * TILE)
        index = load_index(indices, at, known)
        top = tl.full((1, TILE // V), MASKED, tl.float32)
        total = tl.zeros((1, TILE // V), tl.float32)
        total_t1 = total
        above_label = total
        for tile in range(first_tile, end_tile):
            start = tile * TILE
            columns = start + places_of(TILE, V, VECTOR)
            inside = columns < classes
            logits = tl.load(student + columns, mask=inside, other=float("-inf")).to(tl.float32)
            if LABEL_SMOOTHING & NEEDS:
                # As load_logits; what is left of the row has no use for the lower bound, as e^-inf is 0 too.
                above = tl.where(logits < MASKED, MASKED, logits) - label_logit
                above_label += tl.sum(tl.where(inside, above, 0.0), 0, keep_dims=True)
            hidden = tl.zeros((1, TILE // V), tl.int32)
            while index < start + TILE:
                hidden = hide(hidden, index - start, TILE, V, VECTOR)
                at += 1
                index = load_index(indices, at, known)
            if CROSS_ENTROPY & NEEDS:  # noqa: SIM102, the outer condition is of compile time
                if (label >= start) & (label < start + TILE):
                    hidden = hide(hidden, label - start, TILE, V, VECTOR)
            is_hidden = ((hidden >> tl.arange(0, V)[:, None]) & 1) == 1
            logits = tl.where(is_hidden, float("-inf"), logits)
            before = top
            top = tl.maximum(top, tl.max(logits, 0, keep_dims=True))
            # A NaN may be lost in the maximum, but not in the sum.
            below = logits - top
            rebase = before - top
            total = total * tl.exp2(rebase * slope) + tl.sum(tl.exp2(below * slope), 0, keep_dims=True)
            if STUDENT_AT_T1 & NEEDS:
                new = tl.sum(tl.exp2(below * LOG2E), 0, keep_dims=True)
                total_t1 = total_t1 * tl.exp2(rebase * LOG2E) + new
        part_top = tl.max(top)
        rebase = top - part_top
        values = (
            part_top,
            tl.sum(total * tl.exp2(rebase * slope)),
            tl.sum(total_t1 * tl.exp2(rebase * LOG2E)) if STUDENT_AT_T1 & NEEDS else 0.0,
            tl.sum(above_label) if LABEL_SMOOTHING & NEEDS else 0.0,
        )
        store_partial(partial_pointer + (row * parts + part) * PARTIALS, values, read)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def known_logits(
    student_pointer,
    indices_pointer,
    target_pointer,
    weight_pointer,
    partial_pointer,
    dynamic_pointer,
    result_pointer,
    of_student_pointer,
    small_pointer,
    position_pointer,
    inner_rows,
    parts,
    classes,
    known,
    student_outer_stride,
    student_inner_stride,
    indices_stride,
    target_stride,
    scale,
    numbers,
    NEEDS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    DYNAMIC: tl.constexpr,
    POSITION: tl.constexpr,
    KNOWN: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The student's logits of K + 1 classes, less the largest; the position of the label among them, -1 if
    it has none; the cross-entropy [2, rows], weighted as loss and as term; what ``expand`` reads.

    Grid: (rows,). KNOWN: known classes per step. PARTS: an upper bound of ``parts``.
    """
    row = tl.program_id(0).to(tl.int64)
    weight, read = weight_of_rows(weight_pointer, 0, 0, row, row >= 0, scale, WEIGHTED)
    if CROSS_ENTROPY & NEEDS:
        # For rows that are not read.
        tl.store(of_student_pointer + row, 0.0)
        tl.store(of_student_pointer + tl.num_programs(0) + row, 0.0)
    if read:
        student = student_pointer + row_starts(
            row, inner_rows, (student_outer_stride, student_inner_stride), 1
        )
        indices = indices_pointer + row * indices_stride
        small = small_pointer + row * (known + 1)
        values = numbers_of(numbers, dynamic_pointer, DYNAMIC)
        temperature = temperature_of(values, NEEDS)
        slope = slope_of(values, NEEDS)
        label, bad_label = label_of(
            target_pointer, target_stride, row, classes, CROSS_ENTROPY & NEEDS or POSITION
        )

        part = tl.arange(0, PARTS)
        written = part < parts
        partial = partial_pointer + (row * parts + part) * PARTIALS
        part_tops = tl.load(partial, mask=written, other=MASKED)
        top = tl.max(part_tops)
        factors = tl.exp2((part_tops - top) * slope)
        total = tl.sum(factors * tl.load(partial + 1, mask=written, other=0.0))

        other_top = top  # of all classes but the label
        known_top = tl.full((), MASKED, tl.float32)
        position = tl.full((), -1, tl.int32)
        for first in range(0, known, KNOWN):
            at = first + tl.arange(0, KNOWN)
            inside = at < known
            index = load_index(indices, at, known)
            logits = load_logits(student, index, classes, inside, "")
            known_top = tl.maximum(known_top, tl.max(logits))
            others = tl.where(index == label, MASKED, logits)
            other_top = tl.maximum(other_top, tl.max(others))
            position = tl.maximum(position, tl.max(tl.where(index == label, at, -1)))
        if POSITION:
            tl.store(position_pointer + row, position.to(tl.int64))

        # The rest: the other classes, and a label that is not known. If all are masked, so is the rest.
        rest_top = top
        rest_sum = total
        label_share = -1.0  # of the rest, if part of it
        label_logit = 0.0
        if CROSS_ENTROPY & NEEDS:
            label_logit = load_label_logit(student, tl.maximum(label, 0), classes, read)
            in_rest = position < 0
            own_logit = tl.where(in_rest, label_logit, MASKED)
            rest_top = tl.maximum(top, own_logit)
            own = tl.exp2((own_logit - rest_top) * slope)
            rest_sum = total * tl.exp2((top - rest_top) * slope) + own
        masked = rest_top <= MASKED
        rest_sum = tl.where(rest_sum == 0.0, 1.0, rest_sum)
        share = tl.where(masked, 0.0, tl.exp2((top - rest_top) * slope) / rest_sum)
        if CROSS_ENTROPY & NEEDS:
            label_share = tl.where(in_rest, tl.where(masked, 0.0, own / rest_sum), -1.0)
        base = tl.maximum(known_top, rest_top)
        rest = (rest_top - base) + temperature * tl.log(rest_sum)
        rest = tl.where(masked, tl.where(rest_sum == rest_sum, MASKED, rest_sum), rest)
        tl.store(small + known, rest)

        other_t1 = tl.zeros((), tl.float32)
        for first in range(0, known, KNOWN):
            at = first + tl.arange(0, KNOWN)
            inside = at < known
            index = load_index(indices, at, known)
            logits = load_logits(student, index, classes, inside, "")
            tl.store(small + at, tl.where(logits <= MASKED, MASKED, logits - base), mask=inside)
            if CROSS_ENTROPY & NEEDS:
                others = tl.where(inside & (index != label), logits - other_top, MASKED)
                other_t1 += tl.sum(tl.exp(others))

        student_t1 = 0.0
        student_t1_of_known = 0.0
        constant = 0.0
        label_gradient = 0.0
        if CROSS_ENTROPY & NEEDS:
            rest_t1 = total
            if STUDENT_AT_T1 & NEEDS:
                part_t1 = tl.load(partial + 2, mask=written, other=0.0)
                rest_t1 = tl.sum(tl.exp(part_tops - top) * part_t1)
            from_top = tl.exp(top - other_top)
            other_t1 += from_top * rest_t1
            other_t1 = tl.where(other_t1 == 0.0, 1.0, other_t1)  # all masked, and none of them counted
            above_label = tl.zeros((), tl.float32)
            if LABEL_SMOOTHING & NEEDS:
                above_label = tl.sum(tl.load(partial + 3, mask=written, other=0.0))
            zero = tl.zeros((), tl.float32)
            sums = Statistics(other_top, other_t1, other_t1, zero, zero, zero, zero, zero, zero, above_label)
            inputs = Row(sums, Pair(1.0, 1.0), Pair(label_logit, 0.0), 0.0, 0.0, classes)
            # The formula without DISTILLS, of the only loss with a term of the student's logits alone.
            loss, terms, gradient = softmax(inputs, values, CROSS_ENTROPY)
            weight = tl.where(bad_label, float("nan"), weight)
            tl.store(of_student_pointer + row, weight * loss)
            tl.store(of_student_pointer + tl.num_programs(0) + row, weight * terms[0])
            student_t1_of_known = weight * gradient.student_t1
            student_t1 = student_t1_of_known * from_top
            constant = weight * gradient.constant
            label_gradient = weight * gradient.label
        results = (
            top, share, student_t1, student_t1_of_known, other_top, constant, label_share, label_gradient
        )  # fmt: skip
        store_partial(result_pointer + row * RESULTS, results, read)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def expand(
    student_pointer,
    indices_pointer,
    target_pointer,
    weight_pointer,
    result_pointer,
    dynamic_pointer,
    small_pointer,
    gradient_pointer,
    inner_rows,
    parts,
    classes,
    known,
    student_outer_stride,
    student_inner_stride,
    indices_stride,
    target_stride,
    gradient_stride,
    numbers,
    NEEDS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    DYNAMIC: tl.constexpr,
    KNOWN: tl.constexpr,
    TILE: tl.constexpr,
    V: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """The gradient by all classes, from ``small_pointer``, that by K + 1 classes: the rest's, times the
    softmax within the rest, and the cross-entropy's. Grid: (rows, parts of a row)."""
    row = tl.program_id(0).to(tl.int64)
    classes = multiple(classes, VECTOR)
    weight, read = weight_of_rows(weight_pointer, 0, 0, row, row >= 0, 1.0, WEIGHTED)
    first_tile, end_tile = tiles_of_part(tl.program_id(1), parts, classes, TILE)
    to_gradient = gradient_pointer + multiple(row * gradient_stride, VECTOR)
    if read:
        student = student_pointer + row_starts(
            row, inner_rows, (student_outer_stride, student_inner_stride), VECTOR
        )
        indices = indices_pointer + row * indices_stride
        small = small_pointer + row * (known + 1)
        results = result_pointer + row * RESULTS
        top = tl.load(results)
        rest = tl.load(small + known)
        factor = rest * tl.load(results + 1)
        factor_t1 = 0.0
        constant = 0.0
        if CROSS_ENTROPY & NEEDS:
            factor_t1 = tl.load(results + 2)
            if not STUDENT_AT_T1 & NEEDS:
                factor += factor_t1
        if LABEL_SMOOTHING & NEEDS:
            constant = tl.load(results + 5)
        slope = slope_of(numbers_of(numbers, dynamic_pointer, DYNAMIC), NEEDS)
        for tile in range(first_tile, end_tile):
            columns = tile * TILE + places_of(TILE, V, VECTOR)
            inside = columns < classes
            logits = tl.load(
                student + columns, mask=inside, other=float("-inf"), eviction_policy="evict_first"
            )
            # Known classes and the label may be above the maximum.
            below = tl.minimum(logits.to(tl.float32) - top, 0.0)
            value = factor * tl.exp2(below * slope)
            if STUDENT_AT_T1 & NEEDS:
                value += factor_t1 * tl.exp2(below * LOG2E)
            if LABEL_SMOOTHING & NEEDS:
                value += constant
            tl.store(to_gradient + columns, value.to(gradient_pointer.dtype.element_ty), mask=inside)

        # Known classes and the label are written again. The barrier orders the two stores to an address,
        # which different threads execute; to leave them out above would cost as much as in ``rest_sums``.
        tl.debug_barrier()
        first_column = first_tile * TILE
        end_column = end_tile * TILE
        label, bad_label = label_of(target_pointer, target_stride, row, classes, CROSS_ENTROPY & NEEDS)
        of_known = 0.0
        other_top = 0.0
        label_gradient = 0.0
        if CROSS_ENTROPY & NEEDS:
            of_known = tl.load(results + 3)
            other_top = tl.load(results + 4)
            label_share = tl.load(results + 6)
            label_gradient = tl.load(results + 7)
            if (label_share >= 0) & (label >= first_column) & (label < end_column):
                value = rest * label_share + label_gradient
                tl.store(to_gradient + label, value.to(gradient_pointer.dtype.element_ty))
        for first in range(0, known, KNOWN):
            at = first + tl.arange(0, KNOWN)
            index = load_index(indices, at, known)
            mine = (index >= first_column) & (index < end_column)
            value = tl.load(small + at, mask=mine, other=0.0)
            if CROSS_ENTROPY & NEEDS:
                logits = load_logits(student, index, classes, mine, "")
                of_student = of_known * tl.exp(tl.minimum(logits - other_top, 0.0)) + constant
                value += tl.where(index == label, label_gradient, of_student)
            tl.store(to_gradient + index, value.to(gradient_pointer.dtype.element_ty), mask=mine)
    else:
        for tile in range(first_tile, end_tile):
            columns = tile * TILE + places_of(TILE, V, VECTOR)
            zero = tl.zeros((V, TILE // V), gradient_pointer.dtype.element_ty)
            tl.store(to_gradient + columns, zero, mask=columns < classes)
