"""``fastkd.load``: the network of a run or an export, and the transform, give the logits of the trainer."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import fastkd
from fastkd.cli import main
from fastkd.data.data import load_data
from fastkd.errors import CheckpointError, TrainError
from fastkd.models import SmallCNN, build_model
from fastkd.recipe.schema import load_recipe
from fastkd.train.run.checkpoint import load_checkpoint, save_checkpoint
from fastkd.train.run.safetensors_file import save_safetensors
from fastkd.train.run.student import read_student
from tests.data.image_trees import make_tree
from tests.data.test_npz import write
from tests.small_fonts import tiny_student

CPU = torch.device("cpu")
BATCH = 4
SHORT = ["train.epochs=2", "train.batch_size=4", "train.device=cpu", "train.threads=1", "train.lr=0.01"]
SMALL = ["student.name=small_cnn", "student.width=2", *SHORT]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("place")


def trained(place: Path, name: str, *words: str) -> Path:
    runs = place / name
    if not runs.exists():  # once per module
        assert main(["train", *words, "--runs", str(runs)]) == 0
    (run,) = (path for path in runs.iterdir() if path.name != "teachers")
    return run


@pytest.fixture
def glyphs(place: Path, fonts: Path) -> Path:
    return trained(place, "glyphs", "glyphs/student", *tiny_student(fonts))


@pytest.fixture
def files(place: Path) -> Path:
    if not (place / "tree").exists():
        make_tree(place / "tree", classes=3, train=6, val=3)
    options = [f"data.root={place / 'tree'}", "data.size=32", "data.workers=0", "train.schedule=constant"]
    return trained(place, "files", "imagenet/r18", *SMALL, *options)


@pytest.fixture
def arrays(place: Path) -> Path:
    if not (place / "own").exists():
        write(place / "own", classes=np.array(["ant", "bee", "cat", "dog", "eel"]))
    return trained(place, "arrays", "emoji/student", *SMALL, f"data.folder={place / 'own'}")


@pytest.fixture(params=["dhkd", "mhkd"])
def with_heads(request: pytest.FixtureRequest, place: Path) -> Path:
    """A student whose method has heads of its own, and an average of the weights."""
    options = ["data.synthetic=40", "student.width=2", "teacher.epochs=1", "teacher.width=2", "train.ema=0.5"]
    return trained(place, request.param, f"fashion-mnist/{request.param}", *options, *SHORT)


def of_the_trainer(run: Path, weights: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits and labels of validation, by a network that is built without the code under test."""
    _, recipe = load_recipe(str(run / "recipe.yaml"))
    data, student = load_data(recipe.data), recipe.student
    size = data.example()[0].shape[-1]
    network = build_model(
        student.name, num_classes=data.num_classes, width=student.width, channels=data.channels, size=size
    )
    network.load_state_dict(weights)
    network.eval()
    with torch.no_grad():
        parts = [(network(images), target) for images, target in data.val_loader(CPU, BATCH)]
    return torch.cat([logits for logits, _ in parts]), torch.cat([target for _, target in parts])


def logits_of(loaded: Any, images: Any) -> Tensor:
    network, transform = loaded
    assert not network.training
    with torch.no_grad():
        return torch.cat([network(transform(batch)) for batch in images])


def best_of(run: Path) -> dict[str, Tensor]:
    return torch.load(run / "best.pt", weights_only=True)["model"]


def exported(run: Path, to: Path) -> Path:
    assert main(["export", str(run), "--to", str(to)]) == 0
    return to


@pytest.mark.parametrize("of", ["run", "file", "folder"])
def test_glyphs(of: str, glyphs: Path, tmp_path: Path) -> None:
    path = glyphs if of == "run" else exported(glyphs, tmp_path / "alone" / "student.safetensors")
    loaded = fastkd.load(path.parent if of == "folder" else str(path))
    _, recipe = load_recipe(str(glyphs / "recipe.yaml"))
    data = load_data(recipe.data)
    raw = torch.from_numpy(np.concatenate([data.images[face] for face in data.val_faces]))[:, None]
    expected, target = of_the_trainer(glyphs, best_of(glyphs))
    assert torch.equal(logits_of(loaded, raw.split(BATCH)), expected)
    summary = json.loads((glyphs / "summary.json").read_text())
    accuracy = (expected.argmax(-1) == target).double().mean().item()
    assert accuracy == summary["best"]["val_accuracy"] == loaded.about["run"]["val_accuracy"]
    assert loaded.classes[:3] == ("AΑ", "BΒ", "C")  # noqa: RUF001


@pytest.mark.parametrize("of", ["run", "file"])
def test_an_imagefolder_of_jpeg_files(of: str, files: Path, tmp_path: Path) -> None:
    loaded = fastkd.load(files if of == "run" else exported(files, tmp_path / "s.safetensors"))
    network, transform = loaded
    folder = ImageFolder(str(files.parent.parent / "tree" / "val"), transform=transform)
    with torch.no_grad():
        logits = torch.cat([network(images) for images, _ in DataLoader(folder, batch_size=BATCH)])
    expected, _ = of_the_trainer(files, best_of(files))
    assert torch.equal(logits, expected)
    assert loaded.classes == tuple(folder.classes)
    assert loaded.about["transform"]["resize"] == 36


def test_arrays_without_their_data(arrays: Path) -> None:
    """What is needed is in the run: the data may be gone."""
    expected, _ = of_the_trainer(arrays, best_of(arrays))
    own = arrays.parent.parent / "own"
    images = torch.from_numpy(np.load(own / "test.npz")["images"])
    own.rename(own.with_name("moved"))
    try:
        loaded = fastkd.load(arrays)
    finally:
        own.with_name("moved").rename(own)
    assert torch.equal(logits_of(loaded, images.split(BATCH)), expected)
    assert loaded.classes == ("ant", "bee", "cat", "dog", "eel")


def test_a_method_with_heads_and_an_average(with_heads: Path) -> None:
    assert load_checkpoint(with_heads / "last.pt", remedy="")["method"]  # the heads
    loaded = fastkd.load(with_heads)
    assert type(loaded.network) is SmallCNN
    assert loaded.network.state_dict().keys() == SmallCNN(10, width=2).state_dict().keys()
    raw = [torch.randint(0, 256, (BATCH, 1, 28, 28), dtype=torch.uint8)]
    last = fastkd.load(with_heads, weights="last")
    state = load_checkpoint(with_heads / "last.pt", remedy="")
    average = {k.removeprefix("module."): v for k, v in state["ema"].items() if k.startswith("module.")}
    for one, weights in ((loaded, best_of(with_heads)), (last, average)):
        network = SmallCNN(10, width=2)
        network.load_state_dict(weights)
        with torch.no_grad():
            assert torch.equal(logits_of(one, raw), network.eval()(one.transform(raw[0])))
    assert last.about["run"]["val_accuracy"] == state["history"][-1]["val_accuracy"]
    assert loaded.classes == tuple("0123456789")  # random images have no names


def test_what_it_says_about_itself(arrays: Path, tmp_path: Path) -> None:
    path = exported(arrays, tmp_path / "student.safetensors")
    about = json.loads((tmp_path / "student.json").read_text())
    assert about == fastkd.load(path).about == fastkd.load(arrays).about
    assert about["format"] == "fastkd-student-1"
    assert about["fastkd"] == fastkd.__version__
    assert about["network"] == {
        "name": "small_cnn", "num_classes": 5, "width": 2, "channels": 3, "size": 16
    }  # fmt: skip
    assert about["run"]["name"] == "emoji/student student.name=small_cnn"
    assert about["run"]["recipe"]["method"] == "cross_entropy"
    assert str(arrays.parent.parent) not in json.dumps(about)  # no path of this machine


def test_a_run_of_an_older_version_asks_its_data(arrays: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(arrays, old)
    facts = load_checkpoint(old / "best.pt", remedy="")
    for key in ("classes", "transform"):
        del facts[key]
    save_checkpoint(old / "best.pt", facts)
    assert fastkd.load(old).about == fastkd.load(arrays).about
    text = (old / "recipe.yaml").read_text()
    (old / "recipe.yaml").write_text(text.replace("/own", "/gone"))
    with pytest.raises(
        CheckpointError, match=r"older version of fastkd wrote it, and its data cannot be read"
    ):
        fastkd.load(old)
    shutil.copytree(arrays.parent.parent / "own", tmp_path / "gone")
    shutil.copy(tmp_path / "gone" / "test.npz", tmp_path / "gone" / "train.npz")
    (old / "recipe.yaml").write_text(re.sub(r"data\.folder: .*", f"data.folder: {tmp_path / 'gone'}", text))
    with pytest.raises(CheckpointError, match="its data have changed"):
        fastkd.load(old)


def test_within_an_epoch_no_accuracy_is_known(with_heads: Path, tmp_path: Path) -> None:
    shutil.copytree(with_heads, tmp_path / "run")
    state = load_checkpoint(with_heads / "last.pt", remedy="")
    save_checkpoint(tmp_path / "run" / "last.pt", {**state, "position": {"meter": {"steps": 1}}})
    run = fastkd.load(tmp_path / "run", weights="last").about["run"]
    assert (run["epoch"], run["val_accuracy"]) == (None, None)


OWN = """
from torch import nn
class Own(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.fc = nn.Linear(784, num_classes)
    def forward(self, images):
        return self.fc(images.flatten(1))
"""


def test_a_network_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own_network.py").write_text(OWN)
    short = ["data.synthetic=8", "train.epochs=1", "train.device=cpu"]
    assert main(["train", "fashion-mnist/student", "student.name=own_network:Own", *short]) == 0
    (run,) = Path("runs").iterdir()
    path = exported(run, tmp_path / "student.safetensors")
    weight = fastkd.load(run).network.fc.weight  # from the working directory

    class Twin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(784, 10)

    # A file does not decide what code is run.
    with pytest.raises(CheckpointError, match=r"of the network own_network:Own.*network=…"):
        fastkd.load(path)
    monkeypatch.delitem(sys.modules, "own_network")
    Path("own_network.py").write_text("raise RuntimeError('moved')")
    with pytest.raises(CheckpointError, match=r"cannot be rebuilt: RuntimeError: moved; .*network=…"):
        fastkd.load(run)
    for source in (run, path):
        network = Twin()
        loaded = fastkd.load(source, network=network)
        assert loaded.network is network
        assert torch.equal(network.fc.weight, weight)
        assert not network.training
    with pytest.raises(CheckpointError, match=r"2 missing: 0.weight, 0.bias; 2 not in this model"):
        fastkd.load(path, network=nn.Sequential(nn.Linear(784, 10)))
    with pytest.raises(TypeError, match=r"network is a type; expected a torch\.nn\.Module"):
        fastkd.load(path, network=Twin)  # type: ignore[arg-type]


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-40] ^= 0x10
    path.write_bytes(content)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def of_others(path: Path) -> None:
    weights = load_file(path)
    save_file(weights, path)


def rewritten(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Another description with a digest that fits."""

    def rewrite(path: Path) -> None:
        loaded = fastkd.load(path)
        change(loaded.about)
        save_safetensors(path, loaded.network, json.dumps(loaded.about))

    return rewrite


def other_weights(path: Path) -> None:
    save_safetensors(path, SmallCNN(4, width=2, channels=3), json.dumps(fastkd.load(path).about))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flipped, "is damaged: its SHA-256 does not match"),
        (truncated, "is truncated or damaged, or no safetensors file"),
        (lambda path: path.write_bytes(b""), "is truncated or damaged, or no safetensors file"),
        (lambda path: path.write_text("{}"), "is truncated or damaged, or no safetensors file"),
        (of_others, "does not say what network it is of: its header has no 'fastkd'"),
        (
            other_weights,
            r"does not fit the model: 2 of another shape: fc.weight has shape \[4, 8\], expected",
        ),
        (rewritten(lambda a: a["classes"].pop()), "classes has 4 names, but the network has 5 classes"),
        (
            rewritten(lambda a: a.update(format="fastkd-student-2")),
            "not one that this fastkd writes .*: format",
        ),
        (rewritten(lambda a: a["network"].update(name="resnet9")), "rebuilt: unknown model 'resnet9'"),
        (rewritten(lambda a: a["network"].update(width=None)), "rebuilt: small_cnn needs a width"),
        (rewritten(lambda a: a["network"].update(name="os:system")), "not part of fastkd; a file does not"),
        (rewritten(lambda a: a["transform"].update(mean=[0.5])), "mean has 1 numbers, expected one for each"),
        (rewritten(lambda a: a["network"].update(size=8)), "transform.crop is 16, but the network is for 8"),
        (rewritten(lambda a: a.pop("run")), "run: Field required"),
    ],
)
def test_refused_files(damage: Callable[[Path], None], message: str, arrays: Path, tmp_path: Path) -> None:
    path = exported(arrays, tmp_path / "student.safetensors")
    damage(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        fastkd.load(path)
    assert str(path) in str(caught.value)


def test_refused_paths(arrays: Path, tmp_path: Path) -> None:
    def refused(path: Path, words: str, **options: Any) -> None:
        with pytest.raises((TrainError, ValueError), match=words) as caught:
            fastkd.load(path, **options)
        assert str(path) in str(caught.value)

    refused(tmp_path / "nothing", "does not exist; expected a run folder, or a .safetensors file")
    refused(tmp_path, "is neither a run folder nor an export")
    begun = tmp_path / "begun"
    begun.mkdir()
    shutil.copy(arrays / "recipe.yaml", begun)
    refused(begun, "no checkpoint .*; a run writes it after its first epoch")
    group = tmp_path / "group"
    group.mkdir()
    (group / "seeds.json").write_text("{}")
    refused(group, "is a group of seeds; name one of its runs")
    one = exported(arrays, tmp_path / "one.safetensors")
    refused(one, "is an export, which has one epoch", weights="last")
    shutil.copy(one, tmp_path / "two.safetensors")
    refused(tmp_path, "holds one.safetensors, two.safetensors; name one of them")
    for suffix, words in ((".onnx", "onnxruntime"), (".pt2", "torch.export.load"), (".pt", "a state dict")):
        other = one.rename(one.with_suffix(suffix))
        refused(other, f"is not loaded: .*{words}")
        other.rename(one)
    refused(arrays / "summary.json", "is not loaded: it describes")
    with pytest.raises(ValueError, match="weights is 'first'; expected 'best' or 'last'"):
        fastkd.load(arrays, weights="first")  # type: ignore[arg-type]


def test_a_run_whose_description_is_damaged(arrays: Path, tmp_path: Path) -> None:
    shutil.copytree(arrays, tmp_path / "run")
    facts = load_checkpoint(arrays / "best.pt", remedy="")
    for wrong, words in (
        ({"classes": ["a"]}, "classes has 1 names, but the network has 5"),
        ({"transform": None}, "transform: "),
        ({"input": [3]}, "lacks a valid input shape"),
    ):
        save_checkpoint(tmp_path / "run" / "best.pt", {**facts, **wrong})
        with pytest.raises(CheckpointError, match=words):
            read_student(tmp_path / "run")
