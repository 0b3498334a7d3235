"""Launches of the Triton kernels: which tile, which compile-time switches, which pointers."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fastkd.ops.plan import MAX_PARTS, Plan, device_of, plan_rows
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


def row_loss(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    target: Tensor | None,
    row_weight: Tensor | None,
    scale: float,
    loss: str,
    options: Sequence[float],
    rows: Tensor,
    terms: Tensor | None,
    gradient: Tensor | None,
    dynamic: Tensor | None = None,
) -> None:
    """Fills ``rows`` and, where they are given, ``terms`` and ``gradient``; see ``ops.library``.

    Logits are [N, C] or [M, K, C], N = M K, of any strides but for the last dimension's, which is 1.
    ``row_weight`` is [N], the same for all pairs, or [H, N]. With ``dynamic``, which holds the options in
    float32 on the logits' device, the kernels read their values from it; ``options`` then only chooses code,
    and is NaN where a value is neither 0 nor 1.
    """
    student, teacher = students[0], teachers[0]
    count, classes = rows.shape[0] // len(students), student.shape[-1]
    standardized = loss == "softmax" and options[6] != 0
    plan = plan_rows(
        loss, rows.shape[0], classes, student.element_size(), device_of(student.device), standardized
    )
    blocks = -(-count // plan.rows)
    grid = (min(blocks, plan.programs), plan.parts, len(students))
    logits = (tuple(students), tuple(teachers))
    inner_rows = 1 if student.dim() == 2 else student.shape[1]
    strides = (*row_strides(student), *row_strides(teacher))
    # A pointer that is not used still has to be one.
    weight = rows if row_weight is None else row_weight
    weight_stride = count if row_weight is not None and row_weight.dim() == 2 else 0
    values = rows if dynamic is None else dynamic
    to_gradient, gradient_stride = (student, 0) if gradient is None else (gradient, gradient.stride(0))
    vector = common_vector(classes, *strides, gradient_stride)
    shape = {"ROWS": plan.rows, "TILE": plan.tile, "VECTOR": vector}
    numbers, in_memory = kernel_numbers(loss, options)
    switches = {
        "WEIGHTED": row_weight is not None,
        "WITH_GRADIENT": gradient is not None,
        "DYNAMIC": 0 if dynamic is None else in_memory,
    }
    with on_device(student):
        if loss == "jsd":
            kl, sums = partials(rows, plan, 3), partials(rows, plan, statistics.WIDTH.value)
            for phase in mixture_phases(plan):
                mixture_rows.jsd_rows[grid](
                    *logits, weight, rows, to_gradient, kl, sums, values,
                    count, inner_rows, blocks, plan.parts, classes, *strides, weight_stride, gradient_stride,
                    scale, numbers, **switches, PHASE=phase, PARTS=MAX_PARTS, **shape,
                    **compile_options(plan, crowded=True),
                )  # fmt: skip
        elif loss in ("binary_kl", "binary_kl_norm"):
            of_parts = rows if plan.parts == 1 else rows.new_empty(rows.shape[0], plan.parts)
            pointwise_rows[blocks, plan.parts, len(students)](
                *logits, weight, of_parts, to_gradient, values,
                count, inner_rows, plan.parts, classes, *strides, weight_stride, gradient_stride,
                scale, numbers, FORMULA=getattr(formulas, loss), **switches, **shape,
                **compile_options(plan),
            )  # fmt: skip
            if plan.parts > 1:
                torch.sum(of_parts, 1, out=rows)
        else:
            label = target if loss in ("softmax", "nkd") else None
            needs = needs_of(loss, options, label is not None)
            crowded = bool(needs & (statistics.STANDARDIZED.value | statistics.PLAIN.value))
            moments = partials(rows, plan, 2 * statistics.MOMENTS_WIDTH.value)
            sums = partials(rows, plan, statistics.WIDTH.value)
            for phase in softmax_phases(plan, needs):
                softmax_rows.softmax_rows[grid](
                    *logits, student if label is None else label, weight, rows,
                    rows if terms is None else terms, to_gradient, moments, sums, values,
                    count, inner_rows, blocks, plan.parts, classes, *strides,
                    0 if label is None else label.stride(0), weight_stride, gradient_stride,
                    scale, numbers, FORMULA=getattr(formulas, loss), NEEDS=needs, **switches,
                    TERMS=terms is not None, PHASE=phase, ONE_TILE=plan.one_tile, PARTS=MAX_PARTS, **shape,
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


def softmax_phases(plan: Plan, needs: int) -> list[int]:
    """The launches: one, or where a row is shared by programs one for each time that its parts meet."""
    if plan.parts == 1:
        return [softmax_rows.WHOLE.value]
    moments = [softmax_rows.MOMENTS.value] if needs & statistics.STANDARDIZED.value else []
    return [*moments, softmax_rows.STATISTICS.value, softmax_rows.GRADIENT.value]


def mixture_phases(plan: Plan) -> list[int]:
    if plan.parts == 1:
        return [softmax_rows.WHOLE.value]
    return [softmax_rows.STATISTICS.value, mixture_rows.MIXTURE.value, softmax_rows.GRADIENT.value]


def kernel_numbers(loss: str, options: Sequence[float]) -> tuple[tuple[float, ...], int]:
    """The seven numbers that a kernel takes, and how many of them it may read from memory instead.

    ``standardized`` is a switch and not among them; those behind it, and TTM's ``weighted``, are too.
    """
    values = [*options[:6], *options[7:]] if loss == "softmax" else list(options)
    in_memory = {"softmax": 6, "ttm": 1}.get(loss, len(values))
    return tuple(float(value) for value in values + [0.0] * (7 - len(values))), in_memory


def needs_of(loss: str, options: Sequence[float], labelled: bool) -> int:
    """Bits of ``statistics``: what a loss needs of the kernels, as ``needs_of`` of csrc/row_formulas.h."""
    needs = statistics.LABELLED.value if labelled else 0
    match loss:
        case "softmax":
            temperature, w_ce, w_kd, w_t, w_n, smoothing, standardized, *_ = options
            distils = any((w_kd, w_t, w_n))
            standardizes = bool(standardized) and distils
            if distils:
                needs |= statistics.DISTILS.value
            if w_ce:
                needs |= statistics.CROSS_ENTROPY.value
            # At T = 1 the exponentials of the cross-entropy are the student's own.
            if w_ce and (temperature != 1.0 or standardizes):
                needs |= statistics.PLAIN.value
            if smoothing:
                needs |= statistics.SMOOTHED.value
            if standardizes:
                needs |= statistics.OWN_SLOPES.value | statistics.STANDARDIZED.value
        case "nkd":
            needs |= statistics.DISTILS.value | statistics.CROSS.value
            if options[0] != 1.0:
                needs |= statistics.PLAIN.value | statistics.PLAIN_TEACHER.value
        case "ttm":
            needs |= statistics.DISTILS.value | statistics.OWN_SLOPES.value | statistics.PLAIN_TEACHER.value
        case "reverse_kl":
            needs |= statistics.DISTILS.value | statistics.TILT.value
    return needs


def scale_rows_(gradient: Tensor, factor: Tensor) -> None:
    """``gradient[n] *= factor[n]`` in place; rows whose factor is 1 are not touched."""
    count, classes = gradient.shape
    device = device_of(gradient.device)
    plan = plan_rows("scale", count, classes, gradient.element_size(), device)
    vector = common_vector(classes, gradient.stride(0))
    with on_device(gradient):
        scale_rows[count, plan.parts](
            gradient, factor, classes, gradient.stride(0), factor.stride(0), plan.parts,
            TILE=plan.tile, VECTOR=vector, **compile_options(plan),
        )  # fmt: skip
