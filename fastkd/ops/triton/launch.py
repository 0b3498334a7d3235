"""Launches of the Triton kernels: which tile, which compile-time switches, which pointers."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fastkd.ops.call import Call, Outputs
from fastkd.ops.plan import MAX_PARTS, Plan, device_of, plan_rows
from fastkd.ops.spec import Needs
from fastkd.ops.triton import formulas, mixture_rows, softmax_rows, statistics
from fastkd.ops.triton.pointwise_rows import pointwise_rows, scale_rows


def compile_options(plan: Plan, crowded: bool = False) -> dict[str, Any]:
    """How a kernel is compiled; a crowded one needs more registers than the assembler gives it."""
    # A fused multiply-add would leave a rounding error where two equal products must cancel to 0.
    # Triton's default changes between versions.
    options = {"num_warps": plan.warps, "enable_fp_fusion": False}
    # Left to itself NVIDIA's assembler keeps sixteen warps to 64 registers and spills a few.
    if torch.version.hip is None and plan.warps == 16 and crowded:
        options["maxnreg"] = 128
    return options


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def row_loss(students: Sequence[Tensor], teachers: Sequence[Tensor], call: Call, outputs: Outputs) -> None:
    """Fills ``outputs``. Logits are [N, C] or [M, K, C] with dense classes; see ``layout.as_rows``."""
    spec, needs = call.spec, call.needs
    rows, terms, gradient, _ = outputs
    student, teacher = students[0], teachers[0]
    count, classes = rows.shape[0] // len(students), student.shape[-1]
    standardized = bool(needs & Needs.STANDARDIZED)
    plan = plan_rows(
        spec.family, rows.shape[0], classes, student.element_size(), device_of(student.device), standardized
    )
    blocks = -(-count // plan.rows)
    grid = (min(blocks, plan.programs), plan.parts, len(students))
    logits = (tuple(students), tuple(teachers))
    inner_rows = 1 if student.dim() == 2 else student.shape[1]
    strides = (*row_strides(student), *row_strides(teacher))
    # A pointer that is not used still has to be one.
    row_weight, dynamic = call.row_weight, call.dynamic
    weight = rows if row_weight is None else row_weight
    weight_stride = count if row_weight is not None and row_weight.dim() == 2 else 0
    values = rows if dynamic is None else dynamic
    to_gradient, gradient_stride = (student, 0) if gradient is None else (gradient, gradient.stride(0))
    # What every skeleton takes after its own sizes, and its compile-time arguments.
    common = (weight_stride, gradient_stride, 1.0 / call.divisor, tuple(map(float, call.options)))
    fixed = {
        "FORMULA": getattr(formulas, spec.name),
        "WEIGHTED": row_weight is not None,
        "WITH_GRADIENT": gradient is not None,
        "DYNAMIC": 0 if dynamic is None else spec.dynamic,
        "ROWS": plan.rows,
        "TILE": plan.tile,
        "VECTOR": common_vector(classes, *strides, gradient_stride),
    }
    with on_device(student):
        if spec.family == "pointwise":
            of_parts = rows if plan.parts == 1 else rows.new_empty(rows.shape[0], plan.parts)
            pointwise_rows[blocks, plan.parts, len(students)](
                *logits, weight, of_parts, to_gradient, values,
                count, inner_rows, plan.parts, classes, *strides, *common, **fixed, **compile_options(plan),
            )  # fmt: skip
            if plan.parts > 1:
                torch.sum(of_parts, 1, out=rows)
            return
        sums = partials(rows, plan, statistics.WIDTH.value)
        if spec.family == "mixture":
            totals = partials(rows, plan, mixture_rows.TOTALS.value)
            for phase in mixture_phases(plan):
                mixture_rows.mixture_rows[grid](
                    *logits, weight, rows, to_gradient, totals, sums, values,
                    count, inner_rows, blocks, plan.parts, classes, *strides, *common, **fixed,
                    PHASE=phase, PARTS=MAX_PARTS, **compile_options(plan, crowded=True),
                )  # fmt: skip
            return
        label = call.target if needs & Needs.LABELLED else None
        crowded = bool(needs & (Needs.STANDARDIZED | Needs.STUDENT_AT_T1))
        moments = partials(rows, plan, 2 * statistics.MOMENTS_WIDTH.value)
        for phase in softmax_phases(plan, standardized):
            softmax_rows.softmax_rows[grid](
                *logits, student if label is None else label, weight, rows,
                rows if terms is None else terms, to_gradient, moments, sums, values,
                count, inner_rows, blocks, plan.parts, classes, *strides,
                0 if label is None else label.stride(0), *common, **fixed, NEEDS=needs,
                TERMS=terms is not None, PHASE=phase, ONE_TILE=plan.one_tile, PARTS=MAX_PARTS,
                **compile_options(plan, crowded),
            )  # fmt: skip


def row_strides(logits: Tensor) -> tuple[int, int]:
    """Of the leading dimensions of [M, K, C]; [N, C] is [N, 1, C]."""
    return (logits.stride(0), 0 if logits.dim() == 2 else logits.stride(1))


def common_vector(*numbers: int) -> int:
    """8 where it divides all of these, else 1: for elements of 2 or 4 bytes, loads and stores of 16 bytes.

    A constant of the kernel, where Triton's own specialisation of each number would tell 1 and multiples of
    16 apart and compile again for other strides.
    """
    return 8 if all(number % 8 == 0 for number in numbers) else 1


def partials(rows: Tensor, plan: Plan, values: int) -> Tensor:
    """Room for what each part of each row hands on; where a row has one part, nothing is handed on."""
    return rows if plan.parts == 1 else rows.new_empty(rows.shape[0] * plan.parts * values)


def softmax_phases(plan: Plan, standardized: bool) -> list[int]:
    """The launches: one, or where a row is shared by programs one for each time that its parts meet."""
    if plan.parts == 1:
        return [softmax_rows.WHOLE.value]
    moments = [softmax_rows.MOMENTS.value] if standardized else []
    return [*moments, softmax_rows.STATISTICS.value, softmax_rows.GRADIENT.value]


def mixture_phases(plan: Plan) -> list[int]:
    if plan.parts == 1:
        return [softmax_rows.WHOLE.value]
    return [softmax_rows.STATISTICS.value, mixture_rows.MIXTURE.value, softmax_rows.GRADIENT.value]


def scale_rows_(gradient: Tensor, factors: Tensor) -> None:
    """``gradient[n] *= factors[n]`` in place; rows whose factor is 1 are not touched."""
    count, classes = gradient.shape
    device = device_of(gradient.device)
    plan = plan_rows("scale", count, classes, gradient.element_size(), device)
    vector = common_vector(classes, gradient.stride(0))
    with on_device(gradient):
        scale_rows[count, plan.parts](
            gradient, factors, classes, gradient.stride(0), factors.stride(0), plan.parts,
            TILE=plan.tile, VECTOR=vector, **compile_options(plan),
        )  # fmt: skip
