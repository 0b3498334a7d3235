"""The loss of TRL's GKD trainer on fastkd's kernels; needs no package.

from trl.experimental.gkd import GKDTrainer
from fastkd.integrations.trl import generalized_jsd_loss
GKDTrainer.generalized_jsd_loss = staticmethod(generalized_jsd_loss)
"""

from __future__ import annotations

from torch import Tensor

from fastkd.integrations.arguments import check_tensors
from fastkd.integrations.liger import masked_jsd

IGNORE_INDEX = -100


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: Tensor | int | None = None,
    *,
    logits_are_probs: bool = False,
) -> Tensor:
    """``GKDTrainer.generalized_jsd_loss`` of TRL 1.16: same arguments, same value, no T^2.

    Of the reductions "batchmean", which the trainer uses, and "sum"; TRL's "mean", which divides by the
    classes too, and its one value per class are refused.

    Logits [batch, length, C], ``labels`` [batch, length] with -100 for ignored tokens. "batchmean"
    divides by the non-ignored tokens, or without labels by the batch (not by its tokens); "sum" by nothing;
    ``num_items_in_batch``, if given, is the divisor instead. ``logits_are_probs`` is an argument of older
    versions.
    """
    check_tensors(student_logits=student_logits, teacher_logits=teacher_logits)
    if logits_are_probs:
        raise ValueError("logits_are_probs is True; fastkd takes logits, and applies the softmax itself")
    if reduction not in ("batchmean", "sum"):
        raise ValueError(f"reduction is {reduction!r}; expected 'batchmean' or 'sum'")
    if isinstance(num_items_in_batch, bool) or not isinstance(
        num_items_in_batch, Tensor | int | float | None
    ):
        raise TypeError(f"num_items_in_batch is {num_items_in_batch!r}; expected a number of tokens or None")
    divisor: Tensor | float | None = num_items_in_batch
    if divisor is None and reduction == "sum":
        divisor = 1.0
    elif divisor is None and labels is None:
        divisor = max(student_logits.shape[0], 1)
    if isinstance(divisor, Tensor):
        divisor = divisor.to(student_logits.device)
    return masked_jsd(
        student_logits,
        teacher_logits,
        "labels",
        labels,
        ignore_index=IGNORE_INDEX,
        divisor=divisor,
        beta=beta,
        temperature=temperature,
    )
