"""Images of the user's own that fit into memory, in ``train.npz`` and ``test.npz``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastkd.errors import DataError
from fastkd.files.regular import open_regular
from fastkd.messages import not_utf8, other_class
from fastkd.recipe.sections import ArraysData

from .arrays import ArrayData, Kind, array_data
from .shards import LARGEST_LABEL

_LEVELS = torch.arange(256, dtype=torch.float64) / 255


class _Part(NamedTuple):
    images: Tensor  # uint8 [N, C, H, W]
    target: Tensor  # int64 [N]
    names: tuple[str, ...] | None  # of the classes


def load_npz_data(config: ArraysData) -> ArrayData:
    """Load ``train.npz`` and ``test.npz`` of ``data.folder``. Raises ``DataError``.

    Each has ``images``, uint8 ``[N, C, H, W]``, and ``target``, integers ``[N]``; ``train.npz`` may have the
    names of its ``classes``, which those of ``test.npz`` must equal.
    """
    if config.folder is None:
        raise DataError(
            "data.folder is missing: the folder of train.npz and test.npz (data.synthetic=64 works without)"
        )
    folder = Path(config.folder)
    if not folder.is_dir():
        raise DataError(f"data.folder: {folder} is not a folder; expected one with train.npz and test.npz")
    train, test = (_read(folder / f"{part}.npz") for part in ("train", "test"))
    classes = len(train.names) if train.names is not None else int(train.target.max()) + 1
    if classes < 2:
        raise DataError(f"data.folder: {folder / 'train.npz'} has 1 class, expected at least 2")
    for name, part in (("train", train), ("test", test)):
        if (largest := int(part.target.max())) >= classes:
            raise DataError(
                f"data.folder: the target of {folder / name}.npz goes up to {largest}, expected 0 to "
                f"{classes - 1}: train.npz has {classes} classes"
            )
    if None not in (train.names, test.names):
        # Labels are compared as numbers: with the names in another order validation would be silently wrong.
        difference = other_class(test.names or (), train.names or ())
        if difference is not None:
            raise DataError(
                f"data.folder: classes of {folder / 'test.npz'}: {difference} as in train.npz; both need the "
                "same names in the same order"
            )
    shape, other = train.images.shape[1:], test.images.shape[1:]
    if shape != other:
        raise DataError(
            f"data.folder: the images of {folder / 'test.npz'} are {_times(other)}, expected {_times(shape)} "
            "as in train.npz (channels x height x width)"
        )
    channels, side = shape[0], shape[1]
    mean, std = _moments(train.images, folder / "train.npz")
    # As for CIFAR-100, random crops move an image by up to an eighth of its side.
    title = folder.resolve().name
    kind = Kind(title, classes, channels, side, mean, std, padding=side // 8, measured=True)
    return array_data(config, kind, train[:2], test[:2], train.names)


def _read(path: Path) -> _Part:
    """Read and check one file."""
    arrays = _arrays(path)
    for key in ("images", "target"):
        if key not in arrays:
            held = ", ".join(arrays) or "nothing"
            raise DataError(f"data.folder: {path} has no array {key!r}; it holds {held}")
    images, target, names = arrays["images"], arrays["target"], arrays.get("classes")
    shape = images.shape
    if images.dtype != np.uint8 or images.ndim != 4 or shape[2] != shape[3] or 0 in shape[1:]:
        raise DataError(
            f"data.folder: images of {path} are {images.dtype} {list(shape)}, "
            "expected uint8 [N, C, H, W] with H = W"
        )
    if target.dtype.kind not in "iu" or target.ndim != 1:
        raise DataError(
            f"data.folder: target of {path} is {target.dtype} {list(target.shape)}, expected integers [N]"
        )
    if len(images) != len(target):
        raise DataError(f"data.folder: {path} has {len(images)} images and {len(target)} labels in target")
    if not len(images):
        raise DataError(f"data.folder: {path} has no images")
    if int(target.min()) < 0 or int(target.max()) > LARGEST_LABEL:
        wrong = target.min() if int(target.min()) < 0 else target.max()
        raise DataError(f"data.folder: target of {path} has {wrong}, expected 0 to {LARGEST_LABEL}")
    if names is not None and (names.dtype.kind != "U" or names.ndim != 1 or not len(names)):
        raise DataError(
            f"data.folder: classes of {path} are {names.dtype} {list(names.shape)}, "
            "expected one string per class"
        )
    if names is not None and (name := not_utf8(map(str, names))) is not None:
        raise DataError(
            f"data.folder: classes of {path} have a name {name!r}, expected text that can be written as UTF-8"
        )
    return _Part(
        torch.from_numpy(np.ascontiguousarray(images)),
        torch.from_numpy(target.astype(np.int64)),
        None if names is None else tuple(map(str, names)),
    )


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an npz file. Pickled ones are refused, since loading them could run code."""
    try:
        with open(open_regular(path), "rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                raise DataError(f"data.folder: {path} is a single array (.npy), expected an .npz file")
            return {key: loaded[key] for key in loaded.files}
    except FileNotFoundError:
        raise DataError(
            f"data.folder: {path.parent} has no {path.name}; expected train.npz and test.npz"
        ) from None
    except DataError:
        raise
    # Damage shows as an error of zipfile, zlib, struct or NumPy, or as a size that no memory has.
    except Exception as error:
        if "allow_pickle" in str(error) or "pickled data" in str(error):
            raise DataError(
                f"data.folder: {path} is no .npz file, or holds pickled objects, which are not loaded since "
                "that could run code; expected arrays of numbers, and of strings (dtype U) for classes"
            ) from None
        raise DataError(f"data.folder: {path} cannot be read: {error or type(error).__name__}") from None


def _moments(images: Tensor, path: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, of pixels in 0..1."""
    means, stds = [], []
    for channel in range(images.shape[1]):
        # From a histogram: exact, and without a copy of the images in floating point.
        share = torch.bincount(images[:, channel].flatten(), minlength=256).double()
        share /= share.sum()
        mean = float((share * _LEVELS).sum())
        variance = float((share * (_LEVELS - mean) ** 2).sum())
        if int((share > 0).sum()) == 1:
            raise DataError(
                f"data.folder: channel {channel} of the images of {path} is {round(mean * 255)} everywhere; "
                "it cannot be normalised by its standard deviation of 0: leave the channel out"
            )
        means.append(mean)
        stds.append(math.sqrt(variance))
    return tuple(means), tuple(stds)


def _times(shape: torch.Size) -> str:
    return " x ".join(map(str, shape))
