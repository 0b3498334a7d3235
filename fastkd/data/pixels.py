"""Decoding to 8-bit RGB, of every Pillow mode at its brightness (``Image.convert`` clips 16 bits)."""

from __future__ import annotations

import io
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fastkd.errors import DataError
from fastkd.messages import first_line

Decoder = Literal["pillow", "torchcodec"]
_TIFF_BITS, _TIFF_PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0


def decode(content: bytes, decoder: Decoder = "pillow") -> Tensor:
    """The image in a file's ``content`` as uint8 ``[3, H, W]``. Raises Pillow's errors.

    torchcodec decodes JPEG files of three components; all others, and those that it refuses, are Pillow's.
    """
    from PIL import Image
    from torchvision.transforms.v2.functional import pil_to_tensor

    if decoder == "torchcodec" and content[:2] == b"\xff\xd8":
        pixels = _by_torchcodec(content)
        if pixels is not None:
            return pixels
    with Image.open(io.BytesIO(content)) as image:
        tensor: Tensor = pil_to_tensor(to_rgb(image))
        return tensor


def _by_torchcodec(content: bytes) -> Tensor | None:
    try:
        pixels: Tensor = torchcodec_decoders().decode_jpeg(
            torch.frombuffer(bytearray(content), dtype=torch.uint8), mode="UNCHANGED"
        )
    except RuntimeError:
        return None
    return pixels if len(pixels) == 3 else None


def torchcodec_decoders() -> Any:
    """Raises ``DataError`` if torchcodec cannot decode JPEG files here."""
    try:
        from torchcodec import decoders
    except (ImportError, OSError, RuntimeError) as error:
        raise DataError(
            f"data.decoder = torchcodec needs the torchcodec library: {first_line(error)}; "
            'pip install "fastkd[torchcodec]"'
        ) from None
    if not hasattr(decoders, "decode_jpeg"):
        raise DataError('data.decoder = torchcodec needs torchcodec 0.16: pip install "fastkd[torchcodec]"')
    return decoders


def to_rgb(image: Any) -> Any:
    """Convert a Pillow ``image`` to RGB.

    As in torchvision, transparency is dropped and EXIF rotation is not applied. Raises ``ValueError`` for
    pixels whose white value is unknown: floating point and 32-bit integers.
    """
    mode = image.mode
    if mode == "RGB":
        return image  # convert() would copy it
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
