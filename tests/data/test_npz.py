"""Images of the user's own in train.npz and test.npz. Bad ones: tests/train/bad_inputs/arrays.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastkd.cli import main
from fastkd.data.arrays import ArrayData
from fastkd.data.data import load_data
from fastkd.errors import DataError, RecipeError
from fastkd.recipe.schema import load_recipe
from fastkd.recipe.sections import ArraysData

CPU = torch.device("cpu")


def write(folder: Path, *, channels: int = 3, side: int = 16, compressed: bool = False, **more: Any) -> None:
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    save = np.savez_compressed if compressed else np.savez
    for part, count in (("train", 30), ("test", 12)):
        images = random.integers(0, 200, (count, channels, side, side), np.uint8)
        save(folder / f"{part}.npz", images=images, target=np.arange(count) % 5, **more)


def load(folder: Path, **options: Any) -> ArrayData:
    data = load_data(ArraysData(name="arrays", folder=str(folder), **options))
    assert isinstance(data, ArrayData)
    return data


@pytest.mark.parametrize(("channels", "side", "compressed"), [(3, 16, False), (1, 9, True)])
def test_images_are_normalised_by_their_own_moments(
    tmp_path: Path, channels: int, side: int, compressed: bool
) -> None:
    write(tmp_path / "own", channels=channels, side=side, compressed=compressed)
    data = load(tmp_path / "own", augment=False)
    assert (data.num_classes, data.channels, data.samples) == (5, channels, 30)
    assert data.describe() == (
        "own (validated on its test images), 5 classes, 30 training images, 12 to validate"
    )
    assert data.kind.padding == side // 8
    loader = data.train_loader(30, 0, CPU)
    images, _ = next(iter(loader))
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(channels), atol=1e-5, rtol=0)
    torch.testing.assert_close(images.std((0, 2, 3), correction=0), torch.ones(channels), atol=1e-5, rtol=0)
    _, target = next(iter(data.val_loader(CPU)))
    assert target.tolist() == [label % 5 for label in range(12)]


def test_any_integers_order_and_named_classes(tmp_path: Path) -> None:
    write(tmp_path / "own", classes=np.array(list("abcdefg")))
    path = tmp_path / "own" / "train.npz"
    with np.load(path) as file:
        arrays = dict(file)
    before = load(tmp_path / "own")
    arrays |= {"images": np.asfortranarray(arrays["images"]), "target": arrays["target"].astype(">u2")}
    np.savez(path, **arrays)
    after = load(tmp_path / "own")
    assert after.num_classes == 7
    assert after.fingerprint == before.fingerprint


def test_the_fingerprint_is_of_the_content_not_of_the_folder(tmp_path: Path) -> None:
    write(tmp_path / "own")
    whole = load(tmp_path / "own")
    assert json.loads(json.dumps(whole.fingerprint)) == whole.fingerprint
    (tmp_path / "own").rename(tmp_path / "renamed")
    assert load(tmp_path / "renamed").fingerprint == whole.fingerprint
    held = load(tmp_path / "renamed", holdout=10)
    assert (len(held.train[1]), len(held.val[1])) == (20, 10)
    assert held.fingerprint != whole.fingerprint
    write(tmp_path / "named", classes=np.array(list("abcdefg")))  # a network has more outputs
    assert load(tmp_path / "named").fingerprint != whole.fingerprint
    with pytest.raises(DataError, match=r"data\.holdout = 30 leaves none of 30"):
        load(tmp_path / "renamed", holdout=30)


def test_without_files() -> None:
    data = load_data(ArraysData(name="arrays", synthetic=8, mixup=0.2))
    images, target = data.example()
    assert (images.shape, target.shape) == ((2, 3, 32, 32), (2, 100))
    with pytest.raises(DataError, match=r"data\.folder is missing: the folder of train\.npz"):
        load_data(ArraysData(name="arrays"))
    with pytest.raises(RecipeError, match=r"unknown key 'data\.download'"):
        load_recipe("cifar100/kd-resnet56-resnet20", ["data.name=arrays", "data.download=true"])


def test_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "own")
    small = [
        "data.name=arrays",
        "data.folder=own",
        "student.width=2",
        "teacher.width=2",
        "teacher.epochs=1",
        "train.epochs=1",
        "train.batch_size=10",
        "train.device=cpu",
    ]
    assert main(["train", "fashion-mnist/kd", *small]) == 0
    assert "own (validated on its test images), 5 classes" in capsys.readouterr().out
    (run,) = (tmp_path / "runs").glob("fashion-mnist-*")
    (tmp_path / "own").rename(tmp_path / "elsewhere")
    assert main(["train", "--resume", str(run), "data.folder=elsewhere", "--eval-only"]) == 0
