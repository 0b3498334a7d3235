"""What happens to images between file and network: crops on the CPU, the rest on the device.

All randomness is a function of (seed, epoch, sample index): the position in an epoch is all that a resumed
run must know, the number of worker processes changes nothing, and a cached teacher meets the crops of its
student.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Transform = Callable[[Any], Tensor]  # of a PIL image, to uint8 [C, H, W]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@contextlib.contextmanager
def keyed_randomness(*key: int) -> Iterator[None]:
    """Inside, torch's CPU generator depends on ``key`` alone; afterwards it is as if nothing was drawn."""
    state = torch.get_rng_state()
    # SeedSequence tells (1, 23) from (12, 3), and neighbouring keys give unrelated streams.
    torch.default_generator.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))
    try:
        yield
    finally:
        torch.set_rng_state(state)


def random_crop(size: int) -> Transform:
    """Inception's crop, as torchvision's references train ImageNet: 8 to 100 % of the area, then a flip."""
    from torchvision.transforms import v2

    return v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), v2.PILToTensor()])


def central_crop(size: int, resize: int) -> Transform:
    from torchvision.transforms import v2

    return v2.Compose([v2.Resize(resize), v2.CenterCrop(size), v2.PILToTensor()])


class Normalize:
    """uint8 ``[N, C, H, W]`` to float32 ``(x / 255 - mean) / std``, on ``device``: less is copied there."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        self._device = device
        means, stds = torch.tensor(mean), torch.tensor(std)
        self._scale = (1 / (255 * stds)).view(1, -1, 1, 1).to(device)
        self._shift = (-means / stds).view(1, -1, 1, 1).to(device)

    def __call__(self, images: Tensor) -> Tensor:
        return images.to(self._device, non_blocking=True).float().mul_(self._scale).add_(self._shift)


@dataclass(frozen=True)
class Mixing:
    """torchvision's MixUp and CutMix on whole batches; with both, each batch gets one of the two."""

    mixup: float
    cutmix: float
    num_classes: int

    def __bool__(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    def __call__(self, images: Tensor, target: Tensor, *key: int) -> tuple[Tensor, Tensor]:
        """Mixed float images and their labels as probabilities ``[N, C]``; random by ``key`` alone."""
        if not self:
            return images, target
        from torchvision.transforms import v2

        kinds = [(v2.MixUp, self.mixup), (v2.CutMix, self.cutmix)]
        mixes = [kind(alpha=alpha, num_classes=self.num_classes) for kind, alpha in kinds if alpha > 0]
        with keyed_randomness(*key):
            mix = mixes[int(torch.randint(len(mixes), ()))]
            mixed: tuple[Tensor, Tensor] = mix(images, target)
        return mixed
