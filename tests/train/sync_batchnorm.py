"""Batch normalisation over the batch of all ranks on CPUs, for tests: torch has it for GPUs only."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastkd.train import distributed


def synchronised(module: nn.Module) -> nn.Module:
    """``module`` with the statistics of every BatchNorm taken over all ranks; unchanged with one rank."""
    if distributed.world() > 1:
        for layer in module.modules():
            for plain, synchronised_class in _SYNCHRONISED.items():
                if isinstance(layer, plain):
                    layer.__class__ = synchronised_class
    return module


class _SumOfRanks(torch.autograd.Function):
    """A sum that all ranks use, so each summand's gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values)
        return values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient


def _sum_of_ranks(values: Tensor) -> Tensor:
    return _SumOfRanks.apply(values)


class _Synchronised(nn.modules.batchnorm._BatchNorm):
    """Uses the sums, squared sums and counts of all ranks in train mode."""

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized():
            return super().forward(inputs)
        self._check_input_dim(inputs)
        over = [0, *range(2, inputs.dim())]
        values = inputs.float()
        count = torch.full((1,), values.numel() / values.shape[1], device=values.device)
        # Differentiable: a rank's inputs affect the statistics of the others.
        total = _sum_of_ranks(torch.cat([values.sum(over), count]))
        count, mean = total[-1:].detach(), total[:-1] / total[-1].detach()
        centred = values - self._shaped(mean, values)
        variance = _sum_of_ranks(centred.square().sum(over)) / count
        normalised = centred * self._shaped((variance + self.eps).rsqrt(), values)
        if self.affine:
            normalised = normalised * self._shaped(self.weight, values) + self._shaped(self.bias, values)
        self._track(mean.detach(), variance.detach(), count)
        return normalised.to(inputs.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance * (count / (count - 1)), share)

    @staticmethod
    def _shaped(values: Tensor, like: Tensor) -> Tensor:
        return values.view(1, -1, *[1] * (like.dim() - 2))


class _Synchronised1d(_Synchronised, nn.BatchNorm1d): ...


class _Synchronised2d(_Synchronised, nn.BatchNorm2d): ...


_SYNCHRONISED: dict[type, type] = {nn.BatchNorm1d: _Synchronised1d, nn.BatchNorm2d: _Synchronised2d}
