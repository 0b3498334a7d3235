"""Losses that are a sum over classes of a function of two logits, and the scaling of a gradient."""

import triton
import triton.language as tl

from fastkd.ops.triton.tiles import (
    load_logits,
    of_pair,
    rows_of_block,
    store_tile,
    tiles_of_part,
    weight_of_rows,
)


@triton.jit(do_not_specialize=["count", "parts"])
def pointwise_rows(
    student_pointers,
    teacher_pointers,
    weight_pointer,
    loss_pointer,
    gradient_pointer,
    count,
    parts,
    classes,
    student_stride,
    teacher_stride,
    gradient_stride,
    scale,
    temperature,
    slope_factor,
    FORMULA: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """T^2 sum_i f(z_s,i, z_t,i) of the classes of each part of a row, FORMULA giving f and its slope.

    Programs as in softmax_rows. ``slope_factor`` is T^2 times the derivative of FORMULA's argument in z_s."""
    pair = tl.program_id(2)
    part = tl.program_id(1)
    index, exists = rows_of_block(tl.program_id(0), count, ROWS)
    result = pair.to(tl.int64) * count + index
    student_rows = of_pair(student_pointers, pair) + index * student_stride
    teacher_rows = of_pair(teacher_pointers, pair) + index * teacher_stride
    weight = weight_of_rows(weight_pointer, index, exists, scale, WEIGHTED)
    first_tile, end_tile = tiles_of_part(part, parts, classes, TILE)
    total = tl.zeros((ROWS, 1), tl.float32)
    for tile in range(first_tile, end_tile):
        columns = tile * TILE + tl.arange(0, TILE)[None, :]
        student = load_logits(student_rows, columns, classes, exists, "evict_first")
        teacher = load_logits(teacher_rows, columns, classes, exists, "evict_first")
        value, slope = FORMULA(student, teacher, 1.0 / temperature)
        total += tl.sum(value, 1, keep_dims=True)
        if WITH_GRADIENT:
            value = weight * slope_factor * slope
            gradient_rows = gradient_pointer + result * gradient_stride
            store_tile(gradient_rows, columns, classes, exists, value, weight, False)
    loss = tl.where(weight == 0.0, 0.0, weight * temperature * temperature * total)
    tl.store(loss_pointer + result * parts + part, loss, mask=exists)


@triton.jit(do_not_specialize=["parts"])
def scale_rows(
    gradient_pointer, upstream_pointer, classes, gradient_stride, upstream_stride, parts, TILE: tl.constexpr
):
    """``gradient[row] *= upstream[row]`` in place. Decided on the device: a factor of 1 touches nothing."""
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(upstream_pointer + row * upstream_stride)
    if factor != 1.0:
        first_tile, end_tile = tiles_of_part(tl.program_id(1), parts, classes, TILE)
        gradient_row = gradient_pointer + row * gradient_stride
        for tile in range(first_tile, end_tile):
            columns = tile * TILE + tl.arange(0, TILE)
            inside = columns < classes
            gradient = tl.load(gradient_row + columns, mask=inside)
            scaled = gradient.to(tl.float32) * factor
            tl.store(gradient_row + columns, scaled.to(gradient.dtype), mask=inside)
