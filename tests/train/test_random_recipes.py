"""Data, methods and options of training drawn together: a run that is killed and resumed, and loaded again.

Other tests vary one or two of them at a time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastkd
from fastkd.data.data import load_data
from fastkd.recipe.schema import make_recipe
from fastkd.train import evaluate
from fastkd.train.display.console import make_console
from fastkd.train.run import folder as run_folder
from fastkd.train.run.run import run_recipe
from tests.choices import Choices
from tests.data.image_trees import load_script, make_shards, make_tree

from .tiny import Killed

compare_runs = load_script("kill_and_resume").compare_runs

CPU = torch.device("cpu")
LAYERS = ["stages.0", "stages.1", "stages.2"]
# Those that take the soft labels of MixUp and CutMix; those that treat a label apart.
SOFT = ("cross_entropy", "kd", "lskd", "binary_kl", "binary_kl_norm", "fitnets", "rkd", "dhkd", "mhkd")
HARD = ("dkd", "dckd", "nkd")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_tree(folder / "tree", 3, 10, 3)
    make_shards(folder / "shards", 3, 10, 3)
    numbers = np.random.default_rng(0)
    for name, count in (("train", 40), ("test", 13)):
        images = numbers.integers(0, 256, (count, 3, 12, 12), dtype=np.uint8)
        np.savez(folder / f"{name}.npz", images=images, target=numbers.integers(0, 8, count))
    return folder


class Draw(Choices):
    """A recipe in the making."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.values: dict[str, Any] = {"description": "drawn"}

    def layers(self, count: int) -> list[str]:
        return self.random.sample(LAYERS, count)

    def maybe(self, probability: float, key: str, *choices: Any) -> None:
        if self.often(probability):
            self.values[key] = self.of(*choices)


def drawn(draw: Draw, files: Path) -> dict[str, Any]:
    values = draw.values
    values |= draw.of(
        {"data.name": "synthetic", "data.images": draw.of(20, 33), "data.classes": 7, "data.size": 8},
        {"data.name": "fashion_mnist", "data.synthetic": draw.of(20, 37)},
        {"data.name": "arrays", "data.folder": str(files)},
        {"data.name": "imagefolder", "data.root": str(files / "tree"), "data.size": 16, "data.workers": 0},
        {"data.name": "webdataset", "data.root": str(files / "shards"), "data.size": 16, "data.workers": 0},
    )
    if values["data.name"] != "synthetic":
        draw.maybe(0.2, "data.mixup", 0.2, 1.0)
        draw.maybe(0.2, "data.cutmix", 1.0)
        draw.maybe(0.3, "data.augment", False)
    if values["data.name"] in ("arrays", "imagefolder"):
        draw.maybe(0.3, "data.holdout", 5)
    mixed = "data.mixup" in values or "data.cutmix" in values
    method = values["method"] = draw.of(*SOFT) if mixed else draw.of(*SOFT, *HARD)
    _draw_method(draw, method)
    values |= {"student.name": "small_cnn", "student.width": draw.of(2, 3)}
    if method != "cross_entropy" or "method.hint_weight" in values or "method.distance_weight" in values:
        values |= {"teacher.name": "small_cnn", "teacher.width": draw.of(3, 4), "teacher.epochs": 1}
    values |= {"train.epochs": draw.of(1, 2, 3), "train.batch_size": draw.of(8, 10, 16)}
    values |= {"train.device": "cpu", "train.threads": 1, "train.lr": 0.01, "train.seed": draw.of(0, 1, 2)}
    values["train.schedule"] = draw.of("one_cycle", "cosine", "steps", "constant")
    if values["train.schedule"] == "steps":
        values["train.milestones"] = [1]
    if values["train.schedule"] != "one_cycle":
        draw.maybe(0.3, "train.warmup_epochs", 0.5, 1.0)
    for key, choices in OPTIONS.items():
        draw.maybe(0.3, f"train.{key}", *choices)
    return values


OPTIONS: dict[str, tuple[Any, ...]] = {
    "optimizer": ("sgd",), "clip_norm": (0.1, 5.0), "ema": (0.5, 0.9), "accumulate": (2, 3),
    "precision": ("bfloat16", "float16"), "teacher_precision": ("bfloat16",), "channels_last": (True,),
    "nonfinite": ("skip",), "log_every": (1, 3), "checkpoint_every": (1, 2), "keep_every": (1,),
    "val_batch_size": (1, 5, 64), "csv": (True,),
}  # fmt: skip


def _draw_method(draw: Draw, method: str) -> None:
    values = draw.values
    draw.maybe(0.3, "method.ce_weight", 0.5, 1.0)
    if method in ("kd", "lskd", "dkd", "dckd"):
        draw.maybe(0.3, "method.warmup_epochs", 1, 2)
        draw.maybe(0.3, "method.standardize", True, False)
        draw.maybe(0.3, "method.label_smoothing", 0.1)
    if method not in ("cross_entropy", "fitnets", "rkd"):
        draw.maybe(0.3, "method.temperature", 1.0, 3.0)
    if method == "fitnets" or draw.of(True, False, False, False):
        values |= {"method.hint_weight": 0.1, "method.hint_layer": draw.of(*LAYERS)}
        draw.maybe(0.3, "method.hint_teacher_layer", *LAYERS)
        draw.maybe(0.3, "method.hint_projection", "linear")
    if method == "rkd" or draw.of(True, False, False, False):
        values |= {"method.distance_weight": 0.5, "method.angle_weight": draw.of(0.0, 0.5)}
        draw.maybe(0.3, "method.relation_layer", *LAYERS)
    if method == "dhkd":
        values["method.hidden"] = 8
        draw.maybe(0.5, "method.head", "linear")
        draw.maybe(0.6, "method.align", "shared", "none")
        draw.maybe(0.3, "method.stop_epoch", 0, 1, 2)
        draw.maybe(0.3, "method.center_teacher", False)
    if method == "mhkd":
        count = draw.of(1, 2)
        values |= {"method.layers": draw.layers(count), "method.head_width": 4}
        draw.maybe(0.3, "method.teacher_layers", draw.layers(count))
        draw.maybe(0.3, "method.head_linears", 2)
        draw.maybe(0.3, "method.head_kd", 0.0, 1.0)
    if method == "dckd":
        draw.maybe(0.4, "method.fix_acquired", "argmax", False)


class Saves:
    """Counts the states that a run writes, and ends it like a kill right before or after one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.last, self.before = 0, 0, False
        self._save = run_folder.save_checkpoint
        monkeypatch.setattr(run_folder, "save_checkpoint", self)

    def __call__(self, path: Path, content: Any, **options: Any) -> None:
        self.count += path.name == "last.pt"
        at_last = path.name == "last.pt" and self.count == self.last
        if at_last and self.before:
            raise Killed
        self._save(path, content, **options)
        if at_last:
            raise Killed

    def until(self, last: int, before: bool = False) -> None:
        self.count, self.last, self.before = 0, last, before


@pytest.fixture
def saves(monkeypatch: pytest.MonkeyPatch) -> Saves:
    return Saves(monkeypatch)


@pytest.mark.parametrize("seed", range(8))
def test_a_run_killed_anywhere_ends_in_the_same_bits(
    seed: int, files: Path, workplace: Path, saves: Saves
) -> None:
    draw = Draw(seed)
    recipe = make_recipe(drawn(draw, files), "drawn")

    def run(runs: str, folder: Path | None = None) -> dict[str, Any]:
        return run_recipe("drawn", recipe, runs=Path(runs), console=make_console(quiet=True), folder=folder)

    summary = run("whole")
    saves.until(draw.random.randint(1, saves.count), draw.of(True, False))
    with pytest.raises(Killed):
        run("killed")  # where the teacher is trained too, and may be what is killed
    (killed,) = Path("killed").glob("drawn*")
    saves.until(0)
    run("killed", killed)
    assert compare_runs(Path(summary["folder"]), killed)[1] == []
    if recipe.train.precision == "float32":
        val = load_data(recipe.data).val_loader(CPU, 7)
        for which in ("best", "last"):
            network = fastkd.load(killed, weights=which).network
            assert evaluate(network, val, device=CPU)[0] == pytest.approx(summary[which]["val_accuracy"])
