"""`fastkd cache-teacher` and trainings from what it made, beside trainings with the teacher."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from fastkd.cli import main
from fastkd.train.batches import Batches
from fastkd.train.display.console import ConsoleProgress
from fastkd.train.run.lock import locked
from fastkd.train.run.teacher_cache import TeacherCache
from tests.data.image_trees import make_tree

TINY = [
    "student.name=small_cnn", "student.width=4", "teacher.name=small_cnn", "teacher.width=4",
    "teacher.weights=null", "teacher.epochs=1", "train.epochs=2", "train.batch_size=5", "train.device=cpu",
    "train.milestones=[1]", "train.lr=0.02", "data.size=24", "data.workers=0",
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


def history(pattern: str) -> list[dict[str, float]]:
    (folder,) = Path("runs").glob(pattern)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("store", [["--top-k", "2"], ["--store", "features"], ["--store", "logits"]])
def test_a_dry_run_from_each_store(recipe: list[str], store: list[str], capsys) -> None:
    assert main(["cache-teacher", *recipe, "--to", "cache", *store]) == 0
    assert main(["train", *recipe, "teacher.cache=cache", "--dry-run"]) == 0
    assert "nothing was written there" in capsys.readouterr().out


DKD: list[str] = []
KD_MIXED = ["data.cutmix=1.0", "method=kd"]
DHKD = ["method=dhkd", "method.dropout=0.0"]
HALF = ["train.precision=bfloat16", "train.teacher_precision=float32"]


@pytest.mark.parametrize(
    ("store", "size", "change"),
    [
        (["--store", "logits"], 12, DKD),
        (["--store", "logits"], 12, KD_MIXED),
        (["--store", "features"], 32, DKD),
        (["--store", "features"], 32, KD_MIXED),
        (["--store", "features"], 32, DHKD),
        (["--store", "features"], 32, HALF),
        ([], 16, DKD),  # K = 3 = C - 1: nothing is left out
        (["--top-k", "3"], 16, KD_MIXED),
    ],
)
def test_training_from_a_cache_ends_where_training_with_the_teacher_does(
    recipe: list[str], store: list[str], size: int, change: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cache-teacher", *recipe, *change, "--to", "cache", *store]) == 0
    out = capsys.readouterr().out
    report = json.loads(Path("cache/report.json").read_text())
    assert report["bytes_per_sample"] == size
    assert f"{size} bytes per sample and epoch" in out
    found = report["agreement"]
    assert f"loss {found['loss']:.2e}" in out
    assert found["gradient_by"] == ("parameters" if change is DHKD else "student logits")
    assert found["loss"] < 2e-3
    assert found["gradient"] < 5e-3
    assert found["cosine"] > 1 - 2e-5
    assert main(["train", *recipe, *change]) == 0
    assert main(["train", *recipe, *change, "teacher.cache=cache"]) == 0
    live, cached = history("*-001"), history("*-002")
    assert [e["loss"] for e in cached] == pytest.approx([e["loss"] for e in live], rel=1e-2)
    assert [e["val_loss"] for e in cached] == pytest.approx([e["val_loss"] for e in live], rel=1e-2)
    assert cached[0]["seconds"]["teacher"] == 0


def test_one_class_of_four(recipe: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache-teacher", *recipe, "--to", "cache", "--top-k", "1"]) == 0
    report = json.loads(Path("cache/report.json").read_text())
    assert "the other classes (3) are one class" in capsys.readouterr().out
    found = report["agreement"]
    assert found["rounding"]["gradient"] < 5e-3 < found["gradient"] < 0.5
    assert main(["train", *recipe]) == 0
    assert main(["train", *recipe, "teacher.cache=cache"]) == 0
    # The loss lacks the KL among the other classes (test_cache_stores.py), which is small here.
    live, cached = history("*-001"), history("*-002")
    assert [e["val_loss"] for e in cached] == pytest.approx([e["val_loss"] for e in live], rel=0.05)


def test_glyphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    letters = [
        "glyphs/dhkd", "data.characters=41-5A,61-7A", "student.width=2", "teacher.width=2",
        "teacher.epochs=1", "train.epochs=2", "train.batch_size=128", "train.device=cpu",
        "method.dropout=0.0",
    ]  # fmt: skip
    assert main(["cache-teacher", *letters, "--to", "cache", "--store", "features"]) == 0
    assert main(["train", *letters]) == 0
    assert main(["train", *letters, "teacher.cache=cache"]) == 0
    live, cached = history("*-001"), history("*-002")
    assert [e["loss"] for e in cached] == pytest.approx([e["loss"] for e in live], rel=1e-3)
    assert main(["train", *letters, "train.batch_size=64", "teacher.cache=cache"]) == 2
    assert "batch_size: 128 in the cache, 64 in the recipe" in capsys.readouterr().err


def test_the_number_of_threads(recipe: list[str]) -> None:
    before = torch.get_num_threads()
    try:
        for command in (
            ["cache-teacher", *recipe, "train.threads=1", "--to", "cache"],
            ["train", *recipe, "train.threads=1"],
            ["train", "--eval-only", "--resume"],
        ):
            torch.set_num_threads(2)
            run = [str(path) for path in Path("runs").glob("imagenet-*")]
            assert main([*command, *run]) == 0
            assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_ctrl_c(
    recipe: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the teacher's second epoch, and while the finished cache is measured."""
    command = ["cache-teacher", *recipe, "teacher.epochs=3", "--to", "cache"]

    def interrupt(*_: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(
            ConsoleProgress, "epoch_done", lambda *_: patch.setattr(Batches, "set_epoch", interrupt)
        )
        assert main(command) == 130
    assert capsys.readouterr().err == "\nstopped; the same command resumes after the last complete epoch\n"
    monkeypatch.setattr("fastkd.train.commands.cache_teacher.measure_agreement", interrupt)
    assert main(command) == 130
    out, err = capsys.readouterr()
    assert "teacher: resuming after epoch 1 of 3" in out
    assert err == "\nstopped; the cache is complete, but has no report: teacher.cache=cache\n"
    TeacherCache(Path("cache"))


NORMED = """
from torch import nn
def Network(num_classes):
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return nn.Sequential(pool, nn.BatchNorm1d(12), nn.Linear(12, num_classes))
"""


def test_a_batch_too_small_to_train_on_is_cached_but_not_measured(recipe: list[str]) -> None:
    Path("normed.py").write_text(NORMED)
    student = ["student.name=normed:Network", "student.width=null"]
    assert main(["cache-teacher", *recipe, *student, "--to", "cache"]) == 0
    report = json.loads(Path("cache/report.json").read_text())
    assert report["agreement"]["batches"] == 3  # of 5 images; the fourth has one


def test_a_report_that_fails_does_not_make_the_cache_fail(
    recipe: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> None:
        raise ValueError("no such layer")

    monkeypatch.setattr("fastkd.train.commands.cache_teacher.measure_agreement", fails)
    assert main(["cache-teacher", *recipe, "--to", "cache"]) == 0
    out = capsys.readouterr().out
    assert "the cache is complete, but its report failed: ValueError: no such layer\n" in out
    assert "to train from it: teacher.cache=cache\n" in out
    TeacherCache(Path("cache"))


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


def test_an_interrupted_cache_is_resumed(recipe: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    command = ["cache-teacher", *recipe, "--store", "features", "--to"]
    assert main([*command, "whole"]) == 0
    Path("whole").rename("cache.partial")
    expected = Path("cache.partial/epoch-0001.npy").read_bytes()
    for name in ("epoch-0001.npy", "report.json"):
        Path("cache.partial", name).unlink()
    capsys.readouterr()
    assert main([*command, "cache"]) == 0
    out = capsys.readouterr().out
    assert "epoch 2/2 cached" in out
    assert "epoch 1/2 cached" not in out
    assert Path("cache/epoch-0001.npy").read_bytes() == expected
    assert TeacherCache(Path("cache")).facts["store"] == "features"


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_seeds_with_the_images_of_one(
    made: Path, more: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made)
    words = ["imagenet/r18-dkd", "data.root=tree", *TINY, "teacher.cache=cache", "--seeds", "2", *more]
    assert main(["train", *words]) == 2
    assert "has the images of train.seed=0 alone" in capsys.readouterr().err
    assert len(list(Path("runs").iterdir())) == 1  # the teacher alone


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
        (
            ["method.temperature=4.0"],
            ["temperature: 1.0 in the cache, 4.0 in the recipe", "--store features"],
        ),
        (["method=kd"], ["temperature: 1.0 in the cache, 4.0 in the recipe"]),
        (["method=lskd"], ["method lskd", "with standardize=True", "--store features or --store logits"]),
        (["method=dhkd"], ["method dhkd", "compares each class by itself", "--store features"]),
        (
            ["method=mhkd", "method.layers=[stages.1]"],
            ["mhkd needs the teacher's layers, which no cache has"],
        ),
        (["method.distance_weight=1.0"], ["method dkd needs the teacher's layers, which no cache has"]),
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
    longer = [*still, "train.epochs=3", "train.seed=5", "teacher.epochs=1"]
    assert main(["train", *longer, "teacher.cache=cache"]) == 0
    capsys.readouterr()
    assert main(["cache-teacher", *still, "--to", "cache"]) == 2
    assert "never overwritten" in capsys.readouterr().err


NO_HEAD = """
from torch import nn
def Network(num_classes):
    return nn.Sequential(nn.Conv2d(3, num_classes, 24), nn.Flatten())
"""


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--top-k", "0"], "--top-k 0: expected 1 to 3, of 4 classes; --store logits keeps all"),
        (["--top-k", "4"], "--top-k 4: expected 1 to 3"),
        (["--top-k", "2", "--store", "logits"], "--top-k is of --store top_k, but the store is logits"),
        (["--all"], "--all is now --store logits"),
        (["method=dhkd"], "method dhkd cannot learn from the top k classes: it is not defined for a teacher"),
        (["method=nkd", "method.temperature=3.0"], "NKD reads the teacher at T = 1 too; cache the teacher"),
        (["method=fitnets", "method.hint_layer=stages.1"], "fitnets needs the teacher's layers"),
        (
            ["teacher.name=no_head:Network", "teacher.width=null", "--store", "features"],
            "has no linear layer",
        ),
    ],
)
def test_what_cannot_be_cached_is_refused_before_a_teacher_is_trained(
    recipe: list[str], more: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("no_head.py").write_text(NO_HEAD)
    assert main(["cache-teacher", *recipe, "--to", "c2", *more]) == 2
    assert words in capsys.readouterr().err
    assert not Path("runs").exists()
    assert not list(Path().glob("c2*"))


def test_a_link_to_nothing_is_no_new_folder(recipe: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("link").symlink_to("nowhere")
    assert main(["cache-teacher", *recipe, "--to", "link"]) == 2
    assert "--to link: it already exists" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_a_recipe_without_a_teacher(recipe: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache-teacher", "imagenet/r18", "data.synthetic=2", "--to", "c2"]) == 2
    assert "cannot be cached for this recipe: it has none" in capsys.readouterr().err
