"""Which samples make each batch of an epoch, from any batch on, for one rank of several."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Chosen:
    """One batch of one rank."""

    position: int  # of the batch in its epoch, from 0
    samples: np.ndarray  # indices
    borrowed: bool = (
        False  # the first sample is the one before this rank's: mixing wants it, training does not
    )


class EpochOrder:
    """The order of an epoch, shuffled where there is a seed; it depends on seed and epoch alone."""

    def __init__(self, count: int, batch_size: int, seed: int | None) -> None:
        self._count, self._batch_size, self._seed = count, batch_size, seed
        self.epoch = 0

    def __len__(self) -> int:
        return math.ceil(self._count / self._batch_size)

    def batches(
        self, start: int = 0, rank: int = 0, world: int = 1, even: bool = False, borrow: bool = False
    ) -> Iterator[Chosen]:
        """Batches from ``start`` on, of each the rows of ``rank``.

        ``even``: as many rows for each rank; up to ``world - 1`` rows of a batch are left out. ``borrow``:
        the row before a rank's own comes along, so that MixUp pairs the rows as in one process.
        """
        order = np.arange(self._count)
        if self._seed is not None:
            order = np.random.default_rng([self._seed, self.epoch]).permutation(self._count)
        for position in range(start, len(self)):
            batch = order[position * self._batch_size : (position + 1) * self._batch_size]
            share = len(batch) // world
            low, high = rank * len(batch) // world, (rank + 1) * len(batch) // world
            if even:
                low, high = rank * share, (rank + 1) * share
            samples = batch[low:high]
            if borrow and 0 < len(samples) < len(batch):
                yield Chosen(position, np.concatenate([batch[[low - 1]], samples]), borrowed=True)
            else:
                yield Chosen(position, samples)
