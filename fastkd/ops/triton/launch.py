"""Launches of the Triton kernels: which tile, which compile-time switches, which pointers."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fastkd.ops.plan import MAX_PARTS, Plan, device_of, plan_rows
from fastkd.ops.triton import formulas, mixture_rows, softmax_rows, statistics
from fastkd.ops.triton.pointwise_rows import pointwise_rows, scale_rows


def compile_options(plan: Plan, needs: int = 0, backend: str | None = None) -> dict[str, Any]:
    """How a kernel is compiled, for ``backend`` "cuda" or "hip" (by default torch's)."""
    # A fused multiply-add would leave a rounding error where two equal products must cancel to 0.
    # Triton's default changes between versions.
    options = {"num_warps": plan.warps, "enable_fp_fusion": False}
    backend = backend or ("hip" if torch.version.hip else "cuda")
    # Left to itself NVIDIA's assembler keeps these to 64 registers and spills a few (compile_kernels.py).
    crowded = needs & (statistics.STANDARDIZED.value | statistics.PLAIN.value)
    if backend == "cuda" and plan.warps == 16 and crowded:
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
    """Fills ``rows`` and, where they are given, ``terms`` and ``gradient``; see ``ops.library``."""
    if dynamic is not None:
        options = dynamic.tolist()
    student, teacher = students[0], teachers[0]
    count, classes = student.shape
    pairs = len(students)
    plan = plan_rows(loss, pairs * count, classes, student.element_size(), device_of(student.device))
    blocks = -(-count // plan.rows)
    grid = (min(blocks, plan.programs), plan.parts, pairs)
    logits = (tuple(students), tuple(teachers))
    strides = (student.stride(0), teacher.stride(0))
    # A pointer that is not used still has to be one.
    weight = rows if row_weight is None else row_weight
    to_gradient, gradient_stride = (student, 0) if gradient is None else (gradient, gradient.stride(0))
    shape = {"ROWS": plan.rows, "TILE": plan.tile}
    switches = {"WEIGHTED": row_weight is not None, "WITH_GRADIENT": gradient is not None}
    with on_device(student):
        if loss == "jsd":
            temperature, beta = options
            kl, sums = partials(rows, plan, 2), partials(rows, plan, 12)
            for phase in mixture_phases(plan):
                mixture_rows.jsd_rows[grid](
                    *logits, weight, rows, to_gradient, kl, sums,
                    count, blocks, plan.parts, classes, *strides, gradient_stride,
                    scale, 1.0 / temperature, beta, **switches, PHASE=phase, PARTS=MAX_PARTS, **shape,
                    **compile_options(plan),
                )  # fmt: skip
        elif loss in ("binary_kl", "binary_kl_norm"):
            temperature = options[0]
            of_parts = rows if plan.parts == 1 else rows.new_empty(pairs * count, plan.parts)
            pointwise_rows[blocks, plan.parts, pairs](
                *logits, weight, of_parts, to_gradient, count, plan.parts, classes, *strides, gradient_stride,
                scale, temperature, temperature * (0.5 if loss == "binary_kl_norm" else 1.0),
                FORMULA=getattr(formulas, loss), **switches, **shape, **compile_options(plan),
            )  # fmt: skip
            if plan.parts > 1:
                torch.sum(of_parts, 1, out=rows)
        else:
            label = target if loss in ("softmax", "nkd") else None
            needs = needs_of(loss, options, label is not None)
            moments, sums = partials(rows, plan, 6), partials(rows, plan, 12)
            for phase in softmax_phases(plan, needs):
                softmax_rows.softmax_rows[grid](
                    *logits, student if label is None else label, weight, rows,
                    rows if terms is None else terms, to_gradient,
                    moments, sums, count, blocks, plan.parts, classes, *strides,
                    0 if label is None else label.stride(0), gradient_stride,
                    scale, *slopes(loss, options), kernel_options(loss, options),
                    FORMULA=getattr(formulas, loss), NEEDS=needs, **switches, TERMS=terms is not None,
                    PHASE=phase, ONE_TILE=plan.one_tile, PARTS=MAX_PARTS, **shape,
                    **compile_options(plan, needs),
                )  # fmt: skip


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


def slopes(loss: str, options: Sequence[float]) -> tuple[float, float]:
    """1 / T of student and teacher."""
    return (1.0, options[0]) if loss == "ttm" else (1.0 / options[0],) * 2


def kernel_options(loss: str, options: Sequence[float]) -> tuple[float, ...]:
    """The seven numbers a formula takes; ``standardized`` is a switch and not among them."""
    values = [*options[:6], *options[7:]] if loss == "softmax" else list(options)
    return tuple(values + [0.0] * (7 - len(values)))


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
            needs |= statistics.DISTILS.value | statistics.ENTROPY.value
            if options[0] != 1.0:
                needs |= statistics.PLAIN.value | statistics.PLAIN_TEACHER.value
        case "ttm":
            needs |= statistics.DISTILS.value | statistics.OWN_SLOPES.value | statistics.PLAIN_TEACHER.value
        case "reverse_kl":
            needs |= statistics.DISTILS.value | statistics.TILT.value
    return needs


def scale_rows_(gradient: Tensor, upstream: Tensor) -> None:
    """``gradient[n] *= upstream[n]`` in place; rows whose factor is 1 are not touched."""
    count, classes = gradient.shape
    device = device_of(gradient.device)
    plan = plan_rows("scale", count, classes, gradient.element_size(), device)
    with on_device(gradient):
        scale_rows[count, plan.parts](
            gradient, upstream, classes, gradient.stride(0), upstream.stride(0), plan.parts,
            TILE=plan.tile, **compile_options(plan),
        )  # fmt: skip
