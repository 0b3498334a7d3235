"""Layers that several networks use."""

from __future__ import annotations

from torch import Tensor, nn


def conv(channels_in: int, channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution without bias that keeps the size at stride 1."""
    return nn.Conv2d(
        channels_in, channels, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False
    )


def conv_bn(
    channels_in: int, channels: int, kernel: int, stride: int = 1, groups: int = 1, relu: bool = True
) -> nn.Sequential:
    layers: list[nn.Module] = [
        conv(channels_in, channels, kernel, stride, groups),
        nn.BatchNorm2d(channels),
    ]
    return nn.Sequential(*layers, nn.ReLU(inplace=True)) if relu else nn.Sequential(*layers)


def shuffle(x: Tensor, groups: int) -> Tensor:
    """Interleave the channels of ``groups`` groups."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


def he_init(model: nn.Module, linear_std: float | None = None) -> None:
    """Convolutions normal with variance 2 / (kernel area x output channels), as in He et al. 2015."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            # Counts all output channels even in grouped convolutions, like the papers' code.
            deviation = (2 / (module.kernel_size[0] * module.kernel_size[1] * module.out_channels)) ** 0.5
            nn.init.normal_(module.weight, 0.0, deviation)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear) and linear_std is not None:
            nn.init.normal_(module.weight, 0.0, linear_std)
            nn.init.zeros_(module.bias)
