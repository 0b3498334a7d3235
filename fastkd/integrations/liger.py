"""Losses by Liger-Kernel's and torch's names and conventions that take logits; needs no package.

The softmax before Liger's kernels and before ``torch.nn.KLDivLoss`` is part of the loss here: pass raw logits
of both models, and delete the ``log_softmax`` and ``softmax``. (Log-probabilities work too, because
log_softmax does not change them; probabilities would be wrong.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fastkd
from fastkd.integrations.arguments import check_tensors, named, valid_rows
from fastkd.losses import arguments

REDUCTIONS = ("batchmean", "sum", "mean")


class KLDivLoss(nn.Module):
    """``torch.nn.KLDivLoss`` and ``LigerKLDIVLoss`` on logits [..., C]: KL of the two softmax at T.

    The value is theirs for log_softmax(z_s / T) and softmax(z_t / T), so **without T^2**. ``reduction`` is
    theirs too: "batchmean" divides by the size of the first dimension, "sum" by nothing, and "mean", their
    default, by the number of all elements including classes: with C classes the loss is C times weaker.
    "none" would be one value per element, which no fused loss has. Name it in calls: the first argument is
    torch's ``size_average`` and Liger's ``eps``, so that ``torch.nn.KLDivLoss("batchmean")`` is "mean".
    """

    def __init__(self, reduction: str = "mean", *, temperature: float = 1.0) -> None:
        super().__init__()
        if reduction not in REDUCTIONS:
            raise ValueError(
                f"reduction is {reduction!r}; expected one of {', '.join(REDUCTIONS)}. fastkd.kd_loss has "
                "'none': one value per row"
            )
        arguments.check_temperature(temperature)
        self.reduction = reduction
        self.temperature = float(temperature)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        check_tensors(student_logits=student_logits, teacher_logits=teacher_logits)
        # A generalised JSD of beta 0 is the forward KL, without T^2.
        value = fastkd.jsd_loss(
            student_logits, teacher_logits, beta=0.0, temperature=self.temperature, reduction="sum"
        )
        if self.reduction == "sum":
            return value
        return value / (student_logits.shape[0] if self.reduction == "batchmean" else student_logits.numel())

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}, temperature={self.temperature}"


class JSD(nn.Module):
    """``LigerJSD`` on logits [..., C]: generalised JSD at T = 1, averaged over the non-ignored rows.

    ``forward(student_logits, teacher_logits, shift_labels=None)``; rows labelled ``ignore_index`` are
    ignored. (``LigerJSD`` itself takes only [N, C].)
    """

    def __init__(self, beta: float = 0.5, ignore_index: int = -100) -> None:
        super().__init__()
        arguments.check_fraction("beta", beta)
        arguments.check_ignore_index(ignore_index)
        self.beta = float(beta)
        self.ignore_index = ignore_index

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, shift_labels: Tensor | None = None
    ) -> Tensor:
        return masked_jsd(
            student_logits,
            teacher_logits,
            "shift_labels",
            shift_labels,
            ignore_index=self.ignore_index,
            beta=self.beta,
        )

    def extra_repr(self) -> str:
        return f"beta={self.beta}, ignore_index={self.ignore_index}"


def masked_jsd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels_name: str,
    labels: Tensor | None,
    *,
    ignore_index: int,
    divisor: Tensor | float | None = None,
    **options: Any,
) -> Tensor:
    """Return the sum of ``fastkd.jsd_loss`` over the rows not labelled ``ignore_index``, over ``divisor``.

    The default divisor is their number (1 if none is left). Errors call the labels ``labels_name``.
    """
    check_tensors(student_logits=student_logits, teacher_logits=teacher_logits)
    weight = None
    rows: Tensor | int = student_logits.shape[:-1].numel()
    if labels is not None:
        valid = valid_rows(labels_name, labels, ignore_index, student_logits)
        weight, rows = valid.to(torch.float32), valid.sum().clamp_min(1)
    names = {"weight": labels_name}  # the weights are made from the labels
    total = named(
        names, fastkd.jsd_loss, student_logits, teacher_logits, weight=weight, reduction="sum", **options
    )
    return total / (rows if divisor is None else divisor)
