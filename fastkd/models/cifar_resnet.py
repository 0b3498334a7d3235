"""Residual networks for 32x32 images, in the form that CRD's benchmark and mdistiller use."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .layers import conv, conv_bn, he_init


class ResNet(nn.Module):
    """6n + 2 layers: a 3x3 stem, three stages of n basic blocks, global pooling, ``fc`` (He et al. 2015).

    Shortcuts that change the shape are 1x1 convolutions with BatchNorm. ``widths``: stem and stages; (16,
    16, 32, 64), or (32, 64, 128, 256) for the "x4" networks of CRD. Layers to tap: ``layer1``, ``layer2``,
    ``layer3``.
    """

    def __init__(
        self, depth: int, num_classes: int, widths: tuple[int, int, int, int] = (16, 16, 32, 64)
    ) -> None:
        super().__init__()
        if depth % 6 != 2:
            raise ValueError(f"depth is {depth}; expected 6 n + 2")
        blocks = depth // 6
        self.stem = conv_bn(3, widths[0], 3)
        self.layer1 = _stage(BasicBlock, widths[0], widths[1], blocks, 1)
        self.layer2 = _stage(BasicBlock, widths[1], widths[2], blocks, 2)
        self.layer3 = _stage(BasicBlock, widths[2], widths[3], blocks, 2)
        self.fc = nn.Linear(widths[3], num_classes)
        he_init(self)
        self.to(memory_format=torch.channels_last)  # a third faster on CPUs, and faster on tensor cores

    def forward(self, images: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.stem(images))))
        return self.fc(x.mean((2, 3)))


class ResNet50(nn.Module):
    """ResNet-50 with a 3x3 stem and no pooling before the first stage, for 32x32 images."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = conv_bn(3, 64, 3)
        self.layer1 = _stage(Bottleneck, 64, 256, 3, 1)
        self.layer2 = _stage(Bottleneck, 256, 512, 4, 2)
        self.layer3 = _stage(Bottleneck, 512, 1024, 6, 2)
        self.layer4 = _stage(Bottleneck, 1024, 2048, 3, 2)
        self.fc = nn.Linear(2048, num_classes)
        he_init(self)

    def forward(self, images: Tensor) -> Tensor:
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.stem(images)))))
        return self.fc(x.mean((2, 3)))


class WideResNet(nn.Module):
    """WRN-depth-width: 6n + 4 layers, BatchNorm and ReLU before convolutions (Zagoruyko 2016), no dropout."""

    def __init__(self, depth: int, width: int, num_classes: int) -> None:
        super().__init__()
        if depth % 6 != 4:
            raise ValueError(f"depth is {depth}; expected 6 n + 4")
        blocks = (depth - 4) // 6
        self.stem = conv(3, 16, 3)
        self.layer1 = _stage(PreActivationBlock, 16, 16 * width, blocks, 1)
        self.layer2 = _stage(PreActivationBlock, 16 * width, 32 * width, blocks, 2)
        self.layer3 = _stage(PreActivationBlock, 32 * width, 64 * width, blocks, 2)
        self.norm = nn.BatchNorm2d(64 * width)
        self.fc = nn.Linear(64 * width, num_classes)
        he_init(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.stem(images))))
        return self.fc(self.norm(x).relu().mean((2, 3)))


class BasicBlock(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv_bn(channels_in, channels, 3, stride)
        self.conv2 = conv_bn(channels, channels, 3, relu=False)
        self.shortcut = _shortcut(channels_in, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv2(self.conv1(x)) + self.shortcut(x)).relu()


class Bottleneck(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        inner = channels // 4
        self.conv1 = conv_bn(channels_in, inner, 1)
        self.conv2 = conv_bn(inner, inner, 3, stride)
        self.conv3 = conv_bn(inner, channels, 1, relu=False)
        self.shortcut = _shortcut(channels_in, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv3(self.conv2(self.conv1(x))) + self.shortcut(x)).relu()


class PreActivationBlock(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels_in)
        self.conv1 = conv(channels_in, channels, 3, stride)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3)
        self.shortcut = None if channels_in == channels else conv(channels_in, channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        active = self.norm1(x).relu()
        # A shortcut that changes the shape starts after the activation, the others start before it.
        passed = x if self.shortcut is None else self.shortcut(active)
        return passed + self.conv2(self.norm2(self.conv1(active)).relu())


def _shortcut(channels_in: int, channels: int, stride: int) -> nn.Module:
    if stride == 1 and channels_in == channels:
        return nn.Identity()
    return conv_bn(channels_in, channels, 1, stride, relu=False)


def _stage(
    block: type[BasicBlock | Bottleneck | PreActivationBlock],
    channels_in: int,
    channels: int,
    blocks: int,
    stride: int,
) -> nn.Sequential:
    first = block(channels_in, channels, stride)
    return nn.Sequential(first, *(block(channels, channels, 1) for _ in range(blocks - 1)))
