"""Adapts any loader to the training loop: this rank's rows of each batch, from any position, on the device.

The order and augmentation of fastkd's loaders depend only on seed, epoch and sample, so position k of an
epoch always means the same batch. A checkpoint therefore stores a number instead of the state of workers.
"""

from __future__ import annotations

import itertools
import math
import time
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data.distributed import DistributedSampler

from fastkd.data.order import rows_of
from fastkd.data.transforms import Normalize

from . import distributed
from .preflight import checked_batch

Batch = tuple[Tensor, ...]  # images, target and further inputs of the method
_REMEDY = (
    "all ranks must draw the same batches, of which each takes its rows: give the loader a torch.Generator "
    "of the same seed on all ranks, or a DistributedSampler; a loader of this rank's own rows needs a method "
    "batches(start, rank, world, even) that yields them"
)


class Batches:
    """The batches of ``loader`` for one rank.

    A loader yields batches for all ranks, the same on each, and each rank takes its rows; the labels of each
    epoch's first batch are compared. A loader with a method ``batches(start, rank, world, even)`` makes only
    these rows (and must not use torch's global generator). A ``DataLoader`` with a ``DistributedSampler``
    already yields this rank's rows; in validation the duplicates that its sampler pads with are dropped.

    uint8 images are scaled to 0..1 on the device and, if the loader has ``mean`` and ``std`` per channel,
    normalised.

    Args:
        even: for training, see ``rows_of``.
        channels_last: convert images to this memory format.
        name: the loader's name in messages.
    """

    def __init__(
        self,
        loader: Any,
        device: torch.device,
        *,
        even: bool,
        channels_last: bool = False,
        name: str = "train_loader",
    ) -> None:
        self._name = name
        self.waited = 0.0  # seconds in this epoch that the host waited for the loader
        self.left_out = 0  # batches with too few rows
        self._loader, self._device, self._even = loader, device, even
        self._channels_last = channels_last
        mean, std = getattr(loader, "mean", None), getattr(loader, "std", None)
        self._normalize = None if mean is None or std is None else Normalize(mean, std, device)

    @property
    def length(self) -> int | None:
        try:
            return len(self._loader)
        except TypeError:
            return None

    def set_epoch(self, epoch: int) -> None:
        """Call ``set_epoch`` of the loader and its samplers, as is done for DistributedSampler."""
        for name in ("", "sampler", "batch_sampler"):
            owner = getattr(self._loader, name, None) if name else self._loader
            tell = getattr(owner, "set_epoch", None)
            if callable(tell):
                tell(epoch)

    def start(self, position: int = 0) -> Iterator[Batch | None]:
        """Start an epoch at batch ``position``; earlier batches of a plain loader are skipped here.

        None stands for a batch without rows and, in training, for one of which several ranks get under two
        each: a step that is left out.
        """
        self.waited = 0.0
        return self._timed(self._rows(position))

    def whole(self, position: int) -> Batch | None:
        """Batch ``position`` of all ranks as loaded; None if the loader is an exhausted iterator."""
        native = getattr(self._loader, "batches", None)
        if callable(native):
            return next(iter(native(position, 0, 1, False)), None)
        return next(itertools.islice(iter(self._loader), position, None), None)

    def _rows(self, position: int) -> Iterator[Batch]:
        rank, world = distributed.rank(), distributed.world()
        native = getattr(self._loader, "batches", None)
        if callable(native):
            return iter(native(position, rank, world, self._even))
        batches = iter(self._loader)
        for _ in range(position):
            next(batches, None)
        sampler = getattr(self._loader, "sampler", None)
        if isinstance(sampler, DistributedSampler):
            return batches if self._even else _without_padding(batches, sampler)
        return batches if world == 1 else self._parts(batches, rank, world)

    def _parts(self, batches: Iterator[Batch], rank: int, world: int) -> Iterator[Batch]:
        for position, batch in enumerate(batches):
            _, target, *_ = checked_batch(batch, self._name)
            # Of soft labels a rank may draw its own mixture.
            if position == 0 and not target.is_floating_point():
                distributed.check_agreement(
                    {f"the checksum of the labels in {self._name}'s first batch": _checksum(target)}, _REMEDY
                )
            mine = rows_of(len(batch[0]), rank, world, even=self._even)
            yield tuple(part[mine] for part in batch)

    def _timed(self, rows: Iterator[Batch]) -> Iterator[Batch | None]:
        while True:
            before = time.perf_counter()
            batch = next(rows, None)
            self.waited += time.perf_counter() - before
            if batch is None:
                return
            images, *rest = checked_batch(batch, self._name)
            # Batch normalisation needs two rows.
            if len(images) < (2 if self._even and distributed.world() > 1 else 1):
                self.left_out += 1
                yield None
                continue
            yield self._moved(images), *(part.to(self._device, non_blocking=True) for part in rest)

    def _moved(self, images: Tensor) -> Tensor:
        if images.dtype == torch.uint8 and self._normalize is not None:
            images = self._normalize(images)
        else:
            images = images.to(self._device, non_blocking=True)
            if images.dtype == torch.uint8:
                images = images.float().div_(255)
        if self._channels_last and images.dim() == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        return images


def _checksum(values: Tensor) -> int:
    return zlib.crc32(values.detach().cpu().contiguous().numpy().tobytes())


def micro_batches(batch: Batch, count: int) -> list[tuple[Batch, float]]:
    """``count`` parts of a batch (fewer if they had less than two rows), and the divisor of each part's loss.

    Losses are means over rows, so a part with r of n rows has the divisor n / r. Rows labelled -100 are
    counted too, which is exact only where the parts have equal shares of them: docs/methods.md.
    """
    rows = len(batch[0])
    # Parts of nearly equal size: `split` could leave a last part with one row, too few for BatchNorm.
    number = max(1, min(count, rows // 2))
    parts = zip(*(entry.tensor_split(number) for entry in batch), strict=True)
    return [(part, rows / len(part[0])) for part in parts]


def _without_padding(batches: Iterator[Batch], sampler: DistributedSampler[Any]) -> Iterator[Batch]:
    # Rank r has the samples r, r + world, ... of n; the rest are duplicates.
    left = math.ceil((len(sampler.dataset) - sampler.rank) / sampler.num_replicas)  # type: ignore[arg-type]
    for batch in batches:
        if left > 0:
            yield tuple(part[:left] for part in batch)
        left -= len(batch[0])
