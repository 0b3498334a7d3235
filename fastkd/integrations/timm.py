"""timm's logit distillation task with fastkd's loss; needs ``timm>=1.0.27``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fastkd
from fastkd.integrations.arguments import check_tensors, cross_entropy_and_kd, named

try:
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.task import LogitDistillationTask as _TimmTask
except ImportError as error:
    raise ImportError(
        "fastkd.integrations.timm needs timm's training tasks: pip install 'timm>=1.0.27'"
    ) from error

NAMES = {"student_logits": "the student's output", "teacher_logits": "the teacher's output"}


class LogitDistillationTask(_TimmTask):  # type: ignore[misc]  # timm is not typed
    """``timm.task.LogitDistillationTask``, same arguments and same loss, in one pass over the logits.

    loss = task_loss_weight criterion(z_s, y) + distill_loss_weight T^2 KL(softmax(z_t/T) || softmax(z_s/T)).
    With ``torch.nn.CrossEntropyLoss`` (mean, no class weights) or timm's ``LabelSmoothingCrossEntropy`` on
    class labels, both terms and their gradient are one kernel; ``"task_loss"`` and ``"kd_loss"`` of the
    result are detached then, for logging. As in timm, a target that torch's criterion ignores is excluded
    only from the mean of the criterion; targets on a GPU are not read back for that, so with that criterion
    the terms take one pass each there. Any other criterion is called unchanged. Both models return logits
    [batch, C].
    """

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        student_logits = self.trainable_module(input)
        with torch.no_grad():
            teacher_logits = self.teacher(
                self.teacher.normalize_input(input, self.student_mean, self.student_std)
            )
        check_tensors(**{"the student's output": student_logits, "the teacher's output": teacher_logits})
        if student_logits.dim() != 2:
            raise ValueError(
                f"the student's output has shape {list(student_logits.shape)}; expected [batch, C]"
            )
        smoothing = _label_smoothing(self.criterion, target)
        if smoothing is None or not self.task_loss_weight or not self.distill_loss_weight:
            task_loss = self.criterion(student_logits, target)
            kd_loss = named(
                NAMES, fastkd.kd_loss, student_logits, teacher_logits, temperature=self.temperature
            )
            loss = self.task_loss_weight * task_loss + self.distill_loss_weight * kd_loss
        else:
            # timm's own criterion has no label to ignore.
            plain = type(self.criterion) is nn.CrossEntropyLoss
            loss, terms = named(
                NAMES,
                cross_entropy_and_kd,
                student_logits,
                teacher_logits,
                target,
                ce_weight=self.task_loss_weight,
                kd_weight=self.distill_loss_weight,
                temperature=self.temperature,
                label_smoothing=smoothing,
                ignore_index=self.criterion.ignore_index if plain else None,
            )
            task_loss, kd_loss = terms["ce"], terms["kd"]
        return {"loss": loss, "output": student_logits, "task_loss": task_loss, "kd_loss": kd_loss}


def _label_smoothing(criterion: Any, target: Tensor) -> float | None:
    """Return the smoothing of a criterion that ``distill_loss`` can compute, or None for any other."""
    if target.dim() != 1 or target.dtype != torch.int64:
        return None
    smoothing: float | None = None
    if type(criterion) is LabelSmoothingCrossEntropy:
        smoothing = criterion.smoothing
    elif (
        type(criterion) is nn.CrossEntropyLoss and criterion.weight is None and criterion.reduction == "mean"
    ):
        smoothing = criterion.label_smoothing
    return smoothing
