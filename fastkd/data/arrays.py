"""Images in memory, and the data sets that are kept so: Fashion-MNIST, CIFAR-100, and random images."""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastkd.errors import DataError
from fastkd.recipe.sections import ArraysData, FolderData, ImageData, MemoryImages, ShardData, SyntheticData

from .order import EpochOrder, IndexedLoader, split_off
from .transforms import IMAGENET_MEAN, IMAGENET_STD, Mixing, Normalize
from .validation import ValidationTransform


@dataclass(frozen=True)
class Kind:
    """Constants of a data set: its sizes, and mean and standard deviation of pixels in 0..1."""

    title: str
    classes: int
    channels: int
    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int = 0  # of the random crops
    measured: bool = False  # title from the folder's name; classes, mean and std from its files

    @property
    def identity(self) -> list[object]:
        """What a trained network depends on besides the images. A folder can be renamed."""
        return ["arrays", self.classes, *self.mean, *self.std] if self.measured else [self.title]


KINDS = {
    "fashion_mnist": Kind("Fashion-MNIST", 10, 1, 28, (0.2860,), (0.3530,), padding=2),
    "cifar100": Kind("CIFAR-100", 100, 3, 32, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), padding=4),
}


@dataclass(frozen=True)
class ArrayData:
    """Images in memory, uint8 ``[N, C, H, W]``, with int64 labels; see ``array_data``."""

    kind: Kind
    train: tuple[Tensor, Tensor] = field(repr=False)
    val: tuple[Tensor, Tensor] = field(repr=False)
    augment: bool
    where: str  # description of the source
    mixing: Mixing
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        return self.kind.classes

    @property
    def transform(self) -> ValidationTransform:
        kind = self.kind
        return ValidationTransform(
            channels=kind.channels, resize=kind.side, crop=kind.side, mean=list(kind.mean), std=list(kind.std)
        )

    @property
    def channels(self) -> int:
        return self.kind.channels

    @property
    def augmentation(self) -> dict[str, object]:
        crop = f"shift_{self.kind.padding}_flip" if self.augment else "none"
        return {"crop": crop, "mixup": self.mixing.mixup, "cutmix": self.mixing.cutmix}

    @property
    def content(self) -> list[object]:
        return [*self.kind.identity, _digest(self.train), len(self.train[1])]

    @property
    def samples(self) -> int:
        return len(self.train[1])

    @property
    def varies(self) -> bool:
        return self.augment or bool(self.mixing)

    def drawn_with(self, batch_size: int, device: torch.device) -> dict[str, object]:
        return {"batch_size": batch_size} if self.mixing else {}

    @property
    def fingerprint(self) -> list[object]:
        return [*self.content, _digest(self.val), self.augmentation]

    def describe(self) -> str:
        counts = f"{len(self.train[1]):,} training images, {len(self.val[1]):,} to validate"
        return f"{self.kind.title} ({self.where}), {self.kind.classes:,} classes, {counts}"

    def train_loader(self, batch_size: int, seed: int, device: torch.device) -> ArrayLoader:
        options: dict[str, Any] = {"seed": seed, "augment": self.augment, "mixing": self.mixing}
        return ArrayLoader(self.kind, *self.train, batch_size, device, **options)

    def val_loader(self, device: torch.device, batch_size: int = 512) -> ArrayLoader:
        return ArrayLoader(self.kind, *self.val, batch_size, device)

    def example(self) -> tuple[Tensor, Tensor]:
        """Two images and their labels, as a network gets them in training."""
        images, target = next(iter(self.val_loader(torch.device("cpu"), 2)))
        return self.mixing(images, target, 0)


class ArrayLoader(IndexedLoader):
    """Normalised batches of ``(images, target)``; with a seed shuffled, cropped and flipped in each epoch.

    Epoch k of a seed is always the same, including the crop of each image.
    """

    def __init__(
        self,
        kind: Kind,
        images: Tensor,
        target: Tensor,
        batch_size: int,
        device: torch.device,
        *,
        seed: int | None = None,
        augment: bool = False,
        mixing: Mixing | None = None,
    ) -> None:
        super().__init__(EpochOrder(len(target), batch_size, seed))
        self._images, self._target, self._device = images, target, device
        self._seed, self._augment, self._padding = seed, augment, kind.padding
        self._mixing = mixing
        self._normalize = Normalize(kind.mean, kind.std, device)

    def indexed(
        self, start: int = 0, rank: int = 0, world: int = 1, even: bool = False
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """``(images, target, sample indices)``."""
        epoch, training = self._order.epoch, self._seed is not None
        generator = torch.Generator().manual_seed((self._seed or 0) * 2**20 + epoch)
        # Drawn for all images in data set order: an image's crop does not depend on its batch.
        moves = draw_moves(len(self._target), self._padding, generator)
        for batch in self._order.batches(start, rank, world, even, borrow=bool(self._mixing)):
            chosen = torch.from_numpy(batch.samples)
            images, target = self._images[chosen], self._target[chosen]
            if self._augment and training:
                images = crop_and_flip(images, self._padding, moves[chosen])
            images, target = self._normalize(images), target.to(self._device, non_blocking=True)
            if self._mixing and training:
                images, target = self._mixing(images, target, self._seed or 0, epoch, batch.position)
            own = slice(int(batch.borrowed), None)
            yield images[own], target[own], chosen[own]


def draw_moves(count: int, padding: int, generator: torch.Generator) -> Tensor:
    """Random shifts down and right by 0 to ``2 padding``, and whether to flip: ``[count, 3]``."""
    shifts = torch.randint(0, 2 * padding + 1, (count, 2), generator=generator)
    return torch.cat([shifts, torch.randint(0, 2, (count, 1), generator=generator)], dim=1)


def crop_and_flip(images: Tensor, padding: int, moves: Tensor) -> Tensor:
    """Shift by up to ``padding`` pixels, filling with black, and flip horizontally; see ``draw_moves``."""
    n, channels, height, width = images.shape
    down, right, flip = moves[:, :, None].unbind(1)
    rows = down + torch.arange(height)
    columns = right + torch.where(flip.bool(), torch.arange(width).flip(0), torch.arange(width))
    padded = F.pad(images, [padding] * 4)
    first = torch.arange(n)[:, None, None, None]
    return padded[
        first, torch.arange(channels)[:, None, None], rows[:, None, :, None], columns[:, None, None, :]
    ]


def random_images(config: ImageData | ArraysData | FolderData | ShardData | SyntheticData) -> ArrayData:
    """Random images and labels, with the shape of the data set that they replace."""
    if isinstance(config, SyntheticData):
        count, mixing = config.images, Mixing(0.0, 0.0, config.classes)
        half = (0.5,) * config.channels
        kind = Kind("synthetic", config.classes, config.channels, config.size, half, half)
    else:
        assert config.synthetic is not None
        count = config.synthetic
        if isinstance(config, ImageData):
            kind = KINDS[config.name]
        elif isinstance(config, ArraysData):  # only the files know their shape
            kind = replace(KINDS["cifar100"], title=config.name)
        else:
            kind = Kind(config.name, 1000, 3, config.size, IMAGENET_MEAN, IMAGENET_STD)
        mixing = Mixing(config.mixup, config.cutmix, kind.classes)
    generator = torch.Generator().manual_seed(0)
    train, val = (_random_images(kind, count, generator) for _ in range(2))
    augment = isinstance(config, MemoryImages) and config.augment
    return ArrayData(kind, train, val, augment, "random images", mixing)


_Labelled = tuple[Tensor, Tensor, tuple[str, ...]]  # images, labels, the names of the classes


def load_image_data(config: ImageData) -> ArrayData:
    """Load Fashion-MNIST or CIFAR-100. Raises ``DataError``."""
    kind = KINDS[config.name]
    if config.folder is None:
        raise DataError(
            f"data.folder is missing: the folder of {kind.title} (data.synthetic=64 works without it)"
        )
    folder = Path(config.folder)
    if not folder.is_dir() and not config.download:
        raise DataError(
            f"data.folder: {folder} is not a folder; data.download=true downloads {kind.title} to it"
        )
    read = _fashion_mnist if config.name == "fashion_mnist" else _cifar100
    train, test = (read(folder, part, config.download) for part in (True, False))
    return array_data(config, kind, train[:2], test[:2], train[2])


def array_data(
    config: MemoryImages,
    kind: Kind,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    class_names: tuple[str, ...] | None,
) -> ArrayData:
    """``train`` validated on ``test``, or on the part of ``train`` that the recipe holds out."""
    mixing = Mixing(config.mixup, config.cutmix, kind.classes)
    if config.holdout is None:
        where = "validated on its test images"
        return ArrayData(kind, train, test, config.augment, where, mixing, class_names)
    kept, held = map(torch.from_numpy, split_off(len(train[1]), config.holdout))
    where = "validated on some of its training images, test images unused"
    parts = (train[0][kept], train[1][kept]), (train[0][held], train[1][held])
    return ArrayData(kind, *parts, config.augment, where, mixing, class_names)


def _random_images(kind: Kind, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    shape = (count, kind.channels, kind.side, kind.side)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return images, torch.randint(0, kind.classes, (count,), generator=generator)


def _digest(part: tuple[Tensor, Tensor]) -> str:
    digest = hashlib.sha256()
    for values in part:
        digest.update(values.numpy().data)
    return digest.hexdigest()


def _fashion_mnist(folder: Path, train: bool, download: bool) -> _Labelled:
    from torchvision.datasets import FashionMNIST

    if download:
        FashionMNIST(str(folder), download=True)
    stem = "train" if train else "t10k"
    images = _read_idx(folder, f"{stem}-images-idx3-ubyte", 3)
    target = _read_idx(folder, f"{stem}-labels-idx1-ubyte", 1)
    if len(images) != len(target):
        raise DataError(f"data.folder: {folder} has {len(images)} {stem} images and {len(target)} labels")
    kind = KINDS["fashion_mnist"]
    if not len(target):
        raise DataError(f"data.folder: {folder} has no {stem} images")
    if images.shape[1:] != (kind.side, kind.side):
        sides = " x ".join(map(str, images.shape[1:]))
        raise DataError(f"data.folder: the {stem} images of {folder} are {sides}, expected 28 x 28")
    if (largest := int(target.max())) >= kind.classes:
        raise DataError(
            f"data.folder: the {stem} labels of {folder} go up to {largest}, expected 0 to {kind.classes - 1}"
        )
    return images[:, None], target.long(), tuple(FashionMNIST.classes)


def _read_idx(folder: Path, name: str, dimensions: int) -> Tensor:
    """Read a file of the MNIST format, plain or gzipped, from ``folder`` or torchvision's subfolder of it."""
    for path in (
        place / (name + end) for place in (folder, folder / "FashionMNIST" / "raw") for end in ("", ".gz")
    ):
        if not path.is_file():
            continue
        try:
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
                content = file.read()
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"data.folder: {path} cannot be read: {error}") from None
        # Magic: two zero bytes, 8 for uint8, the number of dimensions; then the sizes, big-endian.
        start = 4 + 4 * dimensions
        sizes = [int(size) for size in np.frombuffer(content[4:start].ljust(start - 4, b"\0"), ">i4")]
        whole = min(sizes) >= 0 and len(content) - start == math.prod(sizes)
        if content[:4] != bytes([0, 0, 8, dimensions]) or not whole:
            raise DataError(f"data.folder: {path} is damaged or not in the MNIST format")
        return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(sizes).copy())
    raise DataError(
        f"data.folder: {folder} has no {name} or {name}.gz, and neither has its FashionMNIST/raw; "
        "data.download=true downloads Fashion-MNIST"
    )


def _cifar100(folder: Path, train: bool, download: bool) -> _Labelled:
    from torchvision.datasets import CIFAR100

    try:
        data = CIFAR100(str(folder), train=train, download=download)
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"data.folder: {folder} has no intact CIFAR-100 ({error}); data.download=true downloads it"
        ) from None
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor(data.targets), tuple(data.classes)
