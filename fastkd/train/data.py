"""What training needs of a data set, and which one a recipe means."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .recipe import DataSection, GlyphsData


class Loader(Protocol):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...

    def __len__(self) -> int: ...

    def set_epoch(self, epoch: int) -> None: ...


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

    def val_loader(self, device: torch.device) -> Loader: ...

    def example(self) -> tuple[Tensor, Tensor]: ...


def load_data(config: DataSection) -> Data:
    """The data that a recipe names. Raises ``DataError``."""
    if isinstance(config, GlyphsData):
        from .glyph_data import load_glyph_data

        return load_glyph_data(config)
    from .image_data import load_image_data

    return load_image_data(config)
