"""Which images are trained on, and their order in an epoch: batches, from anywhere, divided among ranks."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from torch import Tensor

from fastkd.errors import DataError


def split_off(count: int, holdout: int) -> tuple[np.ndarray, np.ndarray]:
    """Of ``count`` training images: those kept, and the ``holdout`` that validate. Raises ``DataError``."""
    if holdout >= count:
        raise DataError(f"data.holdout = {holdout} leaves none of {count} training images")
    order = np.random.default_rng(0).permutation(count)
    return order[holdout:], order[:holdout]


def rows_of(count: int, rank: int, world: int, *, even: bool) -> slice:
    """The rows of a batch of ``count`` that belong to a rank; together the ranks have the whole batch.

    ``even``, for training: every rank gets the same number of rows, which averaging gradients over ranks
    requires; up to ``world - 1`` rows at the end are dropped.
    """
    if even:
        share = count // world
        return slice(rank * share, (rank + 1) * share)
    return slice(rank * count // world, (rank + 1) * count // world)


@dataclass(frozen=True)
class Chosen:
    """One batch of one rank."""

    position: int  # of the batch in its epoch, from 0
    samples: np.ndarray  # indices
    borrowed: bool = False  # the first sample belongs to the rank before: used for mixing, not trained on
    farther: np.ndarray | tuple[()] = ()  # those before the borrowed one, nearest first


class EpochOrder:
    """The order of an epoch, shuffled if there is a seed; it depends only on seed and epoch."""

    def __init__(self, count: int, batch_size: int, seed: int | None) -> None:
        self._count, self._batch_size, self._seed = count, batch_size, seed
        self.epoch = 0

    @property
    def facts(self) -> dict[str, int | None]:
        """What decides the order, by the names that a cache of the teacher has for it."""
        return {"samples": self._count, "seed": self._seed, "batch_size": self._batch_size}

    def __len__(self) -> int:
        return math.ceil(self._count / self._batch_size)

    def sizes(self) -> list[int]:
        """Sizes of the first and the last batch over all ranks; a single size if they are equal."""
        last = self._count - (len(self) - 1) * self._batch_size
        return list(dict.fromkeys((min(self._batch_size, self._count), last)))

    def batches(
        self, start: int = 0, rank: int = 0, world: int = 1, even: bool = False, borrow: bool = False
    ) -> Iterator[Chosen]:
        """This rank's rows of each batch, from batch ``start`` on.

        ``even`` as in ``rows_of``. ``borrow``: also yield the row before this rank's first one, so that MixUp
        pairs the rows as in one process, and which rows may take its place.
        """
        order = np.arange(self._count)
        if self._seed is not None:
            order = np.random.default_rng([self._seed, self.epoch]).permutation(self._count)
        for position in range(start, len(self)):
            batch = order[position * self._batch_size : (position + 1) * self._batch_size]
            own = rows_of(len(batch), rank, world, even=even)
            samples = batch[own]
            if borrow and 0 < len(samples) < len(batch):
                before = np.roll(batch, -own.start)[len(samples) :][::-1]  # the last row precedes the first
                yield Chosen(position, np.concatenate([before[:1], samples]), True, before[1:])
            else:
                yield Chosen(position, samples)


class EpochLoader:
    """A loader of batches in an ``EpochOrder``."""

    def __init__(self, order: EpochOrder) -> None:
        self._order = order

    def set_epoch(self, epoch: int) -> None:
        self._order.epoch = epoch

    @property
    def order_facts(self) -> dict[str, int | None]:
        return self._order.facts

    def sizes(self) -> list[int]:
        return self._order.sizes()

    def __len__(self) -> int:
        return len(self._order)


_Parts = TypeVar("_Parts", bound=tuple[Tensor, ...])


def with_rows(batches: Iterator[_Parts]) -> Iterator[_Parts]:
    """The batches that have rows, for loops that do not count positions: a mean over no rows is NaN."""
    return (batch for batch in batches if len(batch[0]))


class IndexedLoader(EpochLoader, ABC):
    """A loader whose images depend only on (seed, epoch, sample index), so that they can be cached for.

    Subclasses implement ``indexed``.
    """

    # Of the last batch, if images are mixed: the samples that could be read, and those that could not. Both
    # decide with which other image an image is mixed.
    mixed_from: tuple[Tensor, Tensor] | None = None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return with_rows(self.batches())

    def batches(
        self, start: int = 0, rank: int = 0, world: int = 1, even: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's rows of ``(images, target)``, from batch ``start`` on; some may have none."""
        for images, target, _ in self.indexed(start, rank, world, even):
            yield images, target

    @abstractmethod
    def indexed(
        self, start: int = 0, rank: int = 0, world: int = 1, even: bool = False
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """``(images, target, sample indices)``; arguments as for ``batches``."""
