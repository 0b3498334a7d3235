"""Small networks with every kind of layer that methods read."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CLASSES = 7


class Net(nn.Module):
    """Two stages, pooling, a linear classifier: ``features.0``, ``features.1``, ``fc``."""

    def __init__(self, width: int = 4, classes: int = CLASSES, stride: int = 2) -> None:
        super().__init__()
        self.features = nn.Sequential(stage(3, width, 1), stage(width, 2 * width, stride))
        self.fc = nn.Linear(2 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.features(images).mean((2, 3)))


def stage(channels_in: int, channels: int, stride: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
    )


def pair(seed: int = 0) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(seed)
    return Net(4), Net(6)


def batch(rows: int = 8, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(rows, 3, 8, 8, generator=generator)
    return images, torch.randint(0, CLASSES, (rows,), generator=generator)


# Every method with options that enable all its terms on ``pair()``.
METHODS: dict[str, dict[str, object]] = {
    "cross_entropy": {"label_smoothing": 0.1},
    "kd": {"warmup_epochs": 4},
    "lskd": {},
    "dkd": {},
    "dckd": {"hint_layer": "features.1", "hint_weight": 2.0, "distance_weight": 3.0, "angle_weight": 4.0},
    "nkd": {"temperature": 2.0},
    "binary_kl": {},
    "binary_kl_norm": {"weight": 0.5},
    "fitnets": {"hint_layer": "features.0", "hint_weight": 1.0},
    "rkd": {},
    "dhkd": {"hidden": 16},
    "mhkd": {"layers": ["features.0", "features.1"], "head_width": 8},
}
