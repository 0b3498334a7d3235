"""Launches of the Triton kernels: grids, compile-time arguments, pointers and strides."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd.ops.call import Call, Outputs
from fastkd.ops.plan import LANE_BYTES, MAX_PARTS, Plan, device_of, kind_of, plan_rows
from fastkd.ops.triton import (
    formulas,
    mixture_rows,
    moments,
    row_sums,
    row_weights,
    softmax_rows,
    statistics,
    top_k,
)
from fastkd.ops.triton.launch_options import common_vector, compile_options, launch, on_device, row_strides
from fastkd.ops.triton.pointwise_rows import pointwise_rows, scale_rows

# The most programs and warps per multiprocessor that scale a gradient. Most of the time the factor is 1, and
# they end at once: their number is what the launch costs.
SCALE_PROGRAMS, SCALE_WARPS = 8, 64


def with_sums(outputs: Outputs, pairs: int, call: Call) -> Outputs:
    """With memory for what ``row_loss`` can sum over rows."""
    rows = outputs.rows
    if call.indices is not None or rows.shape[0] > pairs * row_sums.MOST_ROWS:
        return outputs
    with on_device(rows):
        counters = row_sums.counters_of(rows, pairs)
    if counters is None:
        return outputs
    return outputs.summed(pairs)._replace(counters=counters)


def row_loss(students: Sequence[Tensor], teachers: Sequence[Tensor], call: Call, outputs: Outputs) -> None:
    """Fill ``outputs``. Logits are [N, C] or [M, K, C] with dense classes; see ``layout.as_rows``."""
    try:
        _row_loss(students, teachers, call, outputs)
    except BaseException:
        counters = outputs.counters
        if counters is not None and not counters.is_cuda:
            counters.zero_()  # the interpreter was stopped, perhaps before the program that does so
        raise


def _row_loss(students: Sequence[Tensor], teachers: Sequence[Tensor], call: Call, outputs: Outputs) -> None:
    if call.indices is not None:
        top_k.row_loss(students[0], teachers[0], call, outputs, dense=row_loss)
        return
    spec, needs = call.spec, call.needs
    rows, terms, gradient, sums, term_sums, counters = outputs
    student, teacher = students[0], teachers[0]
    count, classes = rows.shape[0] // len(students), student.shape[-1]
    standardized = bool(needs & statistics.STANDARDIZED.value)
    device, pairs = device_of(student.device), len(students)
    element_bytes = max(student.element_size(), teacher.element_size())
    plan = plan_rows(kind_of(spec.family, needs), rows.shape[0], classes, element_bytes, device, pairs)
    blocks = -(-count // plan.rows)
    grid = (min(blocks, plan.programs), plan.parts, pairs)
    logits = (tuple(students), tuple(teachers))
    inner_rows = 1 if student.dim() == 2 else student.shape[1]
    strides = (*row_strides(student), *row_strides(teacher))
    row_weight, marks, dynamic = call.row_weight, call.marks, call.dynamic
    if marks is not None and (
        spec.family != "softmax" or not row_weights.by_row_kernel(marks, row_weight, math.prod(grid))
    ):
        row_weight, marks = row_weights.row_weights(marks, row_weight), None
    # Unused pointers must be valid arguments too: `rows` and `student` are placeholders.
    weight = rows if row_weight is None else row_weight
    weight_stride = count if row_weight is not None and row_weight.dim() == 2 else 0
    values = rows if dynamic is None else dynamic
    reduction = (
        (rows, rows, rows) if counters is None else (counters, sums, rows if terms is None else term_sums)
    )
    to_gradient, gradient_stride = (student, 0) if gradient is None else (gradient, gradient.stride(0))
    # Arguments that all skeletons share.
    options = tuple(map(float, call.options))
    common = (weight_stride, gradient_stride, 1.0 / call.divisor, options)
    fixed = {
        "FORMULA": getattr(formulas, spec.name),
        "WEIGHTED": row_weight is not None,
        "WITH_GRADIENT": gradient is not None,
        "DYNAMIC": 0 if dynamic is None else spec.dynamic,
        "ROWS": plan.rows,
        "TILE": plan.tile,
        "LANE": min(plan.tile, LANE_BYTES // element_bytes),
        "VECTOR": common_vector((*students, *teachers, to_gradient), classes, *strides, gradient_stride),
    }
    arguments: tuple[Any, ...]
    with on_device(student):
        if spec.family == "pointwise":
            part_losses = rows if plan.parts == 1 else rows.new_empty(rows.shape[0], plan.parts)
            arguments = (
                *logits, weight, part_losses, to_gradient, reduction, values,
                count, inner_rows, plan.parts, classes, *strides, *common,
            )  # fmt: skip
            fixed |= {"SUMMED": counters is not None, **compile_options(plan)}
            launch(pointwise_rows, (blocks, plan.parts, pairs), arguments, fixed)
            if plan.parts > 1 and counters is None:
                torch.sum(part_losses, 1, out=rows)
            return
        parts_sums = partials(rows, plan, statistics.WIDTH.value)
        if spec.family == "mixture":
            totals = partials(rows, plan, mixture_rows.TOTALS.value)
            arguments = (
                *logits, weight, rows, to_gradient, totals, parts_sums, reduction, values,
                count, inner_rows, blocks, plan.parts, classes, *strides, *common,
            )  # fmt: skip
            fixed |= {"ONE_TILE": plan.one_tile, "PARTS": MAX_PARTS, **compile_options(plan)}
            phases = mixture_phases(plan)
            for phase in phases:
                fixed |= {"PHASE": phase, "SUMMED": counters is not None and phase == phases[-1]}
                launch(mixture_rows.mixture_rows, grid, arguments, fixed)
            return
        labels, ignore_index = (student, 0) if marks is None else marks[:2]
        target = call.target if needs & statistics.LABELLED.value else None
        parts_moments = partials(rows, plan, 2 * moments.MOMENTS_WIDTH.value)
        arguments = (
            *logits, student if target is None else target, weight, labels, rows,
            rows if terms is None else terms, to_gradient, parts_moments, parts_sums, reduction, values,
            count, inner_rows, blocks, plan.parts, classes, *strides,
            0 if target is None else target.stride(0), ignore_index, *common,
        )  # fmt: skip
        fixed |= {
            "NEEDS": needs, "MARKS": row_weights.use_of(marks), "TERMS": terms is not None,
            "ONE_TILE": plan.one_tile, "PARTS": MAX_PARTS, **compile_options(plan),
        }  # fmt: skip
        phases = softmax_phases(plan, standardized)
        for phase in phases:
            fixed |= {"PHASE": phase, "SUMMED": counters is not None and phase == phases[-1]}
            launch(softmax_rows.softmax_rows, grid, arguments, fixed)


def partials(rows: Tensor, plan: Plan, values: int) -> Tensor:
    """Memory for the partial results of each part of each row; a placeholder if rows have one part."""
    return rows if plan.parts == 1 else rows.new_empty(rows.shape[0] * plan.parts * values)


def softmax_phases(plan: Plan, standardized: bool) -> list[int]:
    """The phases, one launch each: one phase unless rows are split over programs."""
    if plan.parts == 1:
        return [softmax_rows.WHOLE.value]
    moments = [softmax_rows.MOMENTS.value] if standardized else []
    return [*moments, softmax_rows.STATISTICS.value, softmax_rows.GRADIENT.value]


def mixture_phases(plan: Plan) -> list[int]:
    if plan.parts == 1:
        return [softmax_rows.WHOLE.value]
    return [softmax_rows.STATISTICS.value, mixture_rows.MIXTURE.value, softmax_rows.GRADIENT.value]


def scale_rows_(gradient: Tensor, factors: Tensor) -> None:
    """Multiply rows of H pairs by ``factors`` [H, N] in place; rows whose factor is 1 are not accessed."""
    (pairs, count), classes = factors.shape, gradient.shape[1]
    device = device_of(gradient.device)
    plan = plan_rows("scale", pairs * count, classes, gradient.element_size(), device)
    vector = common_vector((gradient,), classes, gradient.stride(0))
    resident = device.multiprocessors * min(SCALE_PROGRAMS, SCALE_WARPS // plan.warps)
    programs = min(count, -(-resident // (plan.parts * pairs)))
    with on_device(gradient):
        arguments = (
            gradient, factors, count, classes, gradient.stride(0), *factors.stride(), plan.parts,
        )  # fmt: skip
        fixed = {"TILE": plan.tile, "VECTOR": vector, **compile_options(plan)}
        launch(scale_rows, (programs, plan.parts, pairs), arguments, fixed)
