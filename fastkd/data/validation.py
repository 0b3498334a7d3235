"""The transform of validation as an object: what a trained network needs to see a picture as in training."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fastkd.recipe.sections import Count, Positive, Section, check_crop

from .pixels import to_rgb
from .transforms import Normalize, central_crop

Finite = Annotated[float, Field(allow_inf_nan=False)]


class ValidationTransform(Section):
    """What the trainer's validation does to an image: resize, crop, (x / 255 - mean) / std.

    Called with a PIL image, or with uint8 ``[C, H, W]``, it returns float32 ``[C, crop, crop]``; of a batch,
    uint8 ``[N, C, H, W]``, float32 ``[N, C, crop, crop]`` on the batch's device. The image of a PIL file is
    read as in training: to RGB, or to grey for one channel; transparency is dropped and EXIF rotation not
    applied. An image that validation saw is transformed to the same bits.

    Data in memory (arrays, Fashion-MNIST, CIFAR-100, glyphs) are validated as they are, and then ``resize``
    and ``crop`` are their side: other pictures are brought to it. Networks trained on glyphs or Fashion-MNIST
    expect white on black.

    Args:
        channels: C. PIL images are taken for 1 and 3.
        resize: shorter side, in pixels, to which the image is scaled with antialiasing.
        crop: side of the central crop after that, at most ``resize``.
        interpolation: of the scaling.
        mean: of each channel, of pixels in 0..1.
        std: likewise.

    Raises ``TypeError`` or ``ValueError`` for an image of another type or number of channels.
    """

    channels: Count
    resize: Count
    crop: Count
    interpolation: Literal["bilinear"] = "bilinear"
    mean: list[Finite]
    std: list[Positive]

    @model_validator(mode="after")
    def _one_per_channel(self) -> ValidationTransform:
        for name in ("mean", "std"):
            count = len(getattr(self, name))
            if count != self.channels:
                raise ValueError(
                    f"{name} has {count} numbers, expected one for each of {self.channels} channels"
                )
        return self

    @model_validator(mode="after")
    def _crop_fits(self) -> ValidationTransform:
        check_crop(self.resize, "crop", self.crop)
        return self

    def __call__(self, image: Any) -> Tensor:
        return self._normalized(self._sized(image if isinstance(image, Tensor) else self._pixels(image)))

    def _normalized(self, pixels: Tensor) -> Tensor:
        batch = pixels if pixels.dim() == 4 else pixels[None]
        normalized = Normalize(self.mean, self.std, pixels.device)(batch)
        return normalized if pixels.dim() == 4 else normalized[0]

    def _sized(self, image: Tensor) -> Tensor:
        """uint8 ``[…, C, crop, crop]`` of a tensor."""
        if image.dtype != torch.uint8 or image.dim() not in (3, 4) or image.shape[-3] != self.channels:
            channels = self.channels
            raise ValueError(
                f"image is {image.dtype} {list(image.shape)}; expected uint8 [{channels}, H, W] or "
                f"[N, {channels}, H, W], or a PIL image"
            )
        return central_crop(self.crop, self.resize)(image)

    def _pixels(self, image: Any) -> Tensor:
        """uint8 ``[C, H, W]`` of a PIL image."""
        from PIL import Image
        from torchvision.transforms.v2.functional import pil_to_tensor

        if not isinstance(image, Image.Image):
            raise TypeError(
                f"image is a {type(image).__name__}; expected a PIL image, or a uint8 tensor [C, H, W]"
            )
        if self.channels not in (1, 3):
            raise ValueError(
                f"image is a PIL image, but the network takes {self.channels} channels; expected a uint8 "
                f"tensor [{self.channels}, H, W]"
            )
        image = to_rgb(image)
        pixels: Tensor = pil_to_tensor(image.convert("L") if self.channels == 1 else image)
        return pixels
