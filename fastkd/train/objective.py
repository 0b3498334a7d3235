"""The loss section of a recipe as a module ``(student_logits, teacher_logits, target) -> (loss, terms)``."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fastkd.losses import BinaryKLLoss, BinaryKLNormLoss, DistillLoss

from .recipe import BinaryKL, BinaryKLNorm, CrossEntropy, Distill


def build_objective(config: CrossEntropy | Distill | BinaryKL | BinaryKLNorm) -> nn.Module:
    """The loss that ``config`` describes."""
    if isinstance(config, CrossEntropy):
        return CrossEntropyObjective(config.label_smoothing)
    if isinstance(config, Distill):
        return DistillLoss(**config.model_dump(exclude={"name"}))
    pointwise = BinaryKLLoss if isinstance(config, BinaryKL) else BinaryKLNormLoss
    return PointwiseObjective(
        config.name, pointwise(temperature=config.temperature), config.ce_weight, config.weight
    )


class CrossEntropyObjective(nn.Module):
    """Cross-entropy with the labels; the teacher, if any, is not used."""

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(
        self, student_logits: Tensor, teacher_logits: Any, target: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss = F.cross_entropy(student_logits.float(), target, label_smoothing=self.label_smoothing)
        return loss, {"ce": loss.detach()}


class PointwiseObjective(nn.Module):
    """``ce_weight`` cross-entropy plus ``weight`` times a loss of student and teacher logits, on one head."""

    def __init__(self, name: str, loss: nn.Module, ce_weight: float, weight: float) -> None:
        super().__init__()
        self.name = name
        self.loss = loss
        self.ce_weight = ce_weight
        self.weight = weight

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        distillation = self.loss(student_logits, teacher_logits)
        loss = self.weight * distillation
        terms = {}
        if self.ce_weight:
            cross_entropy = F.cross_entropy(student_logits.float(), target)
            terms["ce"] = cross_entropy.detach()
            loss = loss + self.ce_weight * cross_entropy
        return loss, {**terms, self.name: distillation.detach()}
