"""After a run: exporting the student, and plotting curves of several runs."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from fastkd.cli import main
from fastkd.models import build_model
from fastkd.train.commands.export import EXTRA_FILE, SUFFIXES, ExportError, export
from fastkd.train.run.student import read_student

SHORT = ["data.synthetic=40", "train.batch_size=8", "train.epochs=2", "teacher.epochs=1", "train.device=cpu"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("place") / "runs"
    assert main(["train", "fashion-mnist/dhkd", *SHORT, "--runs", str(place)]) == 0
    student = [word for word in SHORT if not word.startswith("teacher")]
    assert main(["train", "fashion-mnist/student", *student, "--runs", str(place), "--seeds", "2"]) == 0
    return place


@pytest.mark.parametrize(
    ("form", "which"),
    [
        ("safetensors", "best"),
        ("safetensors", "last"),
        ("state_dict", "best"),
        ("state_dict", "last"),
        ("torch-export", "best"),
        ("onnx", "best"),
    ],
)
def test_the_student_elsewhere(runs: Path, tmp_path: Path, form: str, which: str) -> None:
    if form == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    run, path = runs / "fashion-mnist-dhkd-001", tmp_path / "deep" / "student.bin"
    assert main(["export", str(run), "--format", form, "--weights", which, "--to", str(path)]) == 0
    # The reference is built from the checkpoint without the export's code.
    content = torch.load(run / f"{which}.pt", weights_only=True)
    width = content.get("model", content.get("student"))["fc.weight"].shape[1] // 4
    network = build_model("small_cnn", num_classes=10, width=width, channels=1)
    network.load_state_dict(content.get("model", content.get("student")))
    for count in (1, 5):
        images = torch.randn(count, 1, 28, 28)
        with torch.no_grad():
            expected = network.eval()(images)
            if form in ("safetensors", "state_dict"):
                again = build_model("small_cnn", num_classes=10, width=width, channels=1).eval()
                weights = load_file(path) if form == "safetensors" else torch.load(path, weights_only=True)
                again.load_state_dict(weights)  # no trace of the auxiliary head
                got = again(images)
            elif form == "torch-export":
                got = torch.export.load(path).module()(images)
            else:
                session = onnxruntime.InferenceSession(str(path))
                got = torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert sorted(file.name for file in path.parent.iterdir()) == ["student.bin", "student.json"]


def test_every_format_says_what_it_is(runs: Path, tmp_path: Path) -> None:
    """The same description beside all files, and in those that have a place for it."""
    run = runs / "fashion-mnist-dhkd-001"
    forms = [form for form in SUFFIXES if form != "onnx" or _has_onnx()]
    for form in forms:
        assert main(["export", str(run), "--format", form, "--to", str(tmp_path / f"s{SUFFIXES[form]}")]) == 0
    about = json.loads((tmp_path / "s.json").read_text())
    assert about["transform"]["mean"] == [0.286]
    assert about["run"]["recipe"]["method"] == "dhkd"
    with safe_open(tmp_path / "s.safetensors", "pt") as file:
        said = [file.metadata()["fastkd"]]
    extra = {EXTRA_FILE: ""}
    torch.export.load(tmp_path / "s.pt2", extra_files=extra)
    said.append(extra[EXTRA_FILE])
    if "onnx" in forms:
        onnxruntime = pytest.importorskip("onnxruntime")
        session = onnxruntime.InferenceSession(tmp_path / "s.onnx")
        said.append(session.get_modelmeta().custom_metadata_map["fastkd"])
    assert [json.loads(text) for text in said] == [about] * len(said)


def _has_onnx() -> bool:
    return all(importlib.util.find_spec(name) for name in ("onnxruntime", "onnxscript"))


def test_refused_exports(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, path = runs / "fashion-mnist-dhkd-001", tmp_path / "s.safetensors"

    def refused(*words: str) -> str:
        capsys.readouterr()
        assert main(["export", *words]) == 2
        return capsys.readouterr().err

    path.write_text("mine")
    assert "is not overwritten" in refused(str(run), "--to", str(path))
    assert path.read_text() == "mine"
    link = tmp_path / "link.safetensors"
    link.symlink_to("nowhere")
    assert "link.safetensors already exists and is not overwritten" in refused(str(run), "--to", str(link))
    other = tmp_path / "other"
    other.mkdir()
    (other / "s.json").write_text("mine")
    assert "other/s.json already exists, is not the description" in refused(
        str(run), "--to", str(other / "s.safetensors")
    )
    assert [path.name for path in other.iterdir()] == ["s.json"]
    assert "expected another suffix" in refused(str(run), "--to", str(tmp_path / "new.json"))
    for form, name, expected in (
        ("state_dict", "new.safetensors", ".pt"),
        ("safetensors", "new.pt", ".safetensors"),
    ):
        words = refused(str(run), "--format", form, "--to", str(tmp_path / name))
        assert f"expected {expected} for --format {form}" in words
        assert not (tmp_path / name).exists()
    assert "is a group of seeds" in refused(str(runs / "fashion-mnist-student-001"))
    assert "is not a run folder" in refused(str(tmp_path))


class Moody(nn.Module):
    """Gives other outputs at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(784, 2)
        self.calls = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.fc(images.flatten(1)) * self.calls


def test_an_export_with_other_outputs_leaves_no_file(runs: Path, tmp_path: Path) -> None:
    _, about = read_student(runs / "fashion-mnist-dhkd-001")
    with pytest.raises(ExportError, match="outputs differ by"):
        export(Moody().eval(), about, "safetensors", tmp_path / "s.safetensors")
    assert not list(tmp_path.iterdir())


class Tied(nn.Module):
    """Two names of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(784, 784, bias=False)
        self.second = nn.Linear(784, 784)
        self.second.weight = self.first.weight

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(images.flatten(1)))


@pytest.mark.parametrize("form", ["safetensors", "state_dict"])
def test_tied_weights(form: str, runs: Path, tmp_path: Path) -> None:
    _, about = read_student(runs / "fashion-mnist-dhkd-001")
    assert export(Tied().eval(), about, form, tmp_path / "student") == 0


class Branches(nn.Module):
    """Its computation depends on the values of the images."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(784, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(images.flatten(1)) * (2 if images.abs().mean() > 100 else 1)


@pytest.mark.parametrize("form", SUFFIXES)
def test_a_network_that_cannot_be_traced(
    form: str, runs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _, about = read_student(runs / "fashion-mnist-dhkd-001")
    capfd.readouterr()
    if form in ("safetensors", "state_dict"):
        assert export(Branches().eval(), about, form, tmp_path / "student") == 0
        return
    if form == "onnx":
        pytest.importorskip("onnxscript")
    with pytest.raises(ExportError) as raised:
        export(Branches().eval(), about, form, tmp_path / "student")
    (line,) = str(raised.value).splitlines()
    assert line.startswith(f"--format {form}: torch cannot export small_cnn: ")
    assert "data-dependent" in line
    assert line.endswith("; --format safetensors and --format state_dict work for any network")
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


def test_runs_in_one_picture(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(runs / name) for name in ("fashion-mnist-dhkd-001", "fashion-mnist-student-001")]
    pictures = []
    for number, chosen in enumerate((folders, folders[:1])):
        path = tmp_path / f"{number}.png"
        assert main(["plot", *chosen, "--to", str(path)]) == 0
        assert str(path) in capsys.readouterr().out
        pictures.append(matplotlib.image.imread(path))
        assert pictures[-1].std() > 0.05
    assert pictures[0].shape != pictures[1].shape or not np.array_equal(*pictures)


def test_a_run_that_diverged_is_drawn_with_a_gap(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    group = shutil.copytree(runs / "fashion-mnist-student-001", tmp_path / "diverged")
    for seed, loss in (("seed-0", "NaN"), ("seed-1", "Infinity")):
        path = group / seed / "metrics.jsonl"
        first, last = path.read_text().splitlines()
        path.write_text(f"{first}\n{json.dumps({**json.loads(last), 'val_loss': float(loss)})}\n")
    folders = [str(group), str(group / "seed-1"), str(runs / "fashion-mnist-dhkd-001")]
    assert main(["plot", *folders, "--to", str(tmp_path / "all.png"), "--json"]) == 0
    drawn = json.loads(capsys.readouterr().out)["runs"]
    assert [one["last"]["val_loss"] is None for one in drawn] == [True, True, False]
    assert main(["plot", folders[1], "--to", str(tmp_path / "one.png")]) == 0


def test_refused_pictures(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, there = str(runs / "fashion-mnist-dhkd-001"), tmp_path / "there.png"
    there.write_text("mine")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "metrics.jsonl").write_text(json.dumps({"epoch": 1})[:-3])
    link = tmp_path / "link.png"
    link.symlink_to("nowhere")
    cases: dict[str, list[Any]] = {
        "there.png already exists and is not overwritten": [run, "--to", there],
        "link.png already exists and is not overwritten": [run, "--to", link],
        "expected a .png, .svg or .pdf file": [run, "--to", tmp_path / "a.jpeg"],
        "holds no metrics.jsonl with a finished epoch": [tmp_path, "--to", tmp_path / "a.png"],
        "metrics.jsonl cannot be read": [broken, "--to", tmp_path / "a.png"],
    }
    for words, arguments in cases.items():
        assert main(["plot", *map(str, arguments)]) == 2
        assert words in capsys.readouterr().err
    assert there.read_text() == "mine"
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize("form", ["safetensors", "state_dict", "torch-export"])
def test_a_student_that_names_its_logits(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("named.py").write_text(
        "from torch import nn\n"
        "class Named(nn.Module):\n"
        "    def __init__(self, num_classes):\n"
        "        super().__init__()\n"
        "        self.fc = nn.Linear(784, num_classes)\n"
        "    def forward(self, images):\n"
        "        return {'logits': self.fc(images.flatten(1)), 'features': images}\n"
    )
    short = ["data.synthetic=8", "train.epochs=1", "train.device=cpu"]
    assert main(["train", "fashion-mnist/student", "student.name=named:Named", *short]) == 0
    (run,) = Path("runs").iterdir()
    assert main(["export", str(run), "--format", form]) == 0
    if form == "torch-export":
        program = torch.export.load(run / "student.pt2").module()
        assert program(torch.zeros(4, 1, 28, 28)).shape == (4, 10)
