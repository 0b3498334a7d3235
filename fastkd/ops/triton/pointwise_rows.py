"""The row skeleton of the pointwise family, sums over classes of f(z_s, z_t), and gradient scaling."""

import triton
import triton.language as tl

from fastkd.ops.triton.row_sums import sum_rows
from fastkd.ops.triton.tiles import (
    NOT_SPECIALIZED,
    lane_columns,
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


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def pointwise_rows(
    student_pointers,
    teacher_pointers,
    weight_pointer,
    loss_pointer,
    gradient_pointer,
    reduction,
    dynamic_pointer,
    count,
    inner_rows,
    parts,
    classes,
    student_outer_stride,
    student_inner_stride,
    teacher_outer_stride,
    teacher_inner_stride,
    weight_stride,
    gradient_stride,
    scale,
    numbers,
    FORMULA: tl.constexpr,
    WEIGHTED: tl.constexpr,
    DYNAMIC: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    SUMMED: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    LANE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Compute T^2 sum_i f(z_s,i / T, z_t,i / T) for each part of a row; FORMULA returns f and f'.

    Grid, ``numbers``, DYNAMIC, VECTOR and SUMMED as in softmax_rows."""
    pair = tl.program_id(2).to(tl.int64)
    part = tl.program_id(1)
    temperature = numbers_of(numbers, dynamic_pointer, DYNAMIC)[0]
    classes = multiple(classes, VECTOR)
    index, exists = rows_of_block(tl.program_id(0), count, ROWS)
    result = pair * count + index
    student_strides = (student_outer_stride, student_inner_stride)
    teacher_strides = (teacher_outer_stride, teacher_inner_stride)
    student_rows = of_pair(student_pointers, pair) + row_starts(index, inner_rows, student_strides, VECTOR)
    teacher_rows = of_pair(teacher_pointers, pair) + row_starts(index, inner_rows, teacher_strides, VECTOR)
    weight, read = weight_of_rows(weight_pointer, weight_stride, pair, index, exists, scale, WEIGHTED)
    first_tile, end_tile = tiles_of_part(part, parts, classes, TILE)
    slope = tl.div_rn(1.0, temperature)
    factor = weighted(temperature, weight, False)
    first, columns = lane_columns(ROWS, TILE, LANE, VECTOR)
    total = tl.zeros_like(first).to(tl.float32)
    for tile in range(first_tile, end_tile):
        tile_columns = tile * TILE + columns
        student = load_logits(student_rows, tile_columns, classes, read, "evict_first")
        teacher = load_logits(teacher_rows, tile_columns, classes, read, "evict_first")
        value, derivative = FORMULA(student, teacher, slope)
        total += tl.sum(value, 1, keep_dims=True)
        if WITH_GRADIENT:
            gradient_rows = gradient_pointer + multiple(result * gradient_stride, VECTOR)
            store_tile(gradient_rows, tile_columns, classes, exists, factor * derivative)
    if ROWS == 1:
        total = tl.sum(total, 0, keep_dims=True)
    tl.store(
        loss_pointer + result * parts + part,
        weighted(temperature * temperature * total, weight, False),
        mask=exists,
    )
    if SUMMED:
        sum_rows(reduction, loss_pointer, loss_pointer, count, count * parts, False)


@triton.jit(
    do_not_specialize=[
        "factor_pointer", "count", "classes", "gradient_stride", "pair_stride", "factor_stride", "parts",
    ]
)  # fmt: skip
def scale_rows(
    gradient_pointer,
    factor_pointer,
    count,
    classes,
    gradient_stride,
    pair_stride,
    factor_stride,
    parts,
    TILE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """``gradient[row] *= factor[row]`` in place, of ``count`` rows per pair; a row whose factor is 1 is not
    accessed.

    Grid: (programs that share the rows of a pair, parts of a row, pairs).
    """
    pair = tl.program_id(2).to(tl.int64)
    classes = multiple(classes, VECTOR)
    factors = factor_pointer + pair * pair_stride
    first_tile, end_tile = tiles_of_part(tl.program_id(1), parts, classes, TILE)
    # One factor of 1 for all rows: nothing to do.
    end = tl.where((factor_stride == 0) & (tl.load(factors) == 1.0), 0, count)
    for row in range(tl.program_id(0), end, tl.num_programs(0)):
        factor = tl.load(factors + row * factor_stride.to(tl.int64))
        if factor != 1.0:
            gradient_row = gradient_pointer + multiple((pair * count + row) * gradient_stride, VECTOR)
            for tile in range(first_tile, end_tile):
                columns = tile * TILE + tl.arange(0, TILE)
                inside = columns < classes
                gradient = tl.load(gradient_row + columns, mask=inside)
                scaled = gradient.to(tl.float32) * factor
                tl.store(gradient_row + columns, scaled.to(gradient.dtype), mask=inside)
