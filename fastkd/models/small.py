"""A small convolutional network for small images of any size, such as Fashion-MNIST's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .layers import conv_bn


class SmallCNN(nn.Module):
    """Three stages of two 3x3 convolutions, at 1, 2, 4 times ``width``, each halving the size; then ``fc``.

    Layers to tap: ``stages.0`` to ``stages.2``.
    """

    def __init__(self, num_classes: int, *, width: int, channels: int = 1) -> None:
        super().__init__()
        self.stages = nn.Sequential()
        for scale in (1, 2, 4):
            self.stages.append(
                nn.Sequential(
                    conv_bn(channels, scale * width, 3, 2), conv_bn(scale * width, scale * width, 3)
                )
            )
            channels = scale * width
        self.fc = nn.Linear(channels, num_classes)
        self.to(memory_format=torch.channels_last)  # faster on CPUs and on tensor cores

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.stages(images).mean((2, 3)))
