"""timm's logit distillation task with fastkd's loss; needs ``timm>=1.0.27``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fastkd

try:
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.task import LogitDistillationTask as _TimmTask
except ImportError as error:
    raise ImportError(
        "fastkd.integrations.timm needs timm's training tasks: pip install 'timm>=1.0.27'"
    ) from error


class LogitDistillationTask(_TimmTask):
    """``timm.task.LogitDistillationTask``, same arguments and same loss, in one pass over the logits.

    loss = task_loss_weight criterion(z_s, y) + distill_loss_weight T^2 KL(softmax(z_t/T) || softmax(z_s/T)).
    With ``torch.nn.CrossEntropyLoss`` (mean, no class weights) or timm's ``LabelSmoothingCrossEntropy`` on
    class labels, both terms and their gradient are one kernel; ``"task_loss"`` and ``"kd_loss"`` of the
    result are detached then, for logging. Any other criterion is called as it is.
    """

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        student_logits = self.trainable_module(input)
        with torch.no_grad():
            teacher_logits = self.teacher(
                self.teacher.normalize_input(input, self.student_mean, self.student_std)
            )
        smoothing = _label_smoothing(self.criterion, target)
        if smoothing is None or not self.task_loss_weight or not self.distill_loss_weight:
            task_loss = self.criterion(student_logits, target)
            kd_loss = fastkd.kd_loss(student_logits, teacher_logits, temperature=self.temperature)
            loss = self.task_loss_weight * task_loss + self.distill_loss_weight * kd_loss
        else:
            loss, terms = fastkd.distill_loss(
                student_logits,
                teacher_logits,
                target,
                ce_weight=self.task_loss_weight,
                kd_weight=self.distill_loss_weight,
                temperature=self.temperature,
                label_smoothing=smoothing,
            )
            task_loss, kd_loss = terms["ce"], terms["kd"]
        return {"loss": loss, "output": student_logits, "task_loss": task_loss, "kd_loss": kd_loss}


def _label_smoothing(criterion: Any, target: Tensor) -> float | None:
    """The smoothing of a criterion that ``distill_loss`` computes itself; None for any other."""
    if target.dim() != 1 or target.dtype != torch.int64:
        return None
    if type(criterion) is LabelSmoothingCrossEntropy:
        return criterion.smoothing
    plain = type(criterion) is nn.CrossEntropyLoss and criterion.weight is None
    if plain and criterion.reduction == "mean" and criterion.ignore_index == -100:
        return criterion.label_smoothing
    return None
