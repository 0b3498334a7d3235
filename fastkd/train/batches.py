"""Any loader as the loop wants it: this rank's rows of each batch, from any position, on the device.

Position k of an epoch means the same batch whoever asks, since order and augmentation of fastkd's loaders
follow from seed, epoch and sample alone. So a checkpoint keeps a number, not the state of workers.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data.distributed import DistributedSampler

from fastkd.data.order import rows_of
from fastkd.data.transforms import Normalize

from . import distributed
from .preflight import checked_batch

Batch = tuple[Tensor, ...]  # images, target and whatever else the method takes


class Batches:
    """``loader`` for one rank.

    The loader yields batches for all ranks together, of which this rank takes its rows; a loader with a
    method ``batches(start, rank, world, even)`` makes only those (and does not touch torch's global
    generator). A ``DataLoader`` with a ``DistributedSampler`` yields this rank's rows already; in validation
    the copies that its sampler pads with are left out.

    Images of uint8 are brought to 0..1 on the device, then normalised by the loader's ``mean`` and ``std`` of
    channels, where it has them.

    Args:
        even: for training, see ``rows_of``.
        channels_last: give the images this memory format.
        name: of the loader, for messages.
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
        self.waited = 0.0  # seconds of this epoch that the host spent waiting for the loader
        self.left_out = 0  # batches of one row or none to a rank
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
        """Tell the loader, or its sampler, which epoch comes: the convention of DistributedSampler."""
        for name in ("", "sampler", "batch_sampler"):
            owner = getattr(self._loader, name, None) if name else self._loader
            tell = getattr(owner, "set_epoch", None)
            if callable(tell):
                tell(epoch)

    def start(self, position: int = 0) -> Iterator[Batch]:
        """An epoch from batch ``position`` on; what has to be skipped is skipped at once."""
        self.waited = 0.0
        return self._timed(self._rows(position))

    def whole(self, position: int) -> Batch | None:
        """Batch ``position`` of all ranks, as loaded; None for an iterator that is used up."""
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
        for batch in batches:
            checked_batch(batch, self._name)
            mine = rows_of(len(batch[0]), rank, world, even=self._even)
            yield tuple(part[mine] for part in batch)

    def _timed(self, rows: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            before = time.perf_counter()
            batch = next(rows, None)
            self.waited += time.perf_counter() - before
            if batch is None:
                return
            images, *rest = checked_batch(batch, self._name)
            # A rank of one row or none: batch normalisation needs two.
            if self._even and distributed.world() > 1 and len(images) < 2:
                self.left_out += 1
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


def micro_batches(batch: Batch, count: int) -> list[tuple[Batch, float]]:
    """A batch in ``count`` parts (fewer, if they had less than two rows), and what to divide each loss by.

    The losses are means over rows, so that a part of r of n rows counts r/n.
    """
    rows = len(batch[0])
    # Of almost equal sizes: `split` would leave a last part of one row, which batch normalisation refuses.
    number = max(1, min(count, rows // 2))
    parts = zip(*(entry.tensor_split(number) for entry in batch), strict=True)
    return [(part, rows / len(part[0])) for part in parts]


def _without_padding(batches: Iterator[Batch], sampler: DistributedSampler[Any]) -> Iterator[Batch]:
    # Of n samples rank r has those at r, r + world, ...; what comes after these are copies.
    left = math.ceil((len(sampler.dataset) - sampler.rank) / sampler.num_replicas)  # type: ignore[arg-type]
    for batch in batches:
        if left > 0:
            yield tuple(part[:left] for part in batch)
        left -= len(batch[0])
