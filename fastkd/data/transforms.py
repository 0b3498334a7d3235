"""Image transforms: crops on the CPU; normalisation and mixing on the device.

Crops are of tensors: uint8 bilinear resampling is more than twice as fast there as in Pillow, from which it
differs by at most one level. All randomness is a function of (seed, epoch, sample index). A resumed run
therefore only needs its position in the epoch, the number of workers does not matter, and a cached teacher
saw the same crops as the student.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Transform = Callable[[Tensor], Tensor]  # of uint8 [C, H, W]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@contextlib.contextmanager
def keyed_randomness(*key: int) -> Iterator[None]:
    """Seed torch's CPU generator from ``key`` inside the block, and restore its state afterwards."""
    state = torch.get_rng_state()
    # SeedSequence distinguishes (1, 23) from (12, 3), and neighbouring keys give unrelated streams.
    torch.default_generator.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))
    try:
        yield
    finally:
        torch.set_rng_state(state)


def random_crop(size: int) -> Transform:
    """Random crop of 8 to 100 % of the area, then a random flip, as in torchvision's ImageNet recipes."""
    from torchvision.transforms import v2

    return v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()])


def central_crop(size: int, resize: int) -> Transform:
    from torchvision.transforms import v2

    return v2.Compose([v2.Resize(resize), v2.CenterCrop(size)])


class Normalize:
    """uint8 ``[N, C, H, W]`` to float32 ``(x / 255 - mean) / std``, computed after the copy to ``device``.

    As one multiplication and one addition, or, with mean 0 and std 1, as a division by 255: they round apart.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        self._device = device
        self._divides_only = not any(mean) and all(deviation == 1 for deviation in std)
        means, stds = torch.tensor(mean), torch.tensor(std)
        self._scale = (1 / (255 * stds)).view(1, -1, 1, 1).to(device)
        self._shift = (-means / stds).view(1, -1, 1, 1).to(device)

    def __call__(self, images: Tensor) -> Tensor:
        pixels = images.to(self._device, non_blocking=True).float()
        return pixels.div_(255) if self._divides_only else pixels.mul_(self._scale).add_(self._shift)


@dataclass(frozen=True)
class Mixing:
    """torchvision's MixUp and CutMix on whole batches; if both are on, each batch gets one of them."""

    mixup: float
    cutmix: float
    num_classes: int

    def __bool__(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    def __call__(self, images: Tensor, target: Tensor, *key: int) -> tuple[Tensor, Tensor]:
        """Mixed float images and labels as probabilities ``[N, C]``; randomness depends on ``key`` only."""
        if not self:
            return images, target
        from torchvision.transforms import v2

        kinds = [(v2.MixUp, self.mixup), (v2.CutMix, self.cutmix)]
        mixes = [kind(alpha=alpha, num_classes=self.num_classes) for kind, alpha in kinds if alpha > 0]
        with keyed_randomness(*key):
            mix = mixes[int(torch.randint(len(mixes), ()))]
            mixed: tuple[Tensor, Tensor] = mix(images, target)
        return mixed
