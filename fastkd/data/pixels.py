"""Conversion of Pillow's modes to 8-bit RGB with correct brightness (``Image.convert`` clips 16 bits)."""

from __future__ import annotations

from typing import Any

import numpy as np

_TIFF_BITS, _TIFF_PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0


def to_rgb(image: Any) -> Any:
    """Convert a Pillow ``image`` to RGB.

    As in torchvision, transparency is dropped and EXIF rotation is not applied. Raises ``ValueError`` for
    pixels whose white value is unknown: floating point and 32-bit integers.
    """
    mode = image.mode
    # Depending on its version Pillow reads 16-bit PNG and PGM as I or I;16; it scales PGM's white to 65535.
    if mode.startswith("I;16") or (mode == "I" and image.format in ("PNG", "PPM")):
        return _from_grey(image)
    if mode in ("I", "F"):
        what = "floating-point" if mode == "F" else "32-bit integer"
        raise ValueError(
            f"{what} pixels (mode {mode}) do not define which value is white; convert it to 8 or 16 bits"
        )
    if mode in ("P", "PA", "RGBa", "La") and (mode != "P" or "transparency" in image.info):
        image = image.convert("LA" if mode == "La" else "RGBA")  # Pillow cannot do it in one step, or warns
    return image.convert("RGB")


def _from_grey(image: Any) -> Any:
    from PIL import Image

    tags = getattr(image, "tag_v2", {})
    bits = int(np.ravel(tags.get(_TIFF_BITS, 16))[0])  # 12-bit TIFF files are read unscaled into 16 bits
    white = 2**bits - 1
    values = np.asarray(image).astype(np.float32).clip(0, white) * (255 / white)
    if tags.get(_TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO:
        values = 255 - values
    return Image.fromarray(np.rint(values).astype(np.uint8)).convert("RGB")
