"""Batches of glyphs: split by face, augmented per batch, reproducible from a seed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from fastkd.data.order import EpochOrder, IndexedLoader, rows_of
from fastkd.data.validation import ValidationTransform
from fastkd.errors import DataError
from fastkd.recipe.sections import GlyphsData

from .fonts import DEJAVU_HOLDOUT, split_faces
from .render import GlyphSet, load_glyphs

# Largest changes at strength 1.
_ROTATION = math.radians(8)
_SCALE = 0.10
_SHEAR = 0.10
_SHIFT = 2 / 16  # of half the side: two pixels
_NOISE = 0.08  # standard deviation, ink is 1


@dataclass(frozen=True)
class GlyphData:
    """Rendered glyphs and how they are split; see ``load_glyph_data``."""

    glyphs: GlyphSet
    images: NDArray[np.uint8]  # [faces, classes, 32, 32]
    train_faces: list[int]
    val_faces: list[int]
    augment: float

    @property
    def num_classes(self) -> int:
        return self.images.shape[1]

    @property
    def channels(self) -> int:
        return 1

    @property
    def class_names(self) -> list[str]:
        """The characters of each class; several if they look the same."""
        return ["".join(map(chr, points)) for points in self.glyphs.classes]

    @property
    def transform(self) -> ValidationTransform:
        side = self.images.shape[-1]
        return ValidationTransform(channels=1, resize=side, crop=side, mean=[0.0], std=[1.0])

    @property
    def notes(self) -> list[str]:
        return self.glyphs.notes

    @property
    def augmentation(self) -> dict[str, object]:
        return {"strength": self.augment}

    @property
    def content(self) -> list[object]:
        return [self.glyphs.digest, self.train_faces]

    @property
    def samples(self) -> int:
        return len(self.train_faces) * self.num_classes

    @property
    def varies(self) -> bool:
        return self.augment > 0

    def drawn_with(self, batch_size: int, device: torch.device) -> dict[str, object]:
        # Drawn for whole batches on the device, whose generator gives other numbers than the CPU's.
        return {"batch_size": batch_size, "device": device.type} if self.varies else {}

    @property
    def fingerprint(self) -> list[object]:
        return [self.glyphs.digest, self.train_faces, self.val_faces, self.augment]

    def describe(self) -> str:
        return (
            f"{self.num_classes:,} classes, {len(self.train_faces)} training faces, "
            f"{len(self.val_faces)} held out: "
            + ", ".join(self.glyphs.faces[i] for i in self.val_faces[:6])
            + (", …" if len(self.val_faces) > 6 else "")
        )

    def train_loader(self, batch_size: int, seed: int, device: torch.device) -> GlyphLoader:
        return GlyphLoader(
            self.images, self.train_faces, batch_size, device=device, seed=seed, augment=self.augment
        )

    def val_loader(self, device: torch.device, batch_size: int = 512) -> GlyphLoader:
        return GlyphLoader(self.images, self.val_faces, batch_size, device=device)

    def example(self) -> tuple[Tensor, Tensor]:
        """Two images and their labels, as a network gets them."""
        return next(iter(self.val_loader(torch.device("cpu"), batch_size=2)))


def load_glyph_data(config: GlyphsData) -> GlyphData:
    """Render the glyphs or read them from the cache, and split them by face. Raises ``DataError``."""
    glyphs, images = load_glyphs(config.fonts, config.characters, config.coverage)
    holdout = config.holdout
    if holdout is None and config.fonts is None:
        # Some may be excluded or lack too many characters; no error, since the user named none of them.
        left = [face for face in glyphs.faces if face not in (config.exclude or ())]
        holdout = [face for face in DEJAVU_HOLDOUT if face in left]
        if not 0 < len(holdout) < len(left):
            holdout = None
    train, val = split_faces(glyphs.faces, glyphs.files, holdout, config.exclude)
    return GlyphData(glyphs, images, train, val, config.augment)


class GlyphLoader(IndexedLoader):
    """Batches of ``(images, target)``: float32 ``[N, 1, 32, 32]`` with ink 1, and int64 classes ``[N]``.

    With a ``seed`` the images are shuffled and augmented in each epoch, and epoch k of a seed is always the
    same, for one batch size and kind of device. Without one they come in order and as rendered.
    """

    def __init__(
        self,
        images: NDArray[np.uint8],
        faces: list[int],
        batch_size: int,
        *,
        device: torch.device,
        seed: int | None = None,
        augment: float = 0.0,
    ) -> None:
        if not faces:
            raise DataError("no faces to load")
        self._images = images
        self._faces = np.asarray(faces)
        self._device = device
        self._seed = seed
        self._augment = augment
        super().__init__(EpochOrder(len(faces) * images.shape[1], batch_size, seed))

    def indexed(
        self, start: int = 0, rank: int = 0, world: int = 1, even: bool = False
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """``(images, target, sample indices)``. Every rank draws the changes of the whole batches."""
        classes = self._images.shape[1]
        generator = torch.Generator(self._device)
        # Unique for seeds below 2**31 and epochs below 2**20.
        generator.manual_seed((self._seed or 0) * 2**20 + self._order.epoch)
        for batch in self._order.batches():
            augments = self._augment and self._seed is not None
            if batch.position < start and not augments:
                continue
            face, target = np.divmod(batch.samples, classes)
            pixels = torch.from_numpy(self._images[self._faces[face], target])
            images = pixels.to(self._device, non_blocking=True).unsqueeze(1).float().div_(255)
            if augments:
                # Before ``start`` too: the generator must have drawn as much as in a whole epoch.
                images = augment_batch(images, self._augment, generator)
            if batch.position < start:
                continue
            own = rows_of(len(target), rank, world, even=even)
            labels = torch.from_numpy(target[own]).to(self._device, non_blocking=True)
            yield images[own], labels, torch.from_numpy(batch.samples[own])


def augment_batch(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Apply a small random affine map and Gaussian noise to each image of ``[N, 1, H, W]``, in one batch."""
    n, device = len(images), images.device
    # [N, 5]: rotation, scale, shear and two shifts, uniform in -strength..strength.
    uniform = (torch.rand(n, 5, generator=generator, device=device) * 2 - 1) * strength
    angle, scale, shear, shift_x, shift_y = uniform.unbind(1)
    scale = 1 + scale * _SCALE
    cos, sin = (angle * _ROTATION).cos() * scale, (angle * _ROTATION).sin() * scale
    rows = (
        torch.stack([cos, -sin + shear * _SHEAR, shift_x * _SHIFT], dim=1),
        torch.stack([sin, cos, shift_y * _SHIFT], dim=1),
    )
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    warped = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    noise = torch.randn(images.shape, generator=generator, device=device)
    return warped.add_(noise, alpha=_NOISE * strength)
