"""The exponential moving average of a student's weights, by torch's AveragedModel."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .preflight import cannot_be_averaged


def make_ema(student: nn.Module, decay: float) -> AveragedModel:
    """An average of weights and buffers: decay x average + (1 - decay) x student at each update.

    Raises ``ValueError`` for a student that cannot be copied.
    """
    try:
        average = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    except Exception as error:  # layers can raise anything when they are copied
        raise cannot_be_averaged(student, error) from error
    average.requires_grad_(False)
    # Every update reads it; on a GPU that would make the host wait.
    average.n_averaged = torch.zeros((), dtype=torch.long)
    return average
