"""Data sets that worker processes decode on demand: ImageFolder trees and tar shards."""

from __future__ import annotations

import errno
import functools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from fastkd.errors import DataError
from fastkd.messages import one_line
from fastkd.recipe.sections import FolderData, ShardData

from .corrupt import Corrupt, CorruptImages
from .order import Chosen, EpochOrder, IndexedLoader, split_off
from .pixels import Decoder, decode, torchcodec_decoders
from .sources import FolderSource, ShardSource, Source
from .transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Mixing,
    Normalize,
    Transform,
    central_crop,
    keyed_randomness,
    random_crop,
)
from .validation import ValidationTransform
from .workers import end_at_exit, from_one_process_only, held_back, start_method

# Read errors that concern a single file. The others (too many open files, no memory, a failing disk or mount)
# would affect any image.
_OF_THE_FILE = (
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG,
    None,
)  # fmt: skip


class Samples(Dataset[tuple[Tensor, int, int] | Corrupt]):
    """Runs in worker processes: ``samples[epoch, index]`` is (uint8 pixels, label, index)."""

    def __init__(
        self,
        source: Source,
        chosen: np.ndarray,
        transform: Transform,
        seed: int,
        decoder: Decoder = "pillow",
    ) -> None:
        self._source, self._chosen, self._transform, self._seed = source, chosen, transform, seed
        self._decoder = decoder

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, int] | Corrupt:
        epoch, index = key
        position = int(self._chosen[index])
        unreadable = functools.partial(Corrupt, self._source.name(position), index)
        try:
            content = self._source.read(position)
        except OSError as error:
            return unreadable(error.strerror or str(error), machine=error.errno not in _OF_THE_FILE)
        if not content:
            return unreadable("the file is empty")
        try:
            pixels = decode(content, self._decoder)
        except MemoryError:
            return unreadable("out of memory while decoding it", machine=True)
        except Exception as error:  # Pillow raises many types for broken files
            unknown = type(error).__name__ == "UnidentifiedImageError"  # its text is an address in memory
            return unreadable("no image of a known format" if unknown else one_line(error))
        with keyed_randomness(self._seed, epoch, index):
            return self._transform(pixels), int(self._source.labels[position]), index


Batch = tuple[Tensor, Tensor, Tensor, list[Corrupt]]  # pixels, labels, indices, unreadable images


def collate(rows: list[tuple[Tensor, int, int] | Corrupt]) -> Batch:
    good = [row for row in rows if not isinstance(row, Corrupt)]
    pixels = torch.stack([row[0] for row in good]) if good else torch.empty(0, dtype=torch.uint8)
    labels = torch.tensor([row[1] for row in good], dtype=torch.int64)
    indices = torch.tensor([row[2] for row in good], dtype=torch.int64)
    if get_worker_info() is not None:
        # The thread that sends them would do it too, but an error there loses the batch, and its reader waits
        # forever.
        for tensor in (pixels, labels, indices):
            tensor.share_memory_()
    return pixels, labels, indices, [row for row in rows if isinstance(row, Corrupt)]


class FileLoader(IndexedLoader):
    """Batches of ``(images, target)`` on the device, normalised and mixed; epoch k never changes."""

    def __init__(
        self,
        samples: Samples,
        batch_size: int,
        workers: int,
        device: torch.device,
        corrupt: CorruptImages,
        *,
        seed: int | None = None,
        mixing: Mixing | None = None,
    ) -> None:
        super().__init__(EpochOrder(len(samples), batch_size, seed))
        self._samples = samples
        self._seed, self._mixing, self._corrupt, self._device = seed or 0, mixing, corrupt, device
        self._normalize = Normalize(IMAGENET_MEAN, IMAGENET_STD, device)
        self._keys = _Keys()
        self._loader: DataLoader[Any] = DataLoader(
            samples,
            batch_sampler=self._keys,
            collate_fn=collate,
            num_workers=workers,
            multiprocessing_context=start_method() if workers else None,
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0,
            worker_init_fn=functools.partial(from_one_process_only, os.getpid()),
            generator=torch.Generator(),  # its own: otherwise each pass would draw from the global generator
        )

    def indexed(
        self, start: int = 0, rank: int = 0, world: int = 1, even: bool = False
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """``(images, target, sample indices)``, without unreadable images: without rows if all are.

        For ``even`` shares each of them is replaced by another image of the same share.
        """
        epoch = self._order.epoch
        chosen = list(self._order.batches(start, rank, world, even, borrow=bool(self._mixing)))
        self._keys.epoch, self._keys.batches = epoch, chosen
        for batch, (pixels, labels, indices, missing) in zip(chosen, self._started(), strict=True):
            borrowed = batch.borrowed and bool(len(indices)) and bool(indices[0] == batch.samples[0])
            if batch.borrowed and not borrowed:
                # In one process, images that cannot be read leave no gap: each is mixed with the nearest.
                *before, skipped = self._nearest_of(epoch, batch.farther)
                pixels, labels, indices = map(torch.cat, zip(before, (pixels, labels, indices), strict=True))
                missing, borrowed = missing + skipped, bool(len(before[2]))
            for image in missing:
                self._corrupt.add(image)
            count = len(labels) - int(borrowed)
            # Ranks gather features and average gradients, so all need the same number of rows.
            wanted = len(batch.samples) - int(batch.borrowed) if even and world > 1 else count
            if not count:
                if wanted:
                    raise DataError(
                        f"no image in this rank's share of a batch can be read: {missing[0].name} …"
                    )
                # Not left out here: positions and schedules count every batch of the order.
                yield pixels[:0].to(self._device, torch.float32), labels[:0].to(self._device), indices[:0]
                continue
            images = self._normalize(pixels)
            target = labels.to(self._device, non_blocking=True)
            if self._mixing:
                images, target = self._mixing(images, target, self._seed, epoch, batch.position)
                self.mixed_from = indices, torch.tensor([image.index for image in missing], dtype=torch.int64)
            own: slice | Tensor = slice(int(borrowed), None)
            if wanted > count:
                own = torch.arange(wanted) % count + int(borrowed)
            yield images[own], target[own], indices[own]

    def _nearest_of(self, epoch: int, samples: np.ndarray | tuple[()]) -> Batch:
        """The first of the samples that can be read, and those before it."""
        rows = []
        for index in samples:
            rows.append(self._samples[epoch, int(index)])
            if not isinstance(rows[-1], Corrupt):
                break
        return collate(rows)

    def _started(self) -> Iterator[Any]:
        try:
            if self._loader.num_workers:
                end_at_exit()
            with held_back():
                return iter(self._loader)
        except (OSError, RuntimeError) as error:  # processes, pipes or threads cannot be created
            if isinstance(error, RuntimeError) and of_workers(error) is not None:
                raise
            raise DataError(
                f"data.workers = {self._loader.num_workers}: this machine cannot start them: {error}"
            ) from None


def of_workers(error: RuntimeError) -> str | None:
    """The message for a ``DataLoader`` error caused by a killed worker; None for any other error."""
    text = one_line(error)
    if re.search(r"DataLoader worker \(pid", text):
        reason = re.search(r"(is killed by signal: [\w ]+|exited unexpectedly)", text)
        return (
            f"a data worker {reason[1] if reason else 'ended'}, often because memory ran out (use fewer "
            "data.workers or a smaller batch); what was written is kept: continue with --resume"
        )
    if re.search(r"shared memory|</torch_\w+>", text):
        return (
            "/dev/shm is too small for the data workers: use fewer data.workers, or give the container more; "
            "what was written is kept: continue with --resume"
        )
    return None


class _Keys:
    """Batch sampler of one pass: lists of (epoch, index)."""

    def __init__(self) -> None:
        self.epoch = 0
        self.batches: list[Chosen] = []

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in self.batches:
            yield [(self.epoch, int(index)) for index in batch.samples]

    def __len__(self) -> int:
        return len(self.batches)


@dataclass(frozen=True)
class FileData:
    """Encoded images, decoded on demand; see ``load_file_data``."""

    config: FolderData | ShardData
    source: Source = field(repr=False)
    val_source: Source = field(repr=False)
    train: np.ndarray = field(repr=False)  # positions in source
    val: np.ndarray = field(repr=False)  # positions in val_source
    corrupt: CorruptImages = field(repr=False)
    notes: tuple[str, ...] = ()
    channels: int = 3

    @property
    def num_classes(self) -> int:
        return self.source.num_classes

    @property
    def class_names(self) -> list[str] | None:
        return self.source.classes

    @property
    def transform(self) -> ValidationTransform:
        return ValidationTransform(
            channels=self.channels,
            resize=self._resize,
            crop=self.config.size,
            mean=list(IMAGENET_MEAN),
            std=list(IMAGENET_STD),
        )

    @property
    def mixing(self) -> Mixing:
        return Mixing(self.config.mixup, self.config.cutmix, self.num_classes)

    @property
    def _resize(self) -> int:
        return self.config.resize or self.config.size * 8 // 7

    @property
    def augmentation(self) -> dict[str, object]:
        crop = "random_resized_crop_flip" if self.config.augment else f"central_crop_of_{self._resize}"
        mixed = {"mixup": self.config.mixup, "cutmix": self.config.cutmix}
        return {"crop": f"{crop}_of_tensors", "size": self.config.size, **mixed}

    @property
    def content(self) -> list[object]:
        return [self.source.digest(), len(self.train)]

    @property
    def samples(self) -> int:
        return len(self.train)

    @property
    def varies(self) -> bool:
        return self.config.augment or bool(self.mixing)

    def drawn_with(self, batch_size: int, device: torch.device) -> dict[str, object]:
        return {"batch_size": batch_size} if self.mixing else {}

    @property
    def fingerprint(self) -> list[object]:
        # A number of classes that follows from the labels is in their digest.
        unseen = [self.num_classes] if self.num_classes > self.source.labels.max() + 1 else []
        content = [*self.content, self.val_source.digest(), len(self.val), self._resize]
        return [*content, self.augmentation, *unseen]

    def describe(self) -> str:
        counts = f"{len(self.train):,} training images, {len(self.val):,} to validate"
        return f"{self.config.root} ({self.config.name}), {self.num_classes:,} classes, {counts}"

    def train_loader(self, batch_size: int, seed: int, device: torch.device) -> FileLoader:
        transform = random_crop(self.config.size) if self.config.augment else self._central()
        samples = Samples(self.source, self.train, transform, seed, self.config.decoder)
        return FileLoader(
            samples, batch_size, self.config.workers, device, self.corrupt, seed=seed, mixing=self.mixing
        )

    def val_loader(self, device: torch.device, batch_size: int = 256) -> FileLoader:
        samples = Samples(self.val_source, self.val, self._central(), 0, self.config.decoder)
        return FileLoader(samples, batch_size, self.config.workers, device, self.corrupt)

    def _central(self) -> Transform:
        return central_crop(self.config.size, self._resize)

    def example(self) -> tuple[Tensor, Tensor]:
        """Two images and their labels, as a network gets them in training."""
        device = torch.device("cpu")
        two = Samples(self.source, self.train[:64], self._central(), 0, self.config.decoder)
        loader = FileLoader(two, 2, 0, device, self.corrupt, mixing=self.mixing)
        for images, target in loader:
            return images, target
        raise DataError(f"none of the first {len(two)} training images can be read; {self.describe()}")


def load_file_data(config: FolderData | ShardData) -> FileData:
    """Find the images below ``data.root``. Raises ``DataError``."""
    assert config.root is not None
    root = Path(config.root)
    if not root.is_dir():
        raise DataError(f"data.root: {root} is not a folder")
    if config.decoder == "torchcodec":
        torchcodec_decoders()
    corrupt = CorruptImages(config.corrupt_limit)
    source: FolderSource | ShardSource
    val_source: FolderSource | ShardSource
    if isinstance(config, FolderData):
        source = FolderSource(root / config.train)
        if config.holdout is not None:
            train, val = split_off(len(source.labels), config.holdout)
            return FileData(config, source, source, np.sort(train), np.sort(val), corrupt, source.notes)
        val_source = FolderSource(root / config.val)
        if source.classes != val_source.classes:
            odd = sorted(set(source.classes) ^ set(val_source.classes))
            raise DataError(
                f"data.root: {config.train} and {config.val} of {root} have different class folders: "
                + ", ".join(odd[:10])
            )
    else:
        source = ShardSource(root, config.train, config.classes)
        val_source = ShardSource(root, config.val, config.classes)
        if val_source.num_classes > source.num_classes:
            raise DataError(
                f"data.root: the shards {config.val} have labels up to {val_source.num_classes - 1}, "
                f"but {config.train} up to {source.num_classes - 1}; data.classes says how many there are"
            )
    train, val = np.arange(len(source.labels)), np.arange(len(val_source.labels))
    notes = (*source.notes, *val_source.notes)
    return FileData(config, source, val_source, train, val, corrupt, notes)
