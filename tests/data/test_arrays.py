"""Image data sets from files, and every image recipe on a few random images."""

from __future__ import annotations

import gzip
import math
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastkd.cli import main
from fastkd.data.arrays import ArrayData, crop_and_flip, draw_moves, load_image_data
from fastkd.data.data import load_data
from fastkd.data.order import split_off
from fastkd.errors import DataError
from fastkd.recipe.files import shipped_recipes
from fastkd.recipe.schema import load_recipe
from fastkd.recipe.sections import ImageData
from fastkd.train.loop import fit_method
from fastkd.train.optimization import build_optimizer, build_scheduler
from fastkd.train.run.build import build_method, build_network

CPU = torch.device("cpu")
RANDOM = np.random.default_rng(0)


def idx(values: np.ndarray) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def fashion(folder: Path, zipped: bool) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True)
    content = {}
    for stem, count in (("train", 30), ("t10k", 12)):
        content[f"{stem}-images-idx3-ubyte"] = RANDOM.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        content[f"{stem}-labels-idx1-ubyte"] = RANDOM.integers(0, 10, count, dtype=np.uint8)
    for name, values in content.items():
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(values)))
        else:
            (folder / name).write_bytes(idx(values))
    return content


def load(folder: Path, **options: Any) -> ArrayData:
    data = load_image_data(ImageData(name="fashion_mnist", folder=str(folder), **options))
    assert isinstance(data, ArrayData)
    return data


@pytest.mark.parametrize(("below", "zipped"), [(".", True), ("FashionMNIST/raw", False)])
def test_fashion_mnist_as_debian_and_as_torchvision_have_it(tmp_path: Path, below: str, zipped: bool) -> None:
    content = fashion(tmp_path / "data" / below, zipped)
    data = load(tmp_path / "data")
    assert (data.num_classes, data.channels) == (10, 1)
    assert data.class_names is not None
    assert (data.class_names[0], data.class_names[9]) == ("T-shirt/top", "Ankle boot")
    images, target = next(iter(data.val_loader(CPU)))
    assert images.shape == (12, 1, 28, 28)
    expected = (content["t10k-images-idx3-ubyte"] / 255 - 0.2860) / 0.3530
    np.testing.assert_allclose(images[:, 0].numpy(), expected, rtol=1e-4, atol=1e-5)
    assert target.tolist() == content["t10k-labels-idx1-ubyte"].tolist()
    assert "validated on its test images" in data.describe()


def test_a_part_of_the_training_images_held_out(tmp_path: Path) -> None:
    content = fashion(tmp_path / "data", True)
    data, whole = load(tmp_path / "data", holdout=10), load(tmp_path / "data")
    assert (len(data.train[1]), len(data.val[1])) == (20, 10)
    both = torch.cat([data.train[0], data.val[0]])
    rows = {row.numpy().tobytes() for row in both}
    assert rows == {row.tobytes() for row in content["train-images-idx3-ubyte"]}
    # A run is resumed, and compared, with the images that validated it in any version.
    assert [part.tolist() for part in split_off(10, 3)] == [[7, 3, 5, 9, 0, 8, 1], [4, 6, 2]]
    assert data.fingerprint != whole.fingerprint
    assert "test images unused" in data.describe()
    with pytest.raises(DataError, match=r"data\.holdout = 30 leaves none of 30"):
        load(tmp_path / "data", holdout=30)


def test_epochs_are_shuffled_and_augmented_reproducibly(tmp_path: Path) -> None:
    fashion(tmp_path / "data", True)
    loader = load(tmp_path / "data").train_loader(8, 3, CPU)
    assert len(loader) == 4
    epochs = []
    for epoch in (0, 1, 0):
        loader.set_epoch(epoch)
        torch.rand(3)
        epochs.append([(images.clone(), target) for images, target in loader])
    assert all(
        torch.equal(a, b)
        for x, y in zip(epochs[0], epochs[2], strict=True)
        for a, b in zip(x, y, strict=True)
    )
    assert not torch.equal(epochs[0][0][0], epochs[1][0][0])


def test_an_image_has_its_crop_whatever_its_batch_and_rank(tmp_path: Path) -> None:
    fashion(tmp_path / "data", True)
    plain, mixed = load(tmp_path / "data"), load(tmp_path / "data", mixup=0.3, cutmix=1.0)
    crops = []
    for batch_size in (8, 30):
        loader = plain.train_loader(batch_size, 3, CPU)
        loader.set_epoch(5)
        crops.append(
            {int(i): x for xs, _, chosen in loader.indexed() for i, x in zip(chosen, xs, strict=True)}
        )
    assert all(torch.equal(crop, crops[1][index]) for index, crop in crops[0].items())
    for data in (plain, mixed):
        loader = data.train_loader(8, 3, CPU)
        whole = list(loader)
        parts = [list(loader.batches(2, rank, 2, True)) for rank in range(2)]
        for expected, *got in zip(whole[2:], *parts, strict=True):
            for values, pieces in zip(expected, zip(*got, strict=True), strict=True):
                torch.testing.assert_close(torch.cat(pieces), values, rtol=0, atol=1e-6)
    assert mixed.example()[1].shape == (2, 10)


def test_crops_and_flips() -> None:
    images = torch.arange(1, 13, dtype=torch.uint8).view(1, 1, 3, 4).repeat(200, 1, 1, 1)
    changed = crop_and_flip(images, 1, draw_moves(200, 1, torch.Generator().manual_seed(0)))
    seen = {image.numpy().tobytes() for image in changed}
    assert len(seen) == 18  # 3 x 3 shifts, flipped or not
    padded = torch.nn.functional.pad(images[0, 0], [1] * 4)
    windows = [padded[i : i + 3, j : j + 4] for i in range(3) for j in range(3)]
    assert seen == {w.numpy().tobytes() for window in windows for w in (window.contiguous(), window.flip(1))}
    unmoved = crop_and_flip(images, 0, draw_moves(200, 0, torch.Generator()))
    assert torch.equal(unmoved.sum((1, 2, 3)), images.sum((1, 2, 3)))


def test_bad_fashion_mnist(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    with pytest.raises(DataError, match=r"is not a folder; data\.download=true"):
        load(folder)
    fashion(folder, True)
    file = folder / "train-labels-idx1-ubyte.gz"
    whole = file.read_bytes()
    file.write_bytes(whole[:-12])
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte\.gz cannot be read"):
        load(folder)
    for damage in (b"", b"\0\0", idx(np.zeros((2, 3), np.uint8)), gzip.decompress(whole)[:-1]):
        file.write_bytes(gzip.compress(damage))
        with pytest.raises(DataError, match="is damaged or not in the MNIST format"):
            load(folder)
    file.write_bytes(gzip.compress(idx(np.zeros(3, np.uint8))))
    with pytest.raises(DataError, match="30 train images and 3 labels"):
        load(folder)
    file.unlink()
    with pytest.raises(DataError, match="has no train-labels-idx1-ubyte or"):
        load(folder)


def test_cifar100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name, count in (("train", 8), ("test", 4)):
        rows = {
            "data": RANDOM.integers(0, 256, (count, 3072), dtype=np.uint8),
            "fine_labels": list(range(count)),
        }
        (folder / name).write_bytes(pickle.dumps(rows))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [str(i) for i in range(100)]}))
    config = ImageData(name="cifar100", folder=str(tmp_path))
    with pytest.raises(DataError, match=r"no intact CIFAR-100 .*data\.download=true"):
        load_image_data(config)
    # The files have torchvision's format, but not the checksums of the real ones.
    monkeypatch.setattr("torchvision.datasets.CIFAR100._check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    data = load_image_data(config)
    assert isinstance(data, ArrayData)
    assert (data.num_classes, data.train[0].shape, data.val[0].shape) == (100, (8, 3, 32, 32), (4, 3, 32, 32))
    first = pickle.loads((folder / "train").read_bytes())["data"][0].reshape(3, 32, 32)
    assert torch.equal(data.train[0][0], torch.from_numpy(first))
    assert data.class_names == tuple(map(str, range(100)))  # of the file "meta"
    assert torch.equal(data.transform(data.val[0]), next(iter(data.val_loader(CPU)))[0])


IMAGES = [name for name in shipped_recipes() if not name.startswith("glyphs/")]


@pytest.mark.parametrize("name", IMAGES)
def test_image_recipes_are_short_and_say_where_their_target_is_from(name: str) -> None:
    text = shipped_recipes()[name].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 20
    _, recipe = load_recipe(name)
    ours = name.startswith(("fashion-mnist/", "emoji/"))  # the README has their results
    if not ours:
        assert text.startswith("# Target: ")
        assert recipe.train.schedule == "steps"
        assert (recipe.teacher is None) == (recipe.method == "cross_entropy")
    if recipe.teacher is not None and not ours:
        assert recipe.teacher.schedule == recipe.train.schedule
        assert recipe.teacher.milestones == recipe.train.milestones


def test_the_imagenet_recipes_are_those_of_the_papers() -> None:
    names = {name for name in IMAGES if name.startswith("imagenet/")}
    assert names == {
        f"imagenet/{name}"
        for name in (
            *("r18", "r18-kd", "r18-dkd", "r18-dckd", "r18-dckd-hint", "r18-dhkd", "r18-mhkd"),
            *("mbv1-kd", "mbv1-dkd", "mbv1-dckd", "mbv1-dckd-hint"),
        )
    }
    for name in names - {"imagenet/r18"}:
        _, recipe = load_recipe(name)
        assert recipe.teacher is not None
        assert recipe.teacher.weights == "IMAGENET1K_V1"
        _, mine = load_recipe(name, ["teacher.checkpoint=mine.pt"])
        assert mine.teacher is not None
        assert mine.teacher.weights is None


@pytest.mark.parametrize("name", IMAGES)
def test_image_recipes_train_on_random_images(name: str) -> None:
    _, recipe = load_recipe(
        name,
        [
            "data.synthetic=4",
            *(["data.size=64"] if name.startswith("imagenet/") else []),
            "train.epochs=1",
            "train.batch_size=2",
            "train.device=cpu",
        ],
    )
    data = load_data(recipe.data)
    student = build_network(recipe.student, data)
    teacher = build_network(recipe.teacher, data) if recipe.teacher else None
    method = build_method(recipe, student, teacher, data, CPU)
    optimizer = build_optimizer(method, recipe.train)
    loader = data.train_loader(2, 0, CPU)
    scheduler = build_scheduler(optimizer, recipe.train, len(loader))
    shared = {"epochs": 1, "optimizer": optimizer, "scheduler": scheduler, "progress": False}
    before = [parameter.clone() for parameter in student.parameters()]
    result = fit_method(method, loader, data.val_loader(CPU), **shared)
    assert math.isfinite(result.last["loss"])
    assert not all(torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))


@pytest.mark.parametrize("name", ["cifar100/dhkd-wrn-40-2-wrn-16-2", "fashion-mnist/mhkd"])
def test_image_recipes_from_the_command_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    short = [
        "data.synthetic=8",
        "train.epochs=1",
        "teacher.epochs=1",
        "train.batch_size=4",
        "train.device=cpu",
    ]
    assert main(["train", name, *short]) == 0
    assert "(random images)" in capsys.readouterr().out
    assert len(list(tmp_path.glob("runs/*/summary.json"))) == 1
