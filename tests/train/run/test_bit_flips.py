"""A flipped bit in a file is noticed, or does not matter."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastkd.distill import GivenFeatures
from fastkd.errors import CheckpointError
from fastkd.train.run.cache_stores import CacheError, FeaturesStore, Store, TopKStore
from fastkd.train.run.checkpoint import load_checkpoint, save_checkpoint
from fastkd.train.run.folder import read_resume_state
from fastkd.train.run.teacher_cache import CacheWriter, TeacherCache

CONTENT = {
    "student": {"conv.weight": torch.arange(12.0).view(3, 4), "steps": torch.arange(3)},
    "optimizer": {"lr": 0.5},
    "history": [{"epoch": 1, "val_accuracy": 0.5}],
    "random": [],
}


def flipped(content: bytes, count: int, seed: int = 0) -> Iterator[tuple[int, bytes]]:
    """``count`` copies of ``content``, each with one bit flipped."""
    for bit in random.Random(seed).sample(range(8 * len(content)), count):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        yield bit, bytes(changed)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


def save_as_others_do(path: Path, content: dict[str, Any]) -> None:
    torch.save(content, path)


@pytest.mark.parametrize("save", [save_checkpoint, save_as_others_do])
def test_every_flip_in_a_checkpoint_is_noticed_or_harmless(save: Callable[..., None], tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save(path, CONTENT)
    noticed = 0
    for bit, content in flipped(path.read_bytes(), 1500):
        path.write_bytes(content)
        try:
            got = load_checkpoint(path, remedy="")
        except CheckpointError:
            noticed += 1
            continue
        got.pop("format", None)
        assert same(CONTENT, got), f"bit {bit}"
    assert noticed == 1500 or save is save_as_others_do
    assert noticed > 500


# Fields of an entry in the archive's directory, by their offset: flags (encryption), compression, size, disk,
# attributes (directory).
FIELDS = {"encrypted": (8, 1), "compressed": (10, 8), "disk": (34, 1), "directory": (38, 0x10)}


def change_entry(path: Path, field: str, name: bytes = b"data/0") -> None:
    offset, bit = FIELDS[field]
    content = bytearray(path.read_bytes())
    place = content.rindex(b"PK\x01\x02", 0, content.rindex(name))
    content[place + offset] ^= bit
    path.write_bytes(content)


@pytest.mark.parametrize("save", [save_checkpoint, save_as_others_do])
@pytest.mark.parametrize("field", FIELDS)
def test_the_state_before_is_taken(field: str, save: Callable[..., None], tmp_path: Path) -> None:
    save(tmp_path / "previous.pt", {**CONTENT, "optimizer": "before"})
    save(tmp_path / "last.pt", CONTENT)
    change_entry(tmp_path / "last.pt", field)
    told: list[str] = []
    state = read_resume_state(tmp_path, told.append)
    assert state is not None
    assert state["optimizer"] == "before"
    assert len(told) == 1
    assert "last.pt is damaged" in told[0]
    assert told[0].endswith("using the previous one")


def test_checkpoints_from_before_digests_are_read(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    torch.save({**CONTENT, "format": "fastkd-1"}, path)
    assert same(load_checkpoint(path, remedy=""), {**CONTENT, "format": "fastkd-1"})
    assert read_resume_state(tmp_path, pytest.fail) is not None


def test_a_format_that_is_unknown_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    torch.save({**CONTENT, "format": "fastkd-9"}, path)
    with pytest.raises(CheckpointError, match=r"format 'fastkd-9', but this fastkd reads fastkd-2"):
        load_checkpoint(path, remedy="")
    torch.save({**CONTENT, "format": "fastkd-2"}, path)
    with pytest.raises(CheckpointError, match="SHA-256 is missing"):
        load_checkpoint(path, remedy="")


def test_torch_reads_what_fastkd_writes(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "last.pt", CONTENT)
    assert same(torch.load(tmp_path / "last.pt", weights_only=True), {**CONTENT, "format": "fastkd-2"})
    assert same(torch.load(tmp_path / "last.pt", mmap=True)["student"], CONTENT["student"])


FACTS = {"samples": 8, "classes": 5, "epochs": 1, "val_accuracy": 0.5}
STORES = {
    "top_k": TopKStore(5, 2, 4.0),
    "features": FeaturesStore(GivenFeatures(torch.randn(5, 3), torch.randn(5))),
}


def make_cache(folder: Path, store: Store) -> Path:
    outputs = {
        "top_k": (torch.randn(8, 2), torch.tensor([[1, 3]] * 8), torch.randn(8)),
        "features": (torch.randn(8, 3),),
    }
    writer = CacheWriter(folder, FACTS, store)
    writer.write_epoch(0, iter([(torch.arange(8), outputs[store.name])]))
    writer.finish()
    return folder


@pytest.fixture
def top_k(tmp_path: Path) -> Path:
    return make_cache(tmp_path / "cache", STORES["top_k"])


@pytest.mark.parametrize(
    ("store", "name"),
    [
        ("top_k", "epoch-0000.npy"),
        ("top_k", "cache.json"),
        ("features", "epoch-0000.npy"),
        ("features", "head.pt"),
    ],
)
def test_every_flip_in_a_teacher_cache_is_noticed_or_harmless(store: str, name: str, tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", STORES[store])

    def read() -> tuple[dict[str, Any], list[torch.Tensor]]:
        opened = TeacherCache(cache)
        outputs = opened.outputs(0, torch.arange(8), torch.device("cpu"))
        return opened.facts, [*outputs, *opened.teacher().state_dict().values()]

    facts, expected = read()
    for bit, content in flipped((cache / name).read_bytes(), 500):
        (cache / name).write_bytes(content)
        try:
            got_facts, got = read()
        except CacheError:
            continue
        assert got_facts == facts, f"bit {bit}"
        assert all(map(torch.equal, got, expected)), f"bit {bit}"


def test_a_damaged_epoch_of_a_cache_is_made_again(top_k: Path) -> None:
    cache = top_k
    shard = cache / "epoch-0000.npy"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])
    with pytest.raises(CacheError, match=r"delete it, rename the folder to cache\.partial"):
        TeacherCache(cache).outputs(0, torch.arange(8), torch.device("cpu"))
    shard.unlink()
    shutil.move(cache, cache.with_name("cache.partial"))
    assert CacheWriter(cache, FACTS, STORES["top_k"]).missing_epochs() == [0]
