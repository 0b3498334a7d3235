"""The ImageNet recipes from the command line, on real JPEG files, few and small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastkd.cli import main
from fastkd.models import build_model
from tests.data.image_trees import make_shards, make_tree
from tests.train.ranks import launch

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "data.size=32", "data.workers=2", "train.epochs=1", "train.batch_size=4", "train.milestones=[1]",
    "train.lr=0.01", "train.device=cpu", "train.threads=1",
]  # fmt: skip


def test_r18_dkd_as_people_run_it(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = [sys.executable, str(ROOT / "tools/make_imagefolder.py"), "tree", "--tiny"]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "4 classes, 24 images" in done.stdout
    assert subprocess.run(script, capture_output=True).returncode == 2  # a non-empty folder is not changed
    teacher = build_model("torchvision/resnet34", num_classes=4)
    torch.save({"state_dict": {"module." + k: v for k, v in teacher.state_dict().items()}}, "teacher.pth")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "fastkd", "train", "imagenet/r18-dkd", "data.root=tree"]
    done = subprocess.run(
        [*command, "teacher.checkpoint=teacher.pth", *TINY], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "teacher epoch" not in done.stdout
    (run,) = workplace.glob("runs/imagenet-r18-dkd-*")
    record = json.loads((run / "metrics.jsonl").read_text())
    assert set(record["terms"]) == {"ce", "tckd", "nckd"}
    assert torch.load(run / "best.pt", weights_only=True)["input"] == [3, 32, 32]
    # The published teacher has 1000 classes: an error before training.
    assert main(["train", "imagenet/r18-dkd", "data.root=tree", *TINY]) == 2
    assert "they are for 1000 classes, but this data set has 4" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["r18", "mbv1-kd"])
def test_the_others_on_shards_and_mixed(workplace: Path, name: str) -> None:
    pytest.importorskip("webdataset")
    make_shards(workplace / "shards", classes=3)
    small = (
        []
        if name == "r18"
        else ["teacher.name=torchvision/resnet18", "teacher.weights=null", "teacher.epochs=1"]
    )
    arguments = [f"imagenet/{name}", "data.name=webdataset", "data.root=shards", *TINY, *small]
    assert main(["train", *arguments, "data.mixup=0.2", "data.cutmix=1.0"]) == 0
    (run,) = workplace.glob("runs/imagenet-*")
    assert json.loads((run / "summary.json").read_text())["num_classes"] == 3


def test_mixing_is_refused_where_a_loss_needs_one_label(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tree(workplace / "tree")
    assert (
        main(["train", "imagenet/r18-dkd", "data.root=tree", "teacher.weights=null", *TINY, "data.mixup=0.2"])
        == 2
    )
    text = capsys.readouterr().err
    assert "method dkd: soft targets are not defined for dkd" in text
    assert "an image must have one label" in text
    assert not (workplace / "runs").exists()
    assert main(["train", "imagenet/r18", *TINY]) == 2
    assert "data.root is missing" in capsys.readouterr().err


def test_corrupt_images_end_up_in_the_summary(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = make_tree(workplace / "tree") / "train/n00000001/train_1_2.JPEG"
    bad.write_bytes(bad.read_bytes()[:200])
    student = ["student.name=small_cnn", "student.width=2"]
    assert main(["train", "imagenet/r18", "data.root=tree", *TINY, *student]) == 0
    (run,) = workplace.glob("runs/imagenet-*")
    for arguments in ([], ["--resume", str(run)]):  # the second reads no training image
        assert not arguments or main(["train", *arguments]) == 0
        assert json.loads((run / "summary.json").read_text())["corrupt_images"].keys() == {str(bad)}
    assert main(["train", "imagenet/r18", "data.root=tree", *TINY, *student, "data.corrupt_limit=0"]) == 2
    assert str(bad) in capsys.readouterr().err


def test_the_summary_has_the_corrupt_images_of_all_ranks(workplace: Path) -> None:
    tree = make_tree(workplace / "tree", train=8)
    bad = [tree / f"train/n0000000{label}/train_{label}_{i}.JPEG" for label in (0, 1) for i in (0, 1)]
    for path in bad:
        path.write_text("no image")
    recipe = ["imagenet/r18", "data.root=tree", *TINY, "data.workers=0", "train.batch_size=8"]
    recipe += ["student.name=small_cnn", "student.width=2", "data.corrupt_limit=4"]
    assert launch(2, workplace, recipe) == [0, 0]
    (run,) = workplace.glob("runs/imagenet-*")
    assert json.loads((run / "summary.json").read_text())["corrupt_images"].keys() == set(map(str, bad))


def test_throughput_data(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = workplace / "mine.yaml"
    path.write_text(
        "description: x\ndata.name: synthetic\ndata.images: 8\ndata.classes: 6\ndata.size: 20\n"
        "student.name: small_cnn\nstudent.width: 2\nmethod: cross_entropy\n"
        "train.epochs: 1\ntrain.device: cpu\n"
    )
    assert main(["train", str(path)]) == 0
    assert "synthetic (random images), 6 classes, 8 training images" in capsys.readouterr().out
