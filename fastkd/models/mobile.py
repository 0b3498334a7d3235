"""MobileNetV2 and ShuffleNets for 32x32 images as in CRD's benchmark, MobileNetV1 for ImageNet."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .layers import conv_bn, he_init, shuffle


class MobileNetV2(nn.Module):
    """Inverted residuals at half width (Sandler et al. 2018), stem and four stages strided: 2x2 at the end.

    The first block expands by 1 with a convolution of its own, unlike torchvision's. Layers to tap:
    ``stages.1``, ``stages.2``, ``stages.4``, ``stages.6``.
    """

    # Expansion, channels at width 1, blocks, stride.
    _STAGES = (
        (1, 16, 1, 1),
        (6, 24, 2, 1),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )

    def __init__(self, num_classes: int, width: float = 0.5) -> None:
        super().__init__()
        channels = int(32 * width)
        self.stem = conv_bn(3, channels, 3, 2)
        self.stages = nn.Sequential()
        for expansion, full, blocks, stride in self._STAGES:
            stage = nn.Sequential()
            for index in range(blocks):
                stage.append(
                    InvertedResidual(channels, int(full * width), stride if index == 0 else 1, expansion)
                )
                channels = int(full * width)
            self.stages.append(stage)
        last = max(1280, int(1280 * width))
        self.last = conv_bn(channels, last, 1)
        self.classifier = nn.Linear(last, num_classes)
        he_init(self, linear_std=0.01)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.last(self.stages(self.stem(images))).mean((2, 3)))


class InvertedResidual(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = expansion * channels_in
        self.adds = stride == 1 and channels_in == channels
        self.layers = nn.Sequential(
            conv_bn(channels_in, inner, 1),
            conv_bn(inner, inner, 3, stride, groups=inner),
            conv_bn(inner, channels, 1, relu=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.adds else self.layers(x)


class ShuffleNetV1(nn.Module):
    """1x1 convolutions in 3 groups with channel shuffles (Zhang et al. 2018), a 1x1 stem at stride 1."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = conv_bn(3, 24, 1)
        self.layer1 = self._stage(24, 240, 4)
        self.layer2 = self._stage(240, 480, 8)
        self.layer3 = self._stage(480, 960, 4)
        self.fc = nn.Linear(960, num_classes)

    @staticmethod
    def _stage(channels_in: int, channels: int, blocks: int) -> nn.Sequential:
        first = ShuffleV1Block(channels_in, channels, 2)
        return nn.Sequential(first, *(ShuffleV1Block(channels, channels, 1) for _ in range(blocks - 1)))

    def forward(self, images: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.stem(images))))
        return self.fc(x.mean((2, 3)))


class ShuffleV1Block(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int, groups: int = 3) -> None:
        super().__init__()
        # In a strided block the pooled shortcut is concatenated and provides channels_in channels.
        made = channels - channels_in if stride == 2 else channels
        inner = made // 4
        self.groups = 1 if channels_in == 24 else groups  # the stem is too narrow for groups
        self.conv1 = conv_bn(channels_in, inner, 1, groups=self.groups)
        self.conv2 = conv_bn(inner, inner, 3, stride, groups=inner)
        self.conv3 = conv_bn(inner, made, 1, groups=groups, relu=False)
        self.pool = nn.AvgPool2d(3, stride=2, padding=1) if stride == 2 else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv3(self.conv2(shuffle(self.conv1(x), self.groups)))
        return (out + x if self.pool is None else torch.cat([out, self.pool(x)], 1)).relu()


class ShuffleNetV2(nn.Module):
    """Channel splits and shuffles at width 1 (Ma et al. 2018), with a 1x1 stem at stride 1."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = conv_bn(3, 24, 1)
        self.layer1 = self._stage(24, 116, 3)
        self.layer2 = self._stage(116, 232, 7)
        self.layer3 = self._stage(232, 464, 3)
        self.last = conv_bn(464, 1024, 1)
        self.fc = nn.Linear(1024, num_classes)

    @staticmethod
    def _stage(channels_in: int, channels: int, blocks: int) -> nn.Sequential:
        return nn.Sequential(
            ShuffleV2Down(channels_in, channels), *(ShuffleV2Block(channels) for _ in range(blocks))
        )

    def forward(self, images: Tensor) -> Tensor:
        x = self.last(self.layer3(self.layer2(self.layer1(self.stem(images)))))
        return self.fc(x.mean((2, 3)))


class ShuffleV2Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.layers = nn.Sequential(
            conv_bn(half, half, 1), conv_bn(half, half, 3, groups=half, relu=False), conv_bn(half, half, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = x.chunk(2, 1)
        return shuffle(torch.cat([kept, self.layers(changed)], 1), 2)


class ShuffleV2Down(nn.Module):
    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.left = nn.Sequential(
            conv_bn(channels_in, channels_in, 3, 2, groups=channels_in, relu=False),
            conv_bn(channels_in, half, 1),
        )
        self.right = nn.Sequential(
            conv_bn(channels_in, half, 1),
            conv_bn(half, half, 3, 2, groups=half, relu=False),
            conv_bn(half, half, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return shuffle(torch.cat([self.left(x), self.right(x)], 1), 2)


class MobileNetV1(nn.Module):
    """Depthwise and pointwise 3x3 convolutions for 224x224 images (Howard et al. 2017), width 1."""

    # Channels and stride of each pair.
    _PAIRS = (
        (64, 1),
        (128, 2),
        (128, 1),
        (256, 2),
        (256, 1),
        (512, 2),
        *[(512, 1)] * 5,
        (1024, 2),
        (1024, 1),
    )

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stages = nn.Sequential(conv_bn(3, 32, 3, 2))
        channels_in = 32
        for channels, stride in self._PAIRS:
            depthwise = conv_bn(channels_in, channels_in, 3, stride, groups=channels_in)
            self.stages.append(nn.Sequential(depthwise, conv_bn(channels_in, channels, 1)))
            channels_in = channels
        self.fc = nn.Linear(channels_in, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.stages(images).mean((2, 3)))
