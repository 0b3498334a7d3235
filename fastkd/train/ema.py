"""The exponential moving average of a student's weights: torch's AveragedModel, fed without waiting."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .preflight import cannot_be_averaged


def make_ema(student: nn.Module, decay: float) -> AveragedModel:
    """Weights and buffers become decay x average + (1 - decay) x the student's with ``update_parameters``.

    Raises ``ValueError`` for a student that cannot be copied.
    """
    try:
        average = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    except Exception as error:  # what the state of a layer raises when it is copied
        raise cannot_be_averaged(student, error) from error
    average.requires_grad_(False)
    # It is read in every update: on a GPU the host would wait for it.
    average.n_averaged = torch.zeros((), dtype=torch.long)
    return average
