"""The interface of data sets, and loading the one that a recipe names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastkd.errors import DataError
from fastkd.recipe.sections import ArraysData, DataSection, GlyphsData, ImageData, SyntheticData

from .order import IndexedLoader
from .validation import ValidationTransform


class Loader(Protocol):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...

    def __len__(self) -> int: ...

    def set_epoch(self, epoch: int) -> None: ...

    def sizes(self) -> list[int]:
        """Sizes of the first and the last batch of an epoch; see ``EpochOrder.sizes``."""


class Data(Protocol):
    @property
    def num_classes(self) -> int: ...

    @property
    def channels(self) -> int: ...

    @property
    def class_names(self) -> Sequence[str] | None:
        """By label; None if the data have none."""

    @property
    def transform(self) -> ValidationTransform:
        """What ``val_loader`` does to an image."""

    @property
    def notes(self) -> Sequence[str]: ...

    @property
    def fingerprint(self) -> list[object]:
        """Everything about the data that a trained network depends on."""

    def describe(self) -> str: ...

    @property
    def content(self) -> list[object]:
        """Identifies the training images."""

    @property
    def augmentation(self) -> dict[str, object]:
        """Every setting that decides how a training image is shown, except the seed."""

    @property
    def samples(self) -> int:
        """Number of training images."""

    @property
    def varies(self) -> bool:
        """Whether images differ between epochs."""

    def drawn_with(self, batch_size: int, device: torch.device) -> dict[str, object]:
        """What of the batch size and the kind of device decides the images of an epoch, by name."""

    def train_loader(self, batch_size: int, seed: int, device: torch.device) -> IndexedLoader: ...

    def val_loader(self, device: torch.device, batch_size: int) -> Loader: ...

    def example(self) -> tuple[Tensor, Tensor]: ...


def load_data(config: DataSection) -> Data:
    """Load the data that a recipe names. Raises ``DataError``."""
    if isinstance(config, GlyphsData):
        from .glyphs.loader import load_glyph_data

        return load_glyph_data(config)
    from .arrays import load_image_data, random_images

    if isinstance(config, SyntheticData) or config.synthetic is not None:
        return random_images(config)
    if isinstance(config, ImageData):
        return load_image_data(config)
    if isinstance(config, ArraysData):
        from .npz import load_npz_data

        return load_npz_data(config)
    if config.root is None:
        raise DataError(
            "data.root is missing: the folder of the images (data.synthetic=64 tries a recipe without data)"
        )
    from .files import load_file_data

    return load_file_data(config)
