"""Launches of the Triton kernels: which tile, which compile-time switches, which pointers."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from fastkd.ops.plan import plan_rows
from fastkd.ops.triton import formulas, kernels

# A fused multiply-add would leave a rounding error where two equal products must cancel to 0.
# Triton's default changes between versions.
_EXACT_PRODUCTS = {"enable_fp_fusion": False}


def _on_device(tensor: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def row_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    row_weight: Tensor | None,
    scale: float,
    loss: str,
    options: Sequence[float],
    rows: Tensor,
    terms: Tensor,
    gradient: Tensor,
) -> None:
    """Fills ``rows``, ``terms`` and ``gradient`` (an empty one is not computed); see ``ops.library``."""
    with _on_device(student):
        if loss == "softmax":
            _softmax(student, teacher, target, row_weight, scale, options, rows, terms, gradient)
        else:
            _pointwise(student, teacher, row_weight, scale, loss, options[0], rows, gradient)


def _softmax(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    row_weight: Tensor | None,
    scale: float,
    options: Sequence[float],
    rows: Tensor,
    terms: Tensor,
    gradient: Tensor,
) -> None:
    count, classes = student.shape
    temperature, w_ce, w_kd, w_t, w_n, smoothing, standardized = options
    plan = plan_rows(classes)
    distils = any((w_kd, w_t, w_n))
    standardizes = bool(standardized) and distils
    kernels.softmax_rows[(count,)](
        student,
        teacher,
        student if target is None else target,
        rows if row_weight is None else row_weight,
        rows,
        terms,
        gradient,
        count,
        classes,
        student.stride(0),
        teacher.stride(0),
        0 if target is None else target.stride(0),
        gradient.stride(0),
        scale,
        temperature,
        w_ce,
        w_kd,
        w_t,
        w_n,
        smoothing,
        LABELLED=target is not None,
        WEIGHTED=row_weight is not None,
        TERMS=terms.shape[0] > 0,
        GRADIENT=gradient.shape[0] > 0,
        DISTILS=distils,
        CROSS_ENTROPY=w_ce != 0,
        PLAIN=w_ce != 0 and (temperature != 1.0 or standardizes),
        SMOOTHED=smoothing != 0,
        STANDARDIZED=standardizes,
        TILE=plan.tile,
        ONE_TILE=plan.one_tile,
        num_warps=plan.warps,
        **_EXACT_PRODUCTS,
    )


def _pointwise(
    student: Tensor,
    teacher: Tensor,
    row_weight: Tensor | None,
    scale: float,
    loss: str,
    temperature: float,
    rows: Tensor,
    gradient: Tensor,
) -> None:
    count, classes = student.shape
    plan = plan_rows(min(classes, 4096))
    kernels.pointwise_rows[(count,)](
        student,
        teacher,
        rows if row_weight is None else row_weight,
        rows,
        gradient,
        classes,
        student.stride(0),
        teacher.stride(0),
        gradient.stride(0),
        scale,
        temperature,
        temperature * (0.5 if loss == "binary_kl_norm" else 1.0),
        FORMULA=getattr(formulas, loss),
        WEIGHTED=row_weight is not None,
        GRADIENT=gradient.shape[0] > 0,
        TILE=plan.tile,
        num_warps=plan.warps,
        **_EXACT_PRODUCTS,
    )


def scale_rows_(gradient: Tensor, upstream: Tensor) -> None:
    """``gradient[n] *= upstream[n]`` in place; rows whose factor is 1 are not touched."""
    count, classes = gradient.shape
    plan = plan_rows(min(classes, 4096))
    with _on_device(gradient):
        kernels.scale_rows[(count,)](
            gradient,
            upstream,
            classes,
            gradient.stride(0),
            upstream.stride(0),
            TILE=plan.tile,
            num_warps=plan.warps,
        )
