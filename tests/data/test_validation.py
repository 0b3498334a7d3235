"""``ValidationTransform``: the same bits as the loaders of every kind of data; other images."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor
from torchvision.datasets import ImageFolder

import fastkd
from fastkd.data.arrays import KINDS
from fastkd.data.data import Data, load_data
from fastkd.recipe.sections import ArraysData, FolderData, GlyphsData, ImageData, ShardData

from .image_trees import make_shards, make_tree
from .test_npz import write

CPU = torch.device("cpu")
HALF = {"mean": [0.5], "std": [0.25]}


def validated(data: Data) -> Tensor:
    return torch.cat([images for images, _ in data.val_loader(CPU, 4)])


@pytest.mark.parametrize(("size", "resize"), [(32, None), (40, 40), (24, 60)])
def test_jpeg_files_through_torchvisions_imagefolder(tmp_path: Path, size: int, resize: int | None) -> None:
    make_tree(tmp_path)
    data = load_data(FolderData(name="imagefolder", root=str(tmp_path), size=size, resize=resize, workers=0))
    folder = ImageFolder(str(tmp_path / "val"), transform=data.transform)
    assert torch.equal(torch.stack([image for image, _ in folder]), validated(data))
    assert data.class_names == folder.classes


def test_tensors_of_jpeg_files_are_scaled_alike(tmp_path: Path) -> None:
    make_tree(tmp_path)
    data = load_data(FolderData(name="imagefolder", root=str(tmp_path), size=24, workers=0))
    pixels = [image for image, _ in ImageFolder(str(tmp_path / "val"), transform=_pixels)]
    assert torch.equal(torch.stack([data.transform(image) for image in pixels]), validated(data))
    same_size = torch.stack([pixels[0], pixels[0].flip(-1)])
    assert torch.equal(data.transform(same_size)[0], data.transform(pixels[0]))


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_arrays(tmp_path: Path, channels: int) -> None:
    write(tmp_path / "own", channels=channels, classes=np.array(list("abcde")))
    data = load_data(ArraysData(name="arrays", folder=str(tmp_path / "own")))
    images = torch.from_numpy(np.load(tmp_path / "own" / "test.npz")["images"])
    assert torch.equal(data.transform(images), validated(data))
    assert torch.equal(data.transform(images[3]), validated(data)[3])
    assert data.class_names == ("a", "b", "c", "d", "e")
    if channels != 2:
        array = images[3, 0].numpy() if channels == 1 else images[3].permute(1, 2, 0).numpy()
        assert torch.equal(data.transform(Image.fromarray(array)), validated(data)[3])


def test_two_channels_come_as_tensors() -> None:
    transform = fastkd.ValidationTransform(channels=2, resize=16, crop=16, mean=[0.5] * 2, std=[0.25] * 2)
    assert transform(torch.zeros(2, 8, 9, dtype=torch.uint8)).shape == (2, 16, 16)
    with pytest.raises(
        ValueError, match=r"image is a PIL image, .* 2 channels; expected a uint8 tensor \[2, H"
    ):
        transform(Image.new("L", (16, 16)))


def test_glyphs(fonts: Path) -> None:
    data = load_data(GlyphsData(fonts=str(fonts), characters="41-5A,391-3A9"))
    raw = torch.from_numpy(np.concatenate([data.images[face] for face in data.val_faces]))[:, None]
    assert torch.equal(data.transform(raw), validated(data))
    picture = Image.fromarray(raw[5, 0].numpy())
    assert torch.equal(data.transform(picture), validated(data)[5])
    assert torch.equal(data.transform(picture.convert("RGB")), validated(data)[5])
    # Latin A and Greek Alpha look the same in these faces: one class.
    assert data.class_names[0] == "AΑ"  # noqa: RUF001
    assert len(data.class_names) == data.num_classes


def test_names_of_classes_of_other_data(tmp_path: Path) -> None:
    make_shards(tmp_path)
    pytest.importorskip("webdataset")
    shards = load_data(ShardData(name="webdataset", root=str(tmp_path), size=32, workers=0))
    assert shards.class_names is None
    for name in KINDS:
        assert load_data(ImageData(name=name, synthetic=4)).class_names is None


def test_it_survives_json_and_pickle_to_the_bit() -> None:
    mean, std = [1 / 3, 0.1, 2 / 7], [0.3, 1 / 9, 0.7]
    transform = fastkd.ValidationTransform(channels=3, resize=36, crop=32, mean=mean, std=std)
    images = torch.randint(0, 256, (2, 3, 50, 41), dtype=torch.uint8)
    again = fastkd.ValidationTransform(**json.loads(transform.model_dump_json()))
    assert again == transform == pickle.loads(pickle.dumps(transform))
    assert torch.equal(again(images), transform(images))
    assert transform(images).shape == (2, 3, 32, 32)
    assert transform(images).dtype == torch.float32


def test_pictures_of_any_mode_and_size() -> None:
    rgb = fastkd.ValidationTransform(channels=3, resize=16, crop=16, mean=[0.5] * 3, std=[0.25] * 3)
    grey = fastkd.ValidationTransform(channels=1, resize=16, crop=16, **HALF)
    for mode in ("L", "RGB", "RGBA", "P", "CMYK", "1", "I;16"):
        picture = Image.new(mode, (40, 20))
        assert rgb(picture).shape == (3, 16, 16)
        assert grey(picture).shape == (1, 16, 16)
    white = grey(Image.new("L", (40, 20), 255))
    torch.testing.assert_close(white, torch.full((1, 16, 16), 2.0))


@pytest.mark.parametrize(
    ("image", "kind", "message"),
    [
        ("cat.png", TypeError, "image is a str; expected a PIL image"),
        (np.zeros((3, 16, 16), np.uint8), TypeError, "image is a ndarray; expected a PIL image"),
        (torch.zeros(3, 16, 16), ValueError, r"image is torch.float32 \[3, 16, 16\]; expected uint8"),
        (torch.zeros(1, 16, 16, dtype=torch.uint8), ValueError, r"expected uint8 \[3, H, W\]"),
        (torch.zeros(16, 16, dtype=torch.uint8), ValueError, r"image is torch.uint8 \[16, 16\]"),
    ],
)
def test_refused_images(image: Any, kind: type[Exception], message: str) -> None:
    transform = fastkd.ValidationTransform(channels=3, resize=16, crop=16, mean=[0.5] * 3, std=[0.25] * 3)
    with pytest.raises(kind, match=message):
        transform(image)


@pytest.mark.parametrize(
    "wrong",
    [{"mean": [0.5, 0.5]}, {"std": [0.0]}, {"std": [float("nan")]}, {"crop": 0}, {"interpolation": "x"}],
)
def test_refused_values(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        fastkd.ValidationTransform(**{"channels": 1, "resize": 8, "crop": 8, **HALF, **wrong})


def test_a_crop_that_would_be_padded() -> None:
    with pytest.raises(ValidationError, match=r"resize = 7 is less than crop = 8: .* padded with black"):
        fastkd.ValidationTransform(channels=1, resize=7, crop=8, **HALF)
    for kind, name in ((FolderData, "imagefolder"), (ShardData, "webdataset")):
        with pytest.raises(ValidationError, match=r"resize = 32 is less than size = 64: .* at least 64"):
            kind(name=name, size=64, resize=32)
