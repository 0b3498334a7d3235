"""The exponential moving average of a student's weights, by torch's AveragedModel."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .preflight import cannot_be_averaged

Tensors = tuple[Tensor, ...] | list[Tensor]


def make_ema(student: nn.Module, decay: float) -> AveragedModel:
    """An average of weights and buffers: decay x average + (1 - decay) x student at each update.

    Buffers that are no floating-point numbers are the student's.

    Raises ``ValueError`` for a student that cannot be copied.
    """
    mean = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(averages: Tensors, values: Tensors, count: Tensor | int) -> None:
        if averages[0].is_floating_point() or averages[0].is_complex():
            mean(averages, values, count)
            return
        # Torch would take the mean of whole numbers too, and truncate it: tables of indices would change.
        for average, value in zip(averages, values, strict=True):
            average.copy_(value)

    try:
        average = AveragedModel(student, multi_avg_fn=update, use_buffers=True)
        average.requires_grad_(False)
    except Exception as error:  # layers can raise anything when they are copied
        raise cannot_be_averaged(student, error) from error
    # Every update reads it; on a GPU that would make the host wait.
    average.n_averaged = torch.zeros((), dtype=torch.long)
    return average
