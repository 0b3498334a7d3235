"""Teachers that do not run: their outputs come with the batch, and they make logits of them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from fastkd.losses.forms import Form, LinearLogits, TopKLogits
from fastkd.ops.spec import LOSSES


def temperature_at_k(loss: str, *options: float) -> float:
    """The temperature at which a loss of ``ops.spec`` reads a teacher known at K classes.

    Raises ``ValueError`` with the reason if it is not defined for such a teacher.
    """
    spec = LOSSES[loss]
    named = spec.options(*options)
    reason = spec.undefined_at_k(named)
    if reason is not None:
        raise ValueError(f"it is not defined for a teacher known at K classes {reason}")
    return spec.temperatures(named)[1]


class GivenTeacher(nn.Module, ABC):
    """The entries of a batch after the target are this teacher's outputs, one row per image."""

    @abstractmethod
    def logits(self, *outputs: Tensor) -> Form:
        """The logits that ``outputs`` stand for, without gradient."""

    @abstractmethod
    def example(self, target: Tensor) -> tuple[Tensor, ...]:
        """Valid outputs for as many rows, to try a training step."""

    def forward(self, inputs: Tensor) -> Tensor:
        raise RuntimeError(f"{type(self).__name__} does not run: its outputs come with the batch")


class GivenLogits(GivenTeacher):
    """The batch has logits ``[N, C]``."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    def logits(self, *outputs: Tensor) -> Tensor:
        (logits,) = outputs
        return logits

    def example(self, target: Tensor) -> tuple[Tensor, ...]:
        return (torch.zeros(len(target), self.num_classes, device=target.device),)


class GivenTopK(GivenTeacher):
    """The batch has the tensors of ``TopKLogits``: log_probs and classes ``[N, K]``, log_rest ``[N]``."""

    def __init__(self, num_classes: int, k: int, temperature: float) -> None:
        super().__init__()
        self.num_classes, self.k, self.temperature = num_classes, k, temperature

    def logits(self, *outputs: Tensor) -> TopKLogits:
        return TopKLogits(*outputs, num_classes=self.num_classes, temperature=self.temperature)

    def example(self, target: Tensor) -> tuple[Tensor, ...]:
        first = target.argmax(1) if target.is_floating_point() else target
        places = torch.arange(self.k, device=target.device)
        classes = (first[:, None] + places).remainder(self.num_classes)
        even = torch.full(classes.shape, -math.log(self.num_classes), device=target.device)
        rest = math.log(1 - self.k / self.num_classes) if self.k < self.num_classes else -math.inf
        return even, classes.sort(1).values, torch.full_like(even[:, 0], rest)


class GivenFeatures(GivenTeacher):
    """The batch has the inputs ``[N, H]`` of the teacher's last linear layer, which this module has."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        # Buffers: the method moves them to its device.
        self.register_buffer("weight", weight.detach())
        self.register_buffer("bias", None if bias is None else bias.detach())

    def logits(self, *outputs: Tensor) -> LinearLogits:
        (features,) = outputs
        return LinearLogits(features.to(self.weight.dtype), self.weight, self.bias).detach()

    def example(self, target: Tensor) -> tuple[Tensor, ...]:
        return (torch.zeros(len(target), self.weight.shape[1], device=target.device),)
