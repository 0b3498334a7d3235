"""A small convolutional network for images of any size, such as Fashion-MNIST's."""

from __future__ import annotations

from torch import Tensor, nn

from .layers import conv_bn


class SmallCNN(nn.Module):
    """Three stages of two 3x3 convolutions, at 1, 2 and 4 times ``width``, pooled between; then ``fc``."""

    def __init__(self, num_classes: int, *, width: int, channels: int = 1) -> None:
        super().__init__()
        self.stages = nn.Sequential()
        for scale in (1, 2, 4):
            stage = nn.Sequential() if scale == 1 else nn.Sequential(nn.MaxPool2d(2))
            stage.extend([conv_bn(channels, scale * width, 3), conv_bn(scale * width, scale * width, 3)])
            self.stages.append(stage)
            channels = scale * width
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.stages(images).mean((2, 3)))
