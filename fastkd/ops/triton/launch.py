"""Launches of the Triton kernels: which tile, which compile-time switches, which pointers."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fastkd.ops.plan import plan_rows, plan_tile
from fastkd.ops.triton import formulas
from fastkd.ops.triton.mixture_rows import jsd_rows
from fastkd.ops.triton.pointwise_rows import pointwise_rows, scale_rows
from fastkd.ops.triton.softmax_rows import softmax_rows

# A fused multiply-add would leave a rounding error where two equal products must cancel to 0.
# Triton's default changes between versions.
EXACT_PRODUCTS = {"enable_fp_fusion": False}


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
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
    count, classes = student.shape
    logits = (student, teacher)
    strides = (student.stride(0), teacher.stride(0))
    # A pointer that is not used still has to be one.
    weight = rows if row_weight is None else row_weight
    switches = {"WEIGHTED": row_weight is not None, "GRADIENT": gradient.shape[0] > 0}
    with on_device(student):
        if loss == "jsd":
            temperature, beta = options
            tile, warps = plan_tile(classes)
            jsd_rows[(count,)](
                *logits, weight, rows, gradient, classes, *strides, gradient.stride(0),
                scale, 1.0 / temperature, beta,
                **switches, TILE=tile, num_warps=warps, **EXACT_PRODUCTS,
            )  # fmt: skip
        elif loss in ("binary_kl", "binary_kl_norm"):
            temperature = options[0]
            tile, warps = plan_tile(classes)
            pointwise_rows[(count,)](
                *logits, weight, rows, gradient, classes, *strides, gradient.stride(0),
                scale, temperature, temperature * (0.5 if loss == "binary_kl_norm" else 1.0),
                FORMULA=getattr(formulas, loss),
                **switches, TILE=tile, num_warps=warps, **EXACT_PRODUCTS,
            )  # fmt: skip
        else:
            plan = plan_rows(classes)
            label = target if loss in ("softmax", "nkd") else None
            softmax_rows[(count,)](
                *logits, student if label is None else label, weight, rows, terms, gradient,
                count, classes, *strides, 0 if label is None else label.stride(0), gradient.stride(0),
                scale, *slopes(loss, options), *kernel_options(loss, options),
                **softmax_switches(loss, options), **switches,
                LABELLED=label is not None, TERMS=terms.shape[0] > 0,
                TILE=plan.tile, ONE_TILE=plan.one_tile, num_warps=plan.warps, **EXACT_PRODUCTS,
            )  # fmt: skip


def slopes(loss: str, options: Sequence[float]) -> tuple[float, float]:
    """1 / T of student and teacher."""
    return (1.0, options[0]) if loss == "ttm" else (1.0 / options[0],) * 2


def kernel_options(loss: str, options: Sequence[float]) -> list[float]:
    """The seven numbers a formula takes; ``standardized`` is a switch and not among them."""
    values = [*options[:6], *options[7:]] if loss == "softmax" else list(options)
    return values + [0.0] * (7 - len(values))


def softmax_switches(loss: str, options: Sequence[float]) -> dict[str, Any]:
    """The formula of a loss, and what it needs of the sweeps; ``needs_of`` of csrc/row_formulas.h."""
    switches: dict[str, Any] = dict.fromkeys(
        (
            "CROSS_ENTROPY",
            "PLAIN",
            "PLAIN_TEACHER",
            "ENTROPY",
            "TILT",
            "SMOOTHED",
            "OWN_SLOPES",
            "STANDARDIZED",
        ),
        False,
    )
    switches["FORMULA"] = getattr(formulas, loss)
    switches["DISTILS"] = True
    match loss:
        case "softmax":
            temperature, w_ce, w_kd, w_t, w_n, smoothing, standardized, *_ = options
            distils = any((w_kd, w_t, w_n))
            standardizes = bool(standardized) and distils
            switches |= {
                "DISTILS": distils,
                "CROSS_ENTROPY": w_ce != 0,
                # At T = 1 the exponentials of the cross-entropy are the student's own.
                "PLAIN": w_ce != 0 and (temperature != 1.0 or standardizes),
                "SMOOTHED": smoothing != 0,
                "OWN_SLOPES": standardizes,
                "STANDARDIZED": standardizes,
            }
        case "nkd":
            switches |= {"ENTROPY": True, "PLAIN": options[0] != 1.0, "PLAIN_TEACHER": options[0] != 1.0}
        case "ttm":
            switches |= {"OWN_SLOPES": True, "PLAIN_TEACHER": True}
        case "reverse_kl":
            switches |= {"TILT": True}
    return switches


def scale_rows_(gradient: Tensor, upstream: Tensor) -> None:
    """``gradient[n] *= upstream[n]`` in place; rows whose factor is 1 are not touched."""
    count, classes = gradient.shape
    tile, warps = plan_tile(classes)
    with on_device(gradient):
        scale_rows[(count,)](
            gradient, upstream, classes, gradient.stride(0), upstream.stride(0), TILE=tile, num_warps=warps
        )
