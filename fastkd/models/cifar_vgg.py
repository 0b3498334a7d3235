"""VGG networks with BatchNorm for 32x32 images, in the form that CRD's benchmark and mdistiller use."""

from __future__ import annotations

from torch import Tensor, nn

from .layers import he_init

_LAYERS = {
    8: (1, 1, 1, 1, 1),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
_WIDTHS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """Five stages of 3x3 convolutions (with bias) and one linear layer, ``fc`` (Simonyan 2014).

    The first three stages end in 2x2 pooling, so that the last two work at 4x4. Layers to tap: ``stages.0``
    to ``stages.4``.
    """

    def __init__(self, depth: int, num_classes: int) -> None:
        super().__init__()
        if depth not in _LAYERS:
            raise ValueError(f"depth is {depth}; expected one of {', '.join(map(str, _LAYERS))}")
        self.stages = nn.Sequential()
        channels_in = 3
        for index, (layers, channels) in enumerate(zip(_LAYERS[depth], _WIDTHS, strict=True)):
            stage: list[nn.Module] = [nn.MaxPool2d(2)] if 1 <= index <= 3 else []
            for _ in range(layers):
                stage += [nn.Conv2d(channels_in, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
                channels_in = channels
            self.stages.append(nn.Sequential(*stage))
        self.fc = nn.Linear(channels_in, num_classes)
        he_init(self, linear_std=0.01)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.stages(images).mean((2, 3)))
