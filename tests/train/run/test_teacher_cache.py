"""A teacher's logits on disk: reconstruction, checks against recipes, and training from them."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastkd
from fastkd.cli import main
from fastkd.models import SmallCNN
from fastkd.recipe.sections import FolderData
from fastkd.train import fit
from fastkd.train.run.lock import locked
from fastkd.train.run.teacher_cache import CachedLoader, CacheError, CacheWriter, TeacherCache, pack, unpack
from tests.data.image_trees import make_tree

CPU = torch.device("cpu")


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5),
    classes=st.integers(2, 60),
    top_k=st.one_of(st.none(), st.integers(1, 60)),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 10.0, 300.0]),
    shift=st.sampled_from([0.0, -50.0, 1000.0]),
    seed=st.integers(0, 2**31),
)
def test_probabilities_come_back(
    rows: int, classes: int, top_k: int | None, scale: float, shift: float, seed: int
) -> None:
    logits = torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed)) * scale + shift
    kept = None if top_k is None or top_k >= classes else top_k
    records = pack(logits, kept)
    got, expected = unpack(records, classes, CPU).double().softmax(1), logits.double().softmax(1)
    if kept is not None:
        # The most probable classes keep their probabilities; the others share the rest equally.
        values, places = expected.topk(kept, dim=1)
        rest = (1 - values.sum(1, keepdim=True)).clamp(min=0) / (classes - kept)
        expected = rest.expand(-1, classes).scatter(
            1, torch.from_numpy(records["classes"].astype(int)), values
        )
    torch.testing.assert_close(got, expected, rtol=6e-3, atol=2e-4)


def test_all_classes_come_back_as_logits_and_the_record_is_small() -> None:
    logits = torch.randn(8, 1000) * 4
    torch.testing.assert_close(unpack(pack(logits, None), 1000, CPU), logits, rtol=0, atol=0.02)
    assert pack(logits, None).dtype.itemsize == 2004
    assert pack(logits, 16).dtype.itemsize == 72
    target = torch.arange(8)
    student = torch.randn(8, 1000)
    for temperature, tolerance in ((1.0, 1e-3), (4.0, 1e-2)):
        options: dict[str, Any] = {"ce_weight": 0.5, "kd_weight": 0.5, "temperature": temperature}
        exact, _ = fastkd.distill_loss(student, logits, target, **options)
        cached, _ = fastkd.distill_loss(student, unpack(pack(logits, None), 1000, CPU), target, **options)
        torch.testing.assert_close(cached, exact, rtol=tolerance, atol=0)


FACTS = {"data": "d", "samples": 4, "classes": 3, "epochs": 2, "top_k": None, "teacher": {"name": "t"}}
LOGITS = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))


def fill(writer: CacheWriter, epochs: list[int]) -> None:
    for epoch in epochs:
        writer.write_epoch(
            epoch,
            iter(
                [(torch.tensor([2, 0]), LOGITS[epoch, [2, 0]]), (torch.tensor([3, 1]), LOGITS[epoch, [3, 1]])]
            ),
        )


def test_a_cache_is_complete_resumed_and_never_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    fill(CacheWriter(folder, FACTS), [0])
    with pytest.raises(CacheError, match="not a complete cache"):
        TeacherCache(folder)
    again = CacheWriter(folder, FACTS)
    assert again.missing_epochs() == [1]

    def fails() -> Any:
        yield torch.tensor([0]), LOGITS[1, :1]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        again.write_epoch(1, fails())
    assert again.missing_epochs() == [1]
    with pytest.raises(CacheError, match="started for another recipe"):
        CacheWriter(folder, {**FACTS, "classes": 4})
    fill(again, [1])
    cache = again.finish()
    for epoch in range(2):
        got = cache.logits(epoch, torch.tensor([3, 0]), CPU)
        torch.testing.assert_close(got, LOGITS[epoch, [3, 0]], rtol=1e-3, atol=1e-3)
    with pytest.raises(CacheError, match="never overwritten"):
        CacheWriter(folder, FACTS)
    with pytest.raises(CacheError, match="not finite in epoch 1"):
        CacheWriter(tmp_path / "nan", FACTS).write_epoch(
            0, iter([(torch.tensor([0]), LOGITS[0, :1] * torch.nan)])
        )


def test_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    writer = CacheWriter(tmp_path / "cache", FACTS)
    with pytest.raises(CacheError, match=r"no space for .* No space left on device"):
        fill(writer, [0])
    assert writer.missing_epochs() == [0, 1]
    assert [path.name for path in (tmp_path / "cache.partial").iterdir()] == ["cache.json"]


def test_damaged_caches_and_images_that_are_missing(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path / "cache", {**FACTS, "epochs": 1})
    writer.write_epoch(0, iter([(torch.tensor([0, 1]), LOGITS[0, :2])]))
    cache = writer.finish()
    with pytest.raises(CacheError, match="lacks training image 3 in epoch 1"):
        cache.logits(0, torch.tensor([1, 3]), CPU)
    shard = tmp_path / "cache/epoch-0000.npy"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-4])
    with pytest.raises(CacheError, match="not a complete cache"):
        TeacherCache(tmp_path / "cache")
    np.save(shard, np.zeros(4))
    with pytest.raises(CacheError, match=r"does not match cache\.json"):
        TeacherCache(tmp_path / "cache")
    np.save(shard, np.array([{"a": 1}], object), allow_pickle=True)  # not unpickled, which could run code
    with pytest.raises(CacheError, match="not a complete cache"):
        TeacherCache(tmp_path / "cache")


TINY = [
    "student.name=small_cnn", "student.width=4", "teacher.name=small_cnn", "teacher.width=4",
    "teacher.weights=null", "teacher.epochs=1", "train.epochs=2", "train.batch_size=5", "train.device=cpu",
    "train.milestones=[1]", "data.size=24", "data.workers=0",
]  # fmt: skip


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    make_tree(tmp_path / "tree", classes=4, train=4)
    return ["imagenet/r18-dkd", "data.root=tree", *TINY]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with image trees and a cache of them."""
    place = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        make_tree(Path("tree"), classes=4, train=4)
        make_tree(Path("other"), classes=4, train=5)
        arguments = ["imagenet/r18-dkd", "data.root=tree", *TINY, "--to", "cache", "--top-k", "2"]
        assert main(["cache-teacher", *arguments]) == 0
    return place


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("mixing", [[], ["data.cutmix=1.0", "method=kd"]])
def test_training_from_a_cache_is_training_with_the_teacher(
    recipe: list[str], mixing: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cache-teacher", *recipe, *mixing, "--to", "cache", "--all"]) == 0
    out = capsys.readouterr().out
    assert "12 bytes per sample and epoch" in out
    assert "largest relative error of the loss from the cache: " in out
    report = json.loads(Path("cache/report.json").read_text())
    assert report["loss_difference"] < 5e-3
    assert main(["train", *recipe, *mixing]) == 0
    assert main(["train", *recipe, *mixing, "teacher.cache=cache"]) == 0
    assert "cache" in capsys.readouterr().out
    with_teacher, from_cache = sorted(Path("runs").glob("imagenet-r18-dkd-*"))
    assert losses(from_cache) == pytest.approx(losses(with_teacher), rel=1e-2)
    record = json.loads((from_cache / "metrics.jsonl").read_text().splitlines()[0])
    assert record["seconds"]["teacher"] == 0


def test_one_process_writes_a_cache(
    recipe: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["cache-teacher", *recipe, "--to", "cache"]
    Path("cache.partial").mkdir()
    with locked(Path("cache.partial")):
        assert main(command) == 2
    assert f"cache.partial is in use by process {os.getpid()}" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(command) == 2
    assert "WORLD_SIZE is 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["data.size=32"], ["augmentation", "'size': 24", "'size': 32"]),
        (["data.augment=false"], ["augmentation", "central_crop", "seed: 0 in the cache, None"]),
        (["train.seed=3"], ["seed: 0 in the cache, 3 in the recipe"]),
        (["train.epochs=3"], ["epochs: 2 in the cache, 3 in the recipe"]),
        (["teacher.width=6"], ["teacher: ", "'width': 4", "'width': 6"]),
        (["data.root=other"], ["data: ", "samples: 16 in the cache, 20 in the recipe"]),
        (["data.mixup=0.2", "method=kd"], ["augmentation", "batch_size: None in the cache, 5"]),
        (["method=mhkd", "method.layers=[stages.1]"], ["needs the teacher's layers stages.1"]),
        (["method=dkd", "method.distance_weight=1.0"], ["needs the teacher's layers fc:input"]),
    ],
)
def test_a_cache_that_does_not_fit_is_refused_with_what_differs(
    made: Path,
    change: list[str],
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(made)
    assert main(["train", "imagenet/r18-dkd", "data.root=tree", *TINY, "teacher.cache=cache", *change]) == 2
    text = capsys.readouterr().err
    assert all(word in text for word in words), text
    assert len(list(Path("runs").iterdir())) == 1  # the teacher alone


def test_images_that_never_change_are_cached_once(
    recipe: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    still = [*recipe, "data.augment=false"]
    assert main(["cache-teacher", *still, "--to", "cache"]) == 0
    assert [path.name for path in Path("cache").glob("*.npy")] == ["epoch-0000.npy"]
    assert (
        main(["train", *still, "train.epochs=3", "train.seed=5", "teacher.cache=cache", "teacher.epochs=1"])
        == 0
    )
    capsys.readouterr()
    assert main(["cache-teacher", *still, "--to", "cache"]) == 2
    assert "never overwritten" in capsys.readouterr().err
    assert main(["cache-teacher", *still, "--to", "c2", "--top-k", "0"]) == 2
    assert "--top-k 0" in capsys.readouterr().err
    assert main(["cache-teacher", "glyphs/kd", "--to", "c2"]) == 2
    assert "augmented in whole batches" in capsys.readouterr().err
    assert main(["cache-teacher", "imagenet/r18", "data.synthetic=2", "--to", "c2"]) == 2
    assert "it has no teacher" in capsys.readouterr().err
    assert not Path("c2").exists()


def test_cached_logits_from_python(tmp_path: Path) -> None:
    from fastkd.data.files import load_file_data

    root = make_tree(tmp_path / "tree", classes=4)
    data = load_file_data(FolderData(name="imagefolder", root=str(root), size=16, workers=0))
    teacher, student = (SmallCNN(4, width=2, channels=3) for _ in range(2))
    facts = {**FACTS, "samples": data.samples, "classes": 4, "epochs": 1}
    writer = CacheWriter(tmp_path / "cache", facts)
    loader = data.train_loader(5, 0, CPU)
    with torch.no_grad():
        teacher.eval()
        writer.write_epoch(0, ((indices, teacher(images)) for images, _, indices in loader.indexed()))
    cached = CachedLoader(loader, writer.finish())
    with torch.no_grad():
        for images, _, logits in cached:
            torch.testing.assert_close(logits, teacher(images), rtol=1e-3, atol=2e-3)
    loss = fastkd.DistillLoss(ce_weight=0.1, kd_weight=0.9)
    result = fit(student, None, cached, data.val_loader(CPU), loss=loss, epochs=1, progress=False)
    assert set(result.last["terms"]) == {"ce", "kd"}
