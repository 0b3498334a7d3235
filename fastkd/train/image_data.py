"""Fashion-MNIST, CIFAR-100 and ImageNet as batches; random images of the same shape for trials."""

from __future__ import annotations

import gzip
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import DataError
from .recipe import FolderData, ImageData


@dataclass(frozen=True)
class _Kind:
    """What is fixed for a data set: mean and standard deviation of pixels in 0..1, and the sizes."""

    title: str
    classes: int
    channels: int
    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int = 0  # of the random crops


KINDS = {
    "fashion_mnist": _Kind("Fashion-MNIST", 10, 1, 28, (0.2860,), (0.3530,), padding=2),
    "cifar100": _Kind("CIFAR-100", 100, 3, 32, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), padding=4),
    "imagenet": _Kind("ImageNet", 1000, 3, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


@dataclass(frozen=True)
class ArrayData:
    """Images in memory, uint8 ``[N, C, H, W]``, with int64 labels; see ``load_image_data``."""

    kind: _Kind
    train: tuple[Tensor, Tensor] = field(repr=False)
    val: tuple[Tensor, Tensor] = field(repr=False)
    augment: bool
    where: str  # for people
    notes: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        return self.kind.classes

    @property
    def channels(self) -> int:
        return self.kind.channels

    @property
    def fingerprint(self) -> list[object]:
        digest = hashlib.sha256()
        for part in (*self.train, *self.val):
            digest.update(part.numpy().data)
        return [self.kind.title, digest.hexdigest(), len(self.train[1]), self.augment]

    def describe(self) -> str:
        counts = f"{len(self.train[1]):,} training images, {len(self.val[1]):,} to validate"
        return f"{self.kind.title} ({self.where}), {self.kind.classes:,} classes, {counts}"

    def train_loader(self, batch_size: int, seed: int, device: torch.device) -> ArrayLoader:
        return ArrayLoader(self.kind, *self.train, batch_size, device, seed=seed, augment=self.augment)

    def val_loader(self, device: torch.device, batch_size: int = 512) -> ArrayLoader:
        return ArrayLoader(self.kind, *self.val, batch_size, device)

    def example(self) -> tuple[Tensor, Tensor]:
        """Two images as a network sees them, and their labels."""
        images, target = next(iter(self.val_loader(torch.device("cpu"), 2)))
        return images, target


class ArrayLoader:
    """Batches of ``(images, target)``, normalised; with a seed shuffled, cropped and flipped anew each epoch.

    Epoch k of a seed is always the same, whatever was drawn before.
    """

    def __init__(
        self,
        kind: _Kind,
        images: Tensor,
        target: Tensor,
        batch_size: int,
        device: torch.device,
        *,
        seed: int | None = None,
        augment: bool = False,
    ) -> None:
        self._images, self._target, self._batch_size, self._device = images, target, batch_size, device
        self._seed, self._augment, self._padding, self._epoch = seed, augment, kind.padding, 0
        mean, std = torch.tensor(kind.mean), torch.tensor(kind.std)
        self._scale = (1 / (255 * std)).view(1, -1, 1, 1).to(device)
        self._shift = (-mean / std).view(1, -1, 1, 1).to(device)

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return math.ceil(len(self._target) / self._batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.arange(len(self._target))
        if self._seed is not None:
            shuffled = np.random.default_rng([self._seed, self._epoch]).permutation(len(order))
            order = torch.from_numpy(shuffled)
        generator = torch.Generator()
        generator.manual_seed((self._seed or 0) * 2**20 + self._epoch)
        for chosen in order.split(self._batch_size):
            images = self._images[chosen]
            if self._augment and self._seed is not None:
                images = crop_and_flip(images, self._padding, generator)
            images = images.to(self._device, non_blocking=True).float().mul_(self._scale).add_(self._shift)
            yield images, self._target[chosen].to(self._device, non_blocking=True)


def crop_and_flip(images: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Random shifts by up to ``padding`` pixels, black moving in, and horizontal flips, for each image."""
    n, channels, height, width = images.shape
    shifts = torch.randint(0, 2 * padding + 1, (2, n, 1), generator=generator)
    flips = torch.randint(0, 2, (n, 1), generator=generator).bool()
    rows = shifts[0] + torch.arange(height)
    columns = shifts[1] + torch.where(flips, torch.arange(width).flip(0), torch.arange(width))
    padded = F.pad(images, [padding] * 4)
    first = torch.arange(n)[:, None, None, None]
    return padded[
        first, torch.arange(channels)[:, None, None], rows[:, None, :, None], columns[:, None, None, :]
    ]


def load_image_data(config: ImageData | FolderData) -> ArrayData | FolderImages:
    """The data set that a recipe names. Raises ``DataError``."""
    kind = KINDS[config.name]
    if config.synthetic is not None:
        generator = torch.Generator().manual_seed(0)
        train, val = (_random_images(kind, config.synthetic, generator) for _ in range(2))
        return ArrayData(kind, train, val, config.augment, "random images, for trials only")
    if config.folder is None:
        raise DataError(
            f"data.folder is missing: where {kind.title} is (data.synthetic=64 tries a recipe without it)"
        )
    folder = Path(config.folder)
    if isinstance(config, FolderData):
        return FolderImages(kind, folder, config.augment, config.workers)
    if not folder.is_dir() and not config.download:
        raise DataError(
            f"data.folder: {folder} is no folder; data.download=true downloads {kind.title} to it"
        )
    read = _fashion_mnist if config.name == "fashion_mnist" else _cifar100
    train, test = (read(folder, part, config.download) for part in (True, False))
    if config.holdout is None:
        return ArrayData(kind, train, test, config.augment, "its test images validate")
    if config.holdout >= len(train[1]):
        raise DataError(f"data.holdout = {config.holdout} leaves none of {len(train[1])} training images")
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(train[1])))
    held, kept = order[: config.holdout], order[config.holdout :]
    where = "part of its training images validates, the test images are left alone"
    return ArrayData(
        kind, (train[0][kept], train[1][kept]), (train[0][held], train[1][held]), config.augment, where
    )


def _random_images(kind: _Kind, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    shape = (count, kind.channels, kind.side, kind.side)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return images, torch.randint(0, kind.classes, (count,), generator=generator)


def _fashion_mnist(folder: Path, train: bool, download: bool) -> tuple[Tensor, Tensor]:
    if download:
        from torchvision.datasets import FashionMNIST

        FashionMNIST(str(folder), download=True)
    stem = "train" if train else "t10k"
    images = _read_idx(folder, f"{stem}-images-idx3-ubyte", 3)
    target = _read_idx(folder, f"{stem}-labels-idx1-ubyte", 1)
    if len(images) != len(target):
        raise DataError(f"data.folder: {folder} has {len(images)} {stem} images and {len(target)} labels")
    return images[:, None], target.long()


def _read_idx(folder: Path, name: str, dimensions: int) -> Tensor:
    """A file of the MNIST format, plain or gzipped, in ``folder`` or where torchvision puts it below."""
    for path in (
        place / (name + end) for place in (folder, folder / "FashionMNIST" / "raw") for end in ("", ".gz")
    ):
        if not path.is_file():
            continue
        try:
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
                content = file.read()
        except (OSError, EOFError) as error:
            raise DataError(f"data.folder: {path} cannot be read: {error}") from None
        # Magic: two zero bytes, 8 for uint8, the number of dimensions; then the sizes, big-endian.
        start = 4 + 4 * dimensions
        sizes = [int(size) for size in np.frombuffer(content[4:start].ljust(start - 4, b"\0"), ">i4")]
        if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) - start != math.prod(sizes):
            raise DataError(f"data.folder: {path} is damaged or no file of the MNIST format")
        return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(sizes).copy())
    raise DataError(
        f"data.folder: {folder} has no {name} or {name}.gz, nor has FashionMNIST/raw below it; "
        "data.download=true downloads Fashion-MNIST"
    )


def _cifar100(folder: Path, train: bool, download: bool) -> tuple[Tensor, Tensor]:
    from torchvision.datasets import CIFAR100

    try:
        data = CIFAR100(str(folder), train=train, download=download)
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"data.folder: {folder} holds no intact CIFAR-100 ({error}); data.download=true downloads it"
        ) from None
    return torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets)


class FolderImages:
    """A folder with ``train/CLASS/*.jpeg`` and ``val/CLASS/*.jpeg``, ImageNet's layout for torchvision."""

    def __init__(self, kind: _Kind, folder: Path, augment: bool, workers: int) -> None:
        from torchvision import datasets, transforms

        self.channels = kind.channels
        self.notes: tuple[str, ...] = ()
        self._kind, self._workers = kind, workers
        end = [transforms.ToTensor(), transforms.Normalize(kind.mean, kind.std)]
        centre = [transforms.Resize(kind.side * 8 // 7), transforms.CenterCrop(kind.side)]
        cropped = [transforms.RandomResizedCrop(kind.side), transforms.RandomHorizontalFlip()]
        try:
            self._train, self._val = (
                datasets.ImageFolder(str(folder / part), transforms.Compose([*start, *end]))
                for part, start in (("train", cropped if augment else centre), ("val", centre))
            )
        except (FileNotFoundError, OSError) as error:
            raise DataError(f"data.folder: {folder} must hold train/CLASS and val/CLASS: {error}") from None
        if self._train.classes != self._val.classes:
            raise DataError(f"data.folder: train and val of {folder} have different class folders")
        self.num_classes = len(self._train.classes)
        self.fingerprint: list[object] = [
            kind.title,
            self._train.classes,
            len(self._train),
            len(self._val),
            augment,
        ]

    def describe(self) -> str:
        counts = f"{len(self._train):,} training images, {len(self._val):,} to validate"
        return f"{self._kind.title}, {self.num_classes:,} classes, {counts}"

    def train_loader(self, batch_size: int, seed: int, device: torch.device) -> FolderLoader:
        return FolderLoader(self._train, batch_size, self._workers, device, seed)

    def val_loader(self, device: torch.device, batch_size: int = 256) -> FolderLoader:
        return FolderLoader(self._val, batch_size, self._workers, device)

    def example(self) -> tuple[Tensor, Tensor]:
        rows = [self._val[index] for index in range(min(2, len(self._val)))]
        return torch.stack([image for image, _ in rows]), torch.tensor([label for _, label in rows])


class FolderLoader:
    """A ``DataLoader`` a pass, whose order and augmentation follow from seed and epoch."""

    def __init__(
        self, images: Any, batch_size: int, workers: int, device: torch.device, seed: int | None = None
    ) -> None:
        self._images, self._batch_size, self._workers, self._seed = images, batch_size, workers, seed
        self._pin, self._epoch = device.type == "cuda", 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return math.ceil(len(self._images) / self._batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed((self._seed or 0) * 2**20 + self._epoch)
        yield from torch.utils.data.DataLoader(
            self._images,
            self._batch_size,
            shuffle=self._seed is not None,
            num_workers=self._workers,
            pin_memory=self._pin,
            generator=generator,
        )
