"""Losses that are a sum over classes of a function of two logits, and the scaling of a gradient."""

import triton
import triton.language as tl

from fastkd.ops.triton.tiles import load_logits, row_weight, store_tile


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
    weight = row_weight(weight_pointer, row, scale, WEIGHTED)
    total = 0.0
    for start in range(0, classes, TILE):
        columns = start + tl.arange(0, TILE)
        student = load_logits(student_pointer + row * student_stride, columns, classes, "evict_first")
        teacher = load_logits(teacher_pointer + row * teacher_stride, columns, classes, "evict_first")
        value, slope = FORMULA(student, teacher, 1.0 / temperature)
        total += tl.sum(value)
        if GRADIENT:
            value = weight * slope_factor * slope
            store_tile(gradient_pointer + row * gradient_stride, columns, classes, value, weight, False)
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
