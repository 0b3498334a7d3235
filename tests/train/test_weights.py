"""Networks by name and teachers' weights from wherever people keep them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastkd.models import build_model
from fastkd.train.cli import main
from fastkd.train.errors import CheckpointError
from fastkd.train.weights import load_torchvision_weights, load_weights


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_model("small_cnn", num_classes=4, width=2)


def prefixed(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
def test_state_dicts_as_people_keep_them(tmp_path: Path, prefix: str, wrapper: str | None) -> None:
    state = prefixed(prefix, network().state_dict())
    content = state if wrapper is None else {wrapper: state, "epoch": 3, "optimizer": {"lr": 0.1}}
    torch.save(content, tmp_path / "w.pt")
    model = network(1)
    load_weights(model, tmp_path / "w.pt", num_classes=4, remedy="")
    for key, value in network().state_dict().items():
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


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch owned",)


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


def test_weights_of_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # torch.hub looks in its folder first; the file there is checked by the hash in its name.
    from torchvision.models import ResNet18_Weights

    model = build_model("torchvision/resnet18", num_classes=1000)
    source = build_model("torchvision/resnet18", num_classes=1000)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    file = tmp_path / "checkpoints" / ResNet18_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
    file.parent.mkdir()
    torch.save(source.state_dict(), file)
    for name in ("IMAGENET1K_V1", "ResNet18_Weights.IMAGENET1K_V1", "DEFAULT"):
        load_torchvision_weights(model, "torchvision/resnet18", name, num_classes=1000)
    assert torch.equal(model.fc.weight, source.fc.weight)
    with pytest.raises(CheckpointError, match=r"no such weights; there are IMAGENET1K_V1"):
        load_torchvision_weights(model, "torchvision/resnet18", "V9", num_classes=1000)
    with pytest.raises(CheckpointError, match="for 1000 classes, but this data set has 10"):
        load_torchvision_weights(model, "torchvision/resnet18", "DEFAULT", num_classes=10)
    torch.save({"weight": Evil()}, file)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        load_torchvision_weights(model, "torchvision/resnet18", "DEFAULT", num_classes=1000)
    assert not (tmp_path / "owned").exists()
    file.unlink()

    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    with pytest.raises(
        CheckpointError, match=r"cannot be fetched \(no route to host\); .* teacher\.checkpoint"
    ):
        load_torchvision_weights(model, "torchvision/resnet18", "DEFAULT", num_classes=1000)


def test_one_source_of_weights(capsys: pytest.CaptureFixture[str]) -> None:
    both = ["data.synthetic=2", "teacher.checkpoint=a.pt", "teacher.weights=IMAGENET1K_V1"]
    assert main(["train", "imagenet/r18-kd", *both]) == 2
    assert "give one of teacher.checkpoint and teacher.weights" in capsys.readouterr().err
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
        "my_networks:number": "expected something to call",
        "my_networks:none": "has no 'none'",
        "no_such_module:x": "cannot be imported",
    }.items():
        with pytest.raises(ValueError, match=words):
            build_model(name, num_classes=5)
