from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

from fastkd.errors import CheckpointError
from fastkd.files.atomic import write_atomically
from fastkd.models import GlyphCNN
from fastkd.train.random_state import get_random_state, set_random_state
from fastkd.train.run.checkpoint import load_checkpoint, save_checkpoint
from fastkd.train.run.weights import load_weights
from tests.train.tiny import Evil


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "net.pt"
    save_checkpoint(
        path, {"model": GlyphCNN(20, width=2).state_dict(), "num_classes": 20, "val_accuracy": 0.5}
    )
    return path


def problem(path: Path, model: torch.nn.Module, num_classes: int = 20) -> str:
    with pytest.raises(CheckpointError) as raised:
        load_weights(model, path, num_classes=num_classes, remedy="do this")
    text = str(raised.value)
    assert str(path) in text
    assert text.endswith("do this")
    assert "\n" not in text
    return text


def test_weights_come_back(path: Path) -> None:
    model = GlyphCNN(20, width=2)
    facts = load_weights(model, path, num_classes=20, remedy="")
    assert facts["val_accuracy"] == 0.5
    for key, value in torch.load(path, weights_only=True)["model"].items():
        assert torch.equal(model.state_dict()[key], value)


def test_a_bare_state_dict_is_accepted(tmp_path: Path) -> None:
    source, model = GlyphCNN(20, width=2), GlyphCNN(20, width=2)
    torch.save(source.state_dict(), tmp_path / "bare.pt")
    assert load_weights(model, tmp_path / "bare.pt", num_classes=20, remedy="") == {}
    assert torch.equal(model.head.weight, source.head.weight)


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.99])
def test_a_truncated_file(path: Path, kept: float) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    text = problem(path, GlyphCNN(20, width=2))
    assert "truncated" in text or "damaged" in text


def test_files_that_are_something_else(path: Path, tmp_path: Path) -> None:
    model = GlyphCNN(20, width=2)
    path.write_text("not a checkpoint at all\n" * 100)
    problem(path, model)
    torch.save([1, 2], path)
    assert "holds a list" in problem(path, model)
    torch.save({"format": "fastkd-1"}, path)
    assert "no state dict" in problem(path, model)
    assert "no checkpoint" in problem(tmp_path / "missing.pt", model)


def test_code_in_a_checkpoint_is_not_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Evil()}, path)
    problem(path, GlyphCNN(20, width=2))
    assert not (tmp_path / "owned").exists()


def test_wrong_shapes_and_classes(path: Path) -> None:
    text = problem(path, GlyphCNN(20, width=3))
    assert "stages.0.0.weight has shape [2, 1, 3, 3], expected [3, 1, 3, 3]" in text
    assert re.search(r"and \d+ more", text)
    text = problem(path, GlyphCNN(30, width=2), num_classes=30)
    assert "trained for 20 classes, but this data set has 30" in text
    text = problem(path, torch.nn.Linear(2, 2))
    assert "2 missing: weight, bias; 38 not in this model: stages.0.0.weight" in text


def test_a_failed_write_leaves_the_old_file(path: Path) -> None:
    before = path.read_bytes()

    def fails(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fails)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("links", [True, False])
def test_the_one_before_is_kept_and_the_last_never_missing(
    path: Path, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, keep, replace = path.read_bytes(), path.with_name("previous.pt"), os.replace
    found = []

    def watched(source: Path, target: Path) -> None:
        replace(source, target)
        found.append(path.exists())

    def refused(source: Path, target: Path) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "replace", watched)
    if not links:
        monkeypatch.setattr(os, "link", refused)
    for content in (b"second", b"third"):
        if content == b"third":
            before = b"second"
            if links:  # as left by a write that was interrupted between the two renames
                keep.unlink()
                keep.hardlink_to(path)
        write_atomically(
            path, lambda temporary, content=content: temporary.write_bytes(content), keep_as=keep
        )
        assert (keep.read_bytes(), path.read_bytes()) == (before, content)
        assert sorted(p.name for p in path.parent.iterdir()) == [path.name, keep.name]
    assert all(found) or not links


def test_random_states_survive_a_checkpoint(tmp_path: Path) -> None:
    import random

    import numpy

    path = tmp_path / "random.pt"
    save_checkpoint(path, {"random": get_random_state()})
    first = (torch.rand(3).tolist(), numpy.random.rand(3).tolist(), random.random(), random.gauss(0, 1))
    set_random_state(load_checkpoint(path, remedy="")["random"])
    assert first == (
        torch.rand(3).tolist(),
        numpy.random.rand(3).tolist(),
        random.random(),
        random.gauss(0, 1),
    )
