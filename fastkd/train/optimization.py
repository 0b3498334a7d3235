"""torch's optimizers and learning-rate schedules, as recipes name them."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import lr_scheduler

from fastkd.distill import Method
from fastkd.recipe.sections import Optimization

# Fused: one kernel over all parameters. Unfused, a large linear layer makes it a tenth of a CPU step.
_FUSED_ON = ("cpu", "cuda", "mps", "xpu")


def build_optimizer(method: Method, config: Optimization) -> torch.optim.Optimizer:
    """The optimizer of everything that the method trains."""
    parameters = [parameter for parameter in method.parameters() if parameter.requires_grad]
    fused = all(parameter.device.type in _FUSED_ON for parameter in parameters)
    options: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": fused}
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=config.momentum, **options)
    return torch.optim.AdamW(parameters, **options)


def build_scheduler(optimizer: torch.optim.Optimizer, config: Optimization, batches: int) -> Any:
    """The scheduler, stepped after each of ``batches`` steps per epoch; None for a constant learning rate.

    A warm-up multiplies the schedule, which counts from the first step, so it does not shift milestones.
    """
    steps = batches * config.epochs
    if config.schedule == "one_cycle":
        # By default it would replace SGD's momentum, as it does AdamW's beta1 (0.95 to 0.85 and back).
        cycle_momentum = config.optimizer != "sgd"
        return lr_scheduler.OneCycleLR(optimizer, config.lr, steps, cycle_momentum=cycle_momentum)
    schedulers: list[lr_scheduler.LRScheduler] = []
    # Starts above 0, so that the first step has an effect.
    warmup = round(batches * config.warmup_epochs)
    if warmup:
        schedulers.append(lr_scheduler.LinearLR(optimizer, 1 / (warmup + 1), total_iters=warmup))
    if config.schedule == "cosine":
        schedulers.append(lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps))
    elif config.schedule == "steps":
        milestones = [batches * epoch for epoch in config.milestones]
        schedulers.append(lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1))
    if len(schedulers) > 1:
        return lr_scheduler.ChainedScheduler(schedulers, optimizer)
    return schedulers[0] if schedulers else None
