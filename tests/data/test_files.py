"""Image folders and tar shards: content, order, and broken images."""

from __future__ import annotations

import builtins
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastkd.data.corrupt import Corrupt, CorruptImages
from fastkd.data.files import FileData, load_file_data
from fastkd.data.transforms import Mixing
from fastkd.errors import DataError
from fastkd.recipe.sections import FolderData, ShardData

from .image_trees import SCRIPT, make_shards, make_tree

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tree(tmp_path_factory.mktemp("images") / "tree")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("images") / "shards")


def folder_data(root: Path, **options: Any) -> FileData:
    options = {"size": 24, "workers": 0, **options}
    return load_file_data(FolderData(name="imagefolder", root=str(root), **options))


def shard_data(root: Path, **options: Any) -> FileData:
    options = {"size": 24, "workers": 0, **options}
    return load_file_data(ShardData(name="webdataset", root=str(root), **options))


def epoch(data: FileData, number: int = 0, batch_size: int = 5, seed: int = 1) -> list[tuple[Any, ...]]:
    loader = data.train_loader(batch_size, seed, CPU)
    loader.set_epoch(number)
    return list(loader.indexed())


def by_sample(batches: list[tuple[Any, ...]]) -> dict[int, torch.Tensor]:
    return {int(i): image for images, _, indices in batches for i, image in zip(indices, images, strict=True)}


def same(a: dict[int, torch.Tensor], b: dict[int, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_tree_of_images(tree: Path) -> None:
    data = folder_data(tree)
    assert (data.num_classes, data.samples, len(data.val)) == (3, 12, 6)
    images, target = data.example()
    assert (images.shape, images.dtype, target.tolist()) == ((2, 3, 24, 24), torch.float32, [0, 0])
    batches = epoch(data)
    assert [len(target) for _, target, _ in batches] == [5, 5, 2]
    labels = {int(i): int(y) for _, ys, indices in batches for i, y in zip(indices, ys, strict=True)}
    assert labels == {index: index // 4 for index in range(12)}
    # In order; the central crop of the file, with ImageNet's normalisation.
    images, target = next(iter(data.val_loader(CPU)))
    assert target.tolist() == [0, 0, 1, 1, 2, 2]
    with Image.open(tree / "val/n00000000/val_0_0.JPEG") as file:
        scale = 27 / min(file.size)
        size = [int(side * scale) for side in file.size]
        small = np.asarray(file.convert("RGB").resize(size, Image.Resampling.BILINEAR))
    top, left = (round((side - 24) / 2) for side in small.shape[:2])
    crop = small[top : top + 24, left : left + 24] / 255
    expected = (crop - np.array((0.485, 0.456, 0.406))) / np.array((0.229, 0.224, 0.225))
    np.testing.assert_allclose(images[0].permute(1, 2, 0).numpy(), expected, atol=0.02)


def test_crops_are_a_function_of_seed_epoch_and_sample(tree: Path) -> None:
    data = folder_data(tree)
    first = by_sample(epoch(data))
    before = torch.get_rng_state()
    # Other batches, processes and draws in between: the same crops, and generators are unchanged.
    assert same(first, by_sample(epoch(data, batch_size=3)))
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(5)
    assert same(first, by_sample(epoch(folder_data(tree, workers=2))))
    assert not any(torch.equal(image, by_sample(epoch(data, 1))[i]) for i, image in first.items())
    assert not any(torch.equal(image, by_sample(epoch(data, seed=2))[i]) for i, image in first.items())
    plain = by_sample(epoch(folder_data(tree, augment=False)))
    assert same(plain, by_sample(epoch(folder_data(tree, augment=False), 3)))


@pytest.mark.parametrize("mixing", [{}, {"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_and_positions_share_an_epoch(tree: Path, mixing: dict[str, float], world: int) -> None:
    data = folder_data(tree, **mixing)
    whole = epoch(data, 2, batch_size=6)
    loader = data.train_loader(6, 1, CPU)
    loader.set_epoch(2)
    for start in (0, 1):
        parts = [list(loader.indexed(start, rank, world, True)) for rank in range(world)]
        for number, (images, target, indices) in enumerate(whole[start:]):
            for got, expected in zip(
                zip(*(part[number] for part in parts), strict=True), (images, target, indices), strict=True
            ):
                torch.testing.assert_close(torch.cat(got), expected, rtol=0, atol=1e-6)
    uneven = data.val_loader(CPU, 4)
    rows = [target for rank in range(3) for _, target in uneven.batches(0, rank, 3, False)]
    assert sorted(torch.cat(rows).tolist()) == [0, 0, 1, 1, 2, 2]


def test_mixed_images_and_their_labels(tree: Path) -> None:
    plain, mixed = epoch(folder_data(tree), batch_size=6), epoch(folder_data(tree, mixup=0.4), batch_size=6)
    for (images, labels, _), (both, target, _) in zip(plain, mixed, strict=True):
        hot = torch.nn.functional.one_hot(labels, 3).float()
        # The share of the first image, computed from pixels; the labels must have the same.
        rolled = images.roll(1, 0)
        share = ((both - rolled) * (images - rolled)).sum() / (images - rolled).square().sum()
        torch.testing.assert_close(both, share * images + (1 - share) * rolled, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(target, share * hot + (1 - share) * hot.roll(1, 0), rtol=1e-4, atol=1e-4)
    both, target, _ = epoch(folder_data(tree, cutmix=1.0), batch_size=6)[0]
    images, labels, _ = plain[0]
    own = (both == images).all(1).float().mean((1, 2))
    assert (own + (both == images.roll(1, 0)).all(1).float().mean((1, 2)) >= 1 - 1e-6).all()
    torch.testing.assert_close(target.sum(1), torch.ones(6))
    either, ones = Mixing(0.4, 1.0, 3), torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 8, 8)
    mixed = [either(ones, torch.tensor([0, 1]), key)[0] for key in range(8)]
    assert {bool(((one == 0) | (one == 1)).all()) for one in mixed} == {True, False}  # CutMix, MixUp


def test_a_part_of_the_training_images_validates(tree: Path) -> None:
    data = folder_data(tree, train=".", holdout=5)  # root itself: its folders are the classes
    assert (data.num_classes, data.samples, len(data.val)) == (2, 13, 5)
    data = folder_data(tree, holdout=4, val="none")
    assert (data.samples, len(data.val)) == (8, 4)
    assert not set(data.train) & set(data.val)
    with pytest.raises(DataError, match=r"data\.holdout = 12 leaves none of 12"):
        folder_data(tree, holdout=12)


def test_fingerprints_tell_data_and_augmentation_apart(tree: Path, tmp_path: Path) -> None:
    base = folder_data(tree).fingerprint
    assert folder_data(tree, workers=1).fingerprint == base
    others = [folder_data(tree, **o).fingerprint for o in ({"size": 32}, {"augment": False}, {"mixup": 1.0})]
    others.append(folder_data(make_tree(tmp_path / "other", train=5)).fingerprint)
    assert len({str(f) for f in [base, *others]}) == 5


def test_fingerprints_tell_numbers_of_classes_apart(shards: Path) -> None:
    pytest.importorskip("webdataset")
    base, same, four, ten = (shard_data(shards, classes=count).fingerprint for count in (None, 3, 4, 10))
    assert base == same  # as in versions that left the number out
    assert len(base) == 6
    assert len({str(f) for f in (base, four, ten)}) == 3


def test_faults_of_a_tree(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.root: .*nowhere is not a folder"):
        folder_data(tmp_path / "nowhere")
    with pytest.raises(DataError, match="must hold one folder of images per class"):
        folder_data(tmp_path)
    odd = make_tree(tmp_path / "odd")
    (odd / "val/n00000002").rename(odd / "val/bird")
    with pytest.raises(DataError, match="different class folders: bird, n00000002"):
        folder_data(odd)
    for empty in (tmp_path / "odd/train/x", tmp_path / "odd/val/x"):
        empty.mkdir()
    with pytest.raises(DataError, match="Found no valid file for the classes x"):
        folder_data(odd)


def test_shards_hold_what_the_tree_holds(tree: Path, shards: Path) -> None:
    pytest.importorskip("webdataset")
    data = shard_data(shards)
    assert (data.num_classes, data.samples, len(data.val)) == (3, 12, 6)
    of_tree = folder_data(tree, augment=False)
    images = sorted(image.sum().item() for image in by_sample(epoch(of_tree)).values())
    plain = shard_data(shards, augment=False)
    got = by_sample(epoch(plain))
    assert sorted(image.sum().item() for image in got.values()) == pytest.approx(images)
    assert same(
        got, by_sample(epoch(shard_data(shards, augment=False, workers=2, train="train-{0000..0001}.tar")))
    )
    assert same(by_sample(epoch(data)), by_sample(epoch(data, batch_size=4)))
    for index in range(12):
        assert int(data.source.labels[index]) == int(data.source.name(index).split()[-1].split("_")[0])
    assert shard_data(shards, classes=10).num_classes == 10


def test_faults_of_shards(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("webdataset")
    with pytest.raises(DataError, match="has no shard none-"):
        shard_data(shards, train="none-*.tar")
    with pytest.raises(DataError, match=r"has no shard train-0002\.tar"):
        shard_data(shards, train="train-{0000..0002}.tar")
    with pytest.raises(DataError, match=r"data\.classes = 2, but .* label 2"):
        shard_data(shards, classes=2)
    broken = make_shards(tmp_path / "broken")
    whole = (broken / "train-0001.tar").read_bytes()
    (broken / "train-0001.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"train-0001\.tar"):
        shard_data(broken)
    (broken / "train-0001.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(DataError, match=r"train-0001\.tar cannot be read"):
        shard_data(broken)

    real = builtins.__import__

    def absent(name: str, *rest: Any) -> Any:
        if name == "webdataset":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(DataError, match=r'pip install "fastkd\[webdataset\]"'):
        shard_data(shards)


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_images_are_named_skipped_and_counted(
    tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    root = make_tree(tmp_path / "tree")
    bad = [root / f"train/n0000000{label}/train_{label}_0.JPEG" for label in (0, 1)]
    bad[0].write_bytes(bad[0].read_bytes()[:300])
    bad[1].write_text("no image")
    data = folder_data(root, workers=workers, corrupt_limit=2)
    with caplog.at_level(logging.WARNING):
        for number in range(2):
            assert sorted(by_sample(epoch(data, number))) == [1, 2, 3, 5, 6, 7, 8, 9, 10, 11]
    assert len(caplog.records) == 2  # each once, not in each epoch
    assert set(data.corrupt) == {str(path) for path in bad}
    assert str(bad[0]) in caplog.text
    assert "of at most 2" in caplog.text
    with pytest.raises(DataError) as raised:
        epoch(folder_data(root, workers=workers, corrupt_limit=1))
    assert "2 images cannot be read, more than data.corrupt_limit = 1" in str(raised.value)
    assert all(str(path) in str(raised.value) for path in bad)


def test_corrupt_images_of_all_ranks_count() -> None:
    ranks = [CorruptImages(3) for _ in range(2)]
    for name, rank in (("a", 0), ("b", 1), ("c", 0), ("c", 1)):
        ranks[rank].add(Corrupt(name, 0, "no image"))
    found = [dict(images) for images in ranks]
    for images in ranks:
        images.join(found)
        assert list(images) == ["a", "c", "b"]
    for images in ranks:
        with pytest.raises(DataError, match=r"4 images cannot be read, more than data\.corrupt_limit = 3"):
            images.join([*found, {"d": "no image"}])


def test_ranks_stay_even_where_images_are_corrupt(tmp_path: Path) -> None:
    root = make_tree(tmp_path / "tree")
    (root / "train/n00000001/train_1_0.JPEG").write_text("no image")
    good = {0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11}
    for mixup in (0.0, 0.4):
        data = folder_data(root, mixup=mixup)
        seen: set[int] = set()
        for rank in range(2):
            batches = list(data.train_loader(6, 1, CPU).indexed(rank=rank, world=2, even=True))
            assert [len(part) for batch in batches for part in batch] == [3] * 6
            seen |= {int(index) for _, _, indices in batches for index in indices}
        assert seen == good
    for label in (1, 2):
        for path in (root / f"train/n0000000{label}").iterdir():
            path.write_text("no image")
    data = folder_data(root, corrupt_limit=20)
    loader = data.train_loader(4, 1, CPU)
    batches = (batch for _ in range(9) for batch in loader.indexed(rank=1, world=2, even=True))
    with pytest.raises(DataError, match="no image in this rank's share of a batch can be read"):
        list(batches)


@pytest.mark.parametrize("bad", [(0,), (5, 4), (3, 2, 1)])  # places in the batch; ranks begin at 0, 2 and 4
def test_ranks_mix_as_one_process_where_images_are_corrupt(tmp_path: Path, bad: tuple[int, ...]) -> None:
    root = make_tree(tmp_path / "tree")
    data = folder_data(root, mixup=0.4)
    loader = data.train_loader(6, 1, CPU)
    samples = next(loader.indexed())[2][list(bad)]
    for index in samples:
        Path(data.source.name(int(index))).write_text("no image")
    images, target, indices = next(loader.indexed())
    assert len(indices) == 6 - len(bad)
    seen: set[int] = set()
    for rank in (0, 1, 2):
        shared = loader.indexed(rank=rank, world=3, even=True)
        if set(bad) >= {2 * rank, 2 * rank + 1}:
            with pytest.raises(DataError, match="no image in this rank's share"):
                next(shared)
            continue
        for image, label, index in zip(*next(shared), strict=True):
            place = indices.tolist().index(int(index))
            assert torch.equal(image, images[place])
            assert torch.equal(label, target[place])
            seen.add(int(index))
    assert seen <= set(indices.tolist())
    assert len(seen) == len(indices)


def test_the_script_draws_imagenets_sizes(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    sizes = [SCRIPT.draw_size(random, 1.0) for _ in range(4000)]
    assert 0.44 < np.mean([size == (500, 375) for size in sizes]) < 0.52
    assert 350 < np.mean([height for _, height in sizes]) < 420
    assert 420 < np.mean([width for width, _ in sizes]) < 500
