"""A teacher's cache on disk: its files, damage, older versions, and use from Python."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastkd
from fastkd.cli import main
from fastkd.data.files import load_file_data
from fastkd.distill import DKD
from fastkd.models import SmallCNN
from fastkd.recipe.sections import FolderData
from fastkd.train import fit, fit_method
from fastkd.train.run.cache_stores import CacheError, LogitsStore, TopKStore, features_store
from fastkd.train.run.teacher_cache import CachedLoader, CacheWriter, TeacherCache, read_facts
from tests.data.image_trees import make_tree

CPU = torch.device("cpu")


FACTS = {"data": "d", "samples": 4, "classes": 3, "epochs": 2, "teacher": {"name": "t"}}
STORE = LogitsStore(3)
LOGITS = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))


def fill(writer: CacheWriter, epochs: list[int]) -> None:
    for epoch in epochs:
        rows = [(torch.tensor(some), (LOGITS[epoch, some],)) for some in ([2, 0], [3, 1])]
        writer.write_epoch(epoch, iter(rows))


def test_a_cache_is_complete_resumed_and_never_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    fill(CacheWriter(folder, FACTS, STORE), [0])
    with pytest.raises(CacheError, match="not a complete cache"):
        TeacherCache(folder)
    again = CacheWriter(folder, FACTS, STORE)
    assert again.missing_epochs() == [1]

    def fails() -> Any:
        yield torch.tensor([0]), (LOGITS[1, :1],)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        again.write_epoch(1, fails())
    assert again.missing_epochs() == [1]
    for facts, store in (({**FACTS, "data": "e"}, STORE), (FACTS, TopKStore(3, 1, 1.0))):
        with pytest.raises(CacheError, match="started for another recipe or store"):
            CacheWriter(folder, facts, store)
    fill(again, [1])
    cache = again.finish()
    for epoch in range(2):
        (got,) = cache.outputs(epoch, torch.tensor([3, 0]), CPU)
        torch.testing.assert_close(got, LOGITS[epoch, [3, 0]], rtol=1e-3, atol=1e-3)
    with pytest.raises(CacheError, match="never overwritten"):
        CacheWriter(folder, FACTS, STORE)
    with pytest.raises(CacheError, match="not finite in epoch 1"):
        CacheWriter(tmp_path / "nan", FACTS, STORE).write_epoch(
            0, iter([(torch.tensor([0]), (LOGITS[0, :1] * torch.nan,))])
        )


def test_a_folder_of_the_users_own_is_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "cache.partial" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(CacheError, match="not a cache that was begun"):
        CacheWriter(tmp_path / "cache", FACTS, STORE)
    assert [path.name for path in mine.parent.iterdir()] == ["mine.txt"]


def test_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    writer = CacheWriter(tmp_path / "cache", FACTS, STORE)
    with pytest.raises(CacheError, match=r"no space for .* No space left on device"):
        fill(writer, [0])
    assert writer.missing_epochs() == [0, 1]
    assert [path.name for path in (tmp_path / "cache.partial").iterdir()] == ["cache.json"]


def test_damaged_caches_and_images_that_are_missing(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path / "cache", {**FACTS, "epochs": 1}, STORE)
    writer.write_epoch(0, iter([(torch.tensor([0, 1]), (LOGITS[0, :2],))]))
    cache = writer.finish()
    with pytest.raises(CacheError, match="lacks training image 3 in epoch 1"):
        cache.outputs(0, torch.tensor([1, 3]), CPU)
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


@pytest.mark.parametrize("version", [1, 2])
def test_caches_of_older_versions_are_refused(tmp_path: Path, version: int) -> None:
    """Their records differ, and the same type could have another meaning."""
    old = {**FACTS, "format": f"fastkd-teacher-cache-{version}", "top_k": None}
    for name in ("cache", "begun.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cache.json").write_text(json.dumps(old))
    words = rf"made by an older version .*fastkd-teacher-cache-{version}.*create it again"
    with pytest.raises(CacheError, match=rf"cache was {words}"):
        TeacherCache(tmp_path / "cache")
    with pytest.raises(CacheError, match=rf"begun\.partial was {words}.* delete it"):
        CacheWriter(tmp_path / "begun", FACTS, STORE)


def test_the_head_belongs_to_the_features(tmp_path: Path) -> None:
    images = torch.randn(4, 3, 16, 16)
    stores = [features_store(SmallCNN(4, width=2, channels=3).eval(), images, "float32") for _ in range(2)]
    for name, store in zip(("one", "two"), stores, strict=True):
        writer = CacheWriter(tmp_path / name, {**FACTS, "classes": 4, "epochs": 1}, store)
        writer.write_epoch(0, iter([(torch.arange(4), (torch.rand(4, 8),))]))
        writer.finish()
    assert read_facts(tmp_path / "one/cache.json")["width"] == 8
    (tmp_path / "one/head.pt").write_bytes((tmp_path / "two/head.pt").read_bytes())
    with pytest.raises(CacheError, match="head is not the one that the features were made with"):
        TeacherCache(tmp_path / "one")
    (tmp_path / "two/head.pt").unlink()
    with pytest.raises(CacheError, match=r"no checkpoint .*head\.pt"):
        TeacherCache(tmp_path / "two")


def test_cached_teachers_from_python(tmp_path: Path) -> None:
    root = make_tree(tmp_path / "tree", classes=4)
    data = load_file_data(FolderData(name="imagefolder", root=str(root), size=16, workers=0))
    teacher = SmallCNN(4, width=2, channels=3).eval()
    loader = data.train_loader(5, 0, CPU)
    loss = fastkd.DistillLoss(ce_weight=0.1, kd_weight=0.9)
    facts = {**FACTS, "samples": data.samples, "classes": 4, "epochs": 1, "seed": 0}
    losses = []
    for name, store in (
        ("logits", LogitsStore(4)),
        ("top_k", TopKStore(4, 3, loss.temperature)),
        ("features", features_store(teacher, data.example()[0], "float32")),
    ):
        writer = CacheWriter(tmp_path / name, facts, store)
        with torch.no_grad():
            writer.write_epoch(
                0, ((i, store.of_teacher(teacher, images, target)) for images, target, i in loader.indexed())
            )
        cache = writer.finish()
        torch.manual_seed(0)
        student = SmallCNN(4, width=2, channels=3)
        cached = CachedLoader(loader, cache)
        val = data.val_loader(CPU)
        result = fit(student, cache.teacher(), cached, val, loss=loss, epochs=1, progress=False)
        assert set(result.last["terms"]) == {"ce", "kd"}
        losses.append(result.last["loss"])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-3)
    few = load_file_data(
        FolderData(name="imagefolder", root=str(make_tree(tmp_path / "few", classes=3)), size=16, workers=0)
    )
    for other, difference in (
        (data.train_loader(5, 1, CPU), "its seed is 1, the cache .*logits was made for 0"),
        (few.train_loader(5, 0, CPU), f"its samples is {few.samples}, .* made for {data.samples}"),
    ):
        with pytest.raises(CacheError, match=difference):
            CachedLoader(other, TeacherCache(str(tmp_path / "logits")))
    with pytest.raises(CacheError, match="loader is a list; expected a training loader of fastkd"):
        CachedLoader([], TeacherCache(tmp_path / "logits"))  # type: ignore[arg-type]


def test_the_own_loop_of_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_tree(Path("tree"), classes=4)
    words = [
        "data.root=tree", "data.size=16", "data.workers=0", "student.name=small_cnn", "student.width=2",
        "teacher.name=small_cnn", "teacher.width=2", "teacher.weights=null", "teacher.epochs=1",
        "train.epochs=1", "train.batch_size=8", "train.device=cpu", "train.schedule=constant",
        "train.milestones=[]",
    ]  # fmt: skip
    assert main(["cache-teacher", "imagenet/r18-dkd", *words, "--to", "cache", "--top-k", "3"]) == 0
    text = (Path(__file__).resolve().parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"<!-- cache, .*?-->\n```python\n(.*?)```", text, re.DOTALL)
    printed = '["data.root=IMAGENET", "train.epochs=100"]'
    assert printed in code
    found = {"torch": torch, "DKD": DKD, "student": SmallCNN(4, width=2, channels=3)}
    exec(code.replace(printed, repr(words)), found)
    result = fit_method(found["method"], found["loader"], epochs=1, progress=False)
    assert set(result.last["terms"]) == {"ce", "tckd", "nckd"}


def test_mixed_images_of_which_some_cannot_be_read(tmp_path: Path) -> None:
    root = make_tree(tmp_path / "tree", classes=2, train=4)
    options = {"size": 8, "workers": 0, "mixup": 1.0}
    data = load_file_data(FolderData(name="imagefolder", root=str(root), **options))
    loader = data.train_loader(8, 0, CPU)
    order = next(loader.indexed())[2].tolist()
    paths = [Path(data.source.name(index)) for index in order]
    whole = [path.read_bytes() for path in paths]
    # The teacher's outputs are the images' means, from which those of other images differ.
    paths[3].write_text("no image")
    writer = CacheWriter(tmp_path / "cache", {**FACTS, "samples": 8, "classes": 3, "epochs": 1}, STORE)
    writer.write_epoch(0, ((i, (images.mean((2, 3)),)) for images, _, i in loader.indexed()))
    cached = CachedLoader(loader, writer.finish())
    for world in (1, 2):  # the second of two ranks begins behind the image that cannot be read
        for rank in range(world):
            for images, _, logits in cached.batches(0, rank, world, True):
                torch.testing.assert_close(logits, images.mean((2, 3)), rtol=1e-2, atol=1e-2)
    paths[5].write_text("no image")
    for world in (1, 2):
        with pytest.raises(
            CacheError, match=rf"training image {order[5]}, which cannot be read now, in epoch 1"
        ):
            list(cached.batches(0, world - 1, world, True))
    paths[3].write_bytes(whole[3])
    paths[5].write_bytes(whole[5])
    for rank in range(2):  # the second only borrows it
        with pytest.raises(CacheError, match=f"lacks training image {order[3]} in epoch 1"):
            list(cached.batches(0, rank, 2, True))
