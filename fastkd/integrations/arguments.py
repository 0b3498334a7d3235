"""Shared by the integrations: errors in the user's own names, and two terms over different rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

import fastkd
from fastkd.losses import arguments
from fastkd.ops.tensors import is_readable

Result = TypeVar("Result")
NO_LABEL = torch.iinfo(torch.int64).min  # as ignore_index: nothing is ignored


def named(
    names: Mapping[str, str], function: Callable[..., Result], *arguments: Any, **options: Any
) -> Result:
    """Call ``function(*arguments, **options)``; its errors use the user's names of the arguments.

    ``names`` maps fastkd's names to those of the replaced interface.
    """
    try:
        return function(*arguments, **options)
    except (TypeError, ValueError) as error:
        pattern = r"\b(" + "|".join(map(re.escape, names)) + r")\b"
        raise type(error)(re.sub(pattern, lambda match: names[match[0]], str(error))) from error


def check_tensors(**tensors: Tensor) -> None:
    """Raise TypeError for what is no tensor, before its shape is used."""
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}; expected a tensor of logits")


def valid_rows(name: str, labels: Tensor, ignore_index: int, student_logits: Tensor) -> Tensor:
    """Return which rows are not labelled ``ignore_index``; errors call the labels ``name``."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name} is a {type(labels).__name__}; expected a tensor of integer labels")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"{name} has dtype {labels.dtype}; expected integer labels")
    arguments.check_one_per_row(name, labels, "label", student_logits, "student_logits")
    return labels != ignore_index


def cross_entropy_and_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    ce_weight: float,
    kd_weight: float,
    temperature: float,
    label_smoothing: float = 0.0,
    standardize: bool = False,
    ignore_index: int | None = -100,
    reduction: str = "batchmean",
) -> tuple[Tensor, dict[str, Tensor]]:
    """``fastkd.distill_loss``, reduced like ``CrossEntropyLoss`` and ``KLDivLoss`` side by side.

    Logits are [N, ..., C]. With "batchmean", CE is divided by the rows not labelled ``ignore_index``, and KD
    of all rows by N. Both take one pass if ``ignore_index`` is None or if the labels, on the CPU, show that
    none is ignored; otherwise, and if reading the labels would wait for the device, one pass each. Returns
    the loss and, detached, both terms.
    """
    if not isinstance(target, Tensor):
        raise TypeError(f"target is a {type(target).__name__}; expected an int64 tensor of labels")
    rows_a_sample = student_logits.shape[1:-1].numel() if reduction == "batchmean" else 1
    none_ignored = ignore_index is None
    ignored = NO_LABEL if ignore_index is None else ignore_index
    labels = target.shape == student_logits.shape[:-1] and target.dtype == torch.int64
    if labels and is_readable(target):
        none_ignored = arguments.check_labels(target, student_logits.shape[-1], ignored)
    soft: dict[str, Any] = {"temperature": temperature, "standardize": standardize}
    hard: dict[str, Any] = {
        "label_smoothing": label_smoothing,
        "ignore_index": ignored,
        "reduction": reduction,
    }
    if none_ignored:
        loss, terms = fastkd.distill_loss(
            student_logits, teacher_logits, target,
            ce_weight=ce_weight, kd_weight=kd_weight * rows_a_sample, **soft, **hard,
        )  # fmt: skip
        return loss, {name: term * rows_a_sample if name == "kd" else term for name, term in terms.items()}
    cross_entropy, _ = fastkd.distill_loss(student_logits, teacher_logits, target, ce_weight=1.0, **hard)
    kd = fastkd.kd_loss(student_logits, teacher_logits, reduction=reduction, **soft) * rows_a_sample
    terms = {"ce": cross_entropy.detach(), "kd": kd.detach()}
    return ce_weight * cross_entropy + kd_weight * kd, terms
