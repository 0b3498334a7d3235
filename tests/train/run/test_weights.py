"""Networks by name, and teachers' weights from files of many formats."""

from __future__ import annotations

import argparse
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fastkd.cli import main
from fastkd.distill import MHKD
from fastkd.errors import CheckpointError
from fastkd.files.plain import load_plain
from fastkd.models import build_model
from fastkd.train.run.checkpoint import save_checkpoint
from fastkd.train.run.weights import load_weights
from tests.train.tiny import Evil


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_model("small_cnn", num_classes=4, width=2)


def prefixed(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    return {prefix + key: value for key, value in state.items()}


RUN = Path("runs/fashion-mnist-student-001")
WRAPPERS = ["model", "state_dict", "model_state_dict", "net", "network", "weights"]


@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod.", "model.", "net.backbone."])
@pytest.mark.parametrize("wrapper", [None, *WRAPPERS])
def test_state_dicts_as_people_keep_them(tmp_path: Path, prefix: str, wrapper: str | None) -> None:
    state = prefixed(prefix, network().state_dict())
    content = state if wrapper is None else {wrapper: state, "epoch": 3, "optimizer": {"lr": 0.1}}
    torch.save(content, tmp_path / "w.pt")
    model = network(1)
    load_weights(model, tmp_path / "w.pt", num_classes=4, remedy="")
    for key, value in network().state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


@pytest.mark.parametrize("prefix", ["", "model."])
def test_safetensors_files_of_other_programs(tmp_path: Path, prefix: str) -> None:
    path = tmp_path / "model.safetensors"
    state = {key: value.contiguous() for key, value in network().state_dict().items()}
    save_file(prefixed(prefix, state), path)
    model = network(1)
    assert load_weights(model, path, num_classes=4, remedy="") == {}
    for key, value in network().state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="is truncated or damaged, or no safetensors file"):
        load_weights(model, path, num_classes=4, remedy="")
    with pytest.raises(CheckpointError, match=r"no checkpoint .*gone"):
        load_weights(model, tmp_path / "gone.safetensors", num_classes=4, remedy="")


def test_an_export_is_a_teacher(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["data.synthetic=20", "student.width=2", "train.epochs=1", "train.device=cpu"]
    assert main(["train", "fashion-mnist/student", *short]) == 0
    assert main(["export", str(RUN), "--to", "student.safetensors"]) == 0
    teacher = ["teacher.width=2", "teacher.checkpoint=student.safetensors"]
    assert main(["train", "fashion-mnist/kd", *short, *teacher]) == 0
    assert "teacher: " in capsys.readouterr().out
    (of_kd,) = Path("runs").glob("fashion-mnist-kd*")
    summaries = [json.loads((run / "summary.json").read_text()) for run in (RUN, of_kd)]
    assert summaries[1]["teacher"]["val_accuracy"] == summaries[0]["best"]["val_accuracy"]
    classes = ["data.name=synthetic", "data.size=28", "data.channels=1", "data.classes=7"]
    other = [word for word in short if "synthetic" not in word] + teacher + classes
    capsys.readouterr()
    assert main(["train", "fashion-mnist/kd", *other]) == 2
    assert "was trained for 10 classes, but this data set has 7" in capsys.readouterr().err


def test_the_average_of_a_state_is_what_was_validated(tmp_path: Path) -> None:
    student, average = network(0).state_dict(), network(1).state_dict()
    ema = {**prefixed("module.", average), "n_averaged": torch.tensor(7)}
    for state, expected in (({"ema": ema}, average), ({"ema": None}, student)):
        save_checkpoint(tmp_path / "last.pt", {"student": student, **state})
        model = network(2)
        load_weights(model, tmp_path / "last.pt", num_classes=4, remedy="")
        for key, value in expected.items():
            assert torch.equal(model.state_dict()[key], value), key


def test_everything_that_does_not_fit_is_listed(tmp_path: Path) -> None:
    state = network().state_dict()
    del state["fc.bias"], state["stages.0.0.0.weight"]
    state["head.weight"] = torch.zeros(2)
    state["fc.weight"] = torch.zeros(7, 8)
    torch.save({"state_dict": prefixed("module.", state)}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError) as raised:
        load_weights(network(), tmp_path / "w.pt", num_classes=4, remedy="mend it")
    for part in (
        "2 missing: stages.0.0.0.weight, fc.bias",
        "1 not in this model: head.weight",
        "1 of another shape: fc.weight has shape [7, 8], expected [4, 8]",
        "mend it",
    ):
        assert part in str(raised.value)


def test_the_network_in_a_lightning_checkpoint(tmp_path: Path) -> None:
    state = {**prefixed("model.", network().state_dict()), "criterion.weight": torch.ones(3)}
    torch.save(
        {"state_dict": state, "pytorch-lightning_version": "2.6", "callbacks": {}}, tmp_path / "w.ckpt"
    )
    model = network(1)
    load_weights(model, tmp_path / "w.ckpt", num_classes=4, remedy="")
    assert torch.equal(model.fc.weight, network().fc.weight)
    del state["model.fc.bias"]
    torch.save({"state_dict": state}, tmp_path / "w.ckpt")
    with pytest.raises(CheckpointError, match=r"1 missing: fc\.bias; 1 not in this model: criterion\.weight"):
        load_weights(model, tmp_path / "w.ckpt", num_classes=4, remedy="")
    both = {**prefixed("student.", network().state_dict()), **prefixed("teacher.", network().state_dict())}
    torch.save({"state_dict": both}, tmp_path / "w.ckpt")
    with pytest.raises(CheckpointError, match=r"w\.ckpt: it holds 2 networks .*student\., teacher\."):
        load_weights(model, tmp_path / "w.ckpt", num_classes=4, remedy="")


def test_what_training_scripts_keep_beside_weights(tmp_path: Path) -> None:
    beside = {
        "args": argparse.Namespace(lr=0.1, milestones=[30, 60], inner=argparse.Namespace(a=None)),
        "best_acc1": np.float64(71.5),
        "epoch": np.int64(3),
        "loss": np.float32(0.5),
        "flag": np.bool_(True),
        "history": np.arange(6, dtype=np.float32).reshape(2, 3),
        "counts": OrderedDict(a=1),
    }
    torch.save({"net": network().state_dict(), **beside}, tmp_path / "w.pt")
    model = network(1)
    load_weights(model, tmp_path / "w.pt", num_classes=4, remedy="")
    assert torch.equal(model.fc.weight, network().fc.weight)
    content = load_plain(tmp_path / "w.pt")
    assert content["args"].inner.a is None
    assert (content["best_acc1"], content["epoch"], bool(content["flag"])) == (71.5, 3, True)
    assert np.array_equal(content["history"], beside["history"])


class Own:
    pass


@pytest.mark.parametrize(
    ("beside", "refused"),
    [
        (Own(), "tests.train.run.test_weights.Own"),
        (Path("x"), "pathlib.PosixPath"),
        (argparse.Namespace(a=Own()), "tests.train.run.test_weights.Own"),
        (np.array([Own()], dtype=object), ""),
        (nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_a_refused_class_is_named_with_a_safe_way_out(
    tmp_path: Path, beside: object, refused: str, legacy: bool
) -> None:
    file = tmp_path / "w.pt"
    torch.save(
        {"model": network().state_dict(), "x": beside}, file, _use_new_zipfile_serialization=not legacy
    )
    with pytest.raises(CheckpointError) as raised:
        load_weights(network(), file, num_classes=4, remedy="mend it")
    text = str(raised.value)
    assert "weights_only" not in text
    assert "torch.save(model.state_dict(), FILE)" in text
    assert refused in text, text


def test_a_file_that_is_none(tmp_path: Path) -> None:
    for content in (b"", b"hello", b"PK\x03\x04" + bytes(50), b"\x80\x02K\x01."):
        (tmp_path / "w.pt").write_bytes(content)
        with pytest.raises(CheckpointError) as raised:
            load_weights(network(), tmp_path / "w.pt", num_classes=4, remedy="mend it")
        assert "weights_only" not in str(raised.value)
    torch.save({"epoch": 3, "optimizer": {"lr": 1}}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"under model, state_dict.*: it has epoch, optimizer; mend it"):
        load_weights(network(), tmp_path / "w.pt", num_classes=4, remedy="mend it")


def test_counters_of_batch_normalisation_may_be_missing(tmp_path: Path) -> None:
    state = {k: v for k, v in network().state_dict().items() if not k.endswith("num_batches_tracked")}
    for prefix in ("", "module."):
        torch.save(prefixed(prefix, state), tmp_path / "w.pt")
        model = network(1)
        load_weights(model, tmp_path / "w.pt", num_classes=4, remedy="")
        assert torch.equal(model.fc.weight, network().fc.weight)


def test_heads_of_an_mhkd_run_are_read_as_safely(tmp_path: Path) -> None:
    torch.save({"method": {}, "x": Own()}, tmp_path / "last.pt")
    example = torch.zeros(2, 3, 16, 16)
    with pytest.raises(ValueError, match=r"cannot be read: it holds tests\.train\.run\.test_weights\.Own"):
        MHKD(
            network(),
            network(),
            layers=["stages.0"],
            example=example,
            teacher_heads=str(tmp_path / "last.pt"),
        )


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
def test_code_in_a_teacher_is_refused_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wrapper: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    state = {**network().state_dict(), "evil": Evil()}
    torch.save(state if wrapper is None else {wrapper: state}, "w.pt")
    short = ["data.synthetic=8", "train.epochs=1", "train.device=cpu", "teacher.checkpoint=w.pt"]
    assert main(["train", "fashion-mnist/kd", *short]) == 2
    assert "holds more than tensors" in capsys.readouterr().err
    assert not Path("owned").exists()
    assert not Path("runs").exists()


def test_one_source_of_weights(capsys: pytest.CaptureFixture[str]) -> None:
    both = ["data.synthetic=2", "teacher.checkpoint=a.pt", "teacher.weights=IMAGENET1K_V1"]
    assert main(["train", "imagenet/r18-kd", *both]) == 2
    assert "give either teacher.checkpoint or teacher.weights" in capsys.readouterr().err
    assert main(["train", "fashion-mnist/kd", "teacher.weights=DEFAULT"]) == 2
    assert "teacher.weights are torchvision's, but teacher.name is small_cnn" in capsys.readouterr().err


def test_networks_of_timm() -> None:
    pytest.importorskip("timm")
    model = build_model("timm/resnet10t", num_classes=7, channels=1).eval()
    with torch.no_grad():
        assert model(torch.zeros(2, 1, 64, 64)).shape == (2, 7)
    with pytest.raises(ValueError, match=r"unknown model 'timm/resnet10' \(did you mean .*timm/resnet10t"):
        build_model("timm/resnet10", num_classes=7)
    with pytest.raises(ValueError, match="has no width"):
        build_model("timm/resnet10t", num_classes=7, width=3)


def test_networks_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_networks.py").write_text(
        "from torch import nn\n"
        "def tiny(num_classes, width=3):\n"
        "    return nn.Sequential(nn.AdaptiveAvgPool2d(width), nn.Flatten(), nn.LazyLinear(num_classes))\n"
        "def odd(num_classes):\n    return 3\n"
        "def needy(num_classes, depth):\n    return nn.Identity()\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    for width, features in ((None, 9), (2, 4)):
        model = build_model("my_networks:tiny", num_classes=5, width=width)
        assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 5)
        assert model[2].in_features == features
    assert isinstance(build_model("torch.nn:Identity", num_classes=5), nn.Identity)
    for name, words in {
        "my_networks:odd": "gave int; expected a torch.nn.Module",
        "my_networks:needy": "cannot be built with {'num_classes': 5}.*depth",
        "my_networks:number": "expected a callable",
        "my_networks:none": "has no 'none'",
        "no_such_module:x": "cannot be imported",
    }.items():
        with pytest.raises(ValueError, match=words):
            build_model(name, num_classes=5)
