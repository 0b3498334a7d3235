"""What training needs of a data set, and which one a recipe means."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from fastkd.errors import DataError
from fastkd.recipe.schema import DataSection, GlyphsData, ImageData, SyntheticData


class Loader(Protocol):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...

    def __len__(self) -> int: ...

    def set_epoch(self, epoch: int) -> None: ...

    def sizes(self) -> list[int]:
        """Images of the first and of the last batch of an epoch; see ``EpochOrder.sizes``."""


class IndexedLoader(Loader, Protocol):
    """A loader whose images are a function of (seed, epoch, sample index), so that they can be cached for."""

    def indexed(
        self, start: int = 0, rank: int = 0, world: int = 1, even: bool = False
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """``(images, target, int64 sample indices [N])``; see ``EpochOrder.batches``."""


class Data(Protocol):
    @property
    def num_classes(self) -> int: ...

    @property
    def channels(self) -> int: ...

    @property
    def notes(self) -> Sequence[str]: ...

    @property
    def fingerprint(self) -> list[object]:
        """What a network trained on these data depends on, apart from its own settings."""

    def describe(self) -> str: ...

    def train_loader(self, batch_size: int, seed: int, device: torch.device) -> Loader: ...

    def val_loader(self, device: torch.device, batch_size: int) -> Loader: ...

    def example(self) -> tuple[Tensor, Tensor]: ...


@runtime_checkable
class CacheableData(Data, Protocol):
    """Data whose training loader is an ``IndexedLoader``."""

    @property
    def content(self) -> list[object]:
        """Tells these training images from others."""

    @property
    def augmentation(self) -> dict[str, object]:
        """All that decides what a network is shown of a training image, but for the seed."""

    @property
    def samples(self) -> int:
        """How many training images there are."""

    @property
    def varies(self) -> bool:
        """Whether an image looks different in each epoch."""

    def train_loader(self, batch_size: int, seed: int, device: torch.device) -> IndexedLoader: ...


def load_data(config: DataSection) -> Data:
    """The data that a recipe names. Raises ``DataError``."""
    if isinstance(config, GlyphsData):
        from .glyphs.loader import load_glyph_data

        return load_glyph_data(config)
    from .arrays import load_image_data, random_images

    if isinstance(config, SyntheticData) or config.synthetic is not None:
        return random_images(config)
    if isinstance(config, ImageData):
        return load_image_data(config)
    if config.root is None:
        raise DataError(
            "data.root is missing: where the images are (data.synthetic=64 tries a recipe without)"
        )
    from .files import load_file_data

    return load_file_data(config)
