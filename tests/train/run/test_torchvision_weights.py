"""torchvision's networks with weights equal those of torchvision's builders, for each family."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision import models
from torchvision.models._api import WeightsEnum

from fastkd.cli import main
from fastkd.errors import CheckpointError
from fastkd.models import build_model
from fastkd.train.run.torchvision_weights import torchvision_network
from fastkd.train.run.weights import load_weights
from tests.train.tiny import Evil

# A small member of every module of torchvision.models, and those with special weights.
MEMBERS = [
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_l", "googlenet",
    "inception_v3", "maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf",
    "resnet18", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11_bn", "vit_b_16",
]  # fmt: skip


def state_of(name: str, **options: Any) -> dict[str, torch.Tensor]:
    """Random weights of the right shapes, without the slow initialisation of layers."""
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    with contextlib.nullcontext() if name.startswith("regnet") else torch.device("meta"):
        shapes = models.get_model(name, **options).state_dict()
    generator = torch.Generator().manual_seed(0)
    for key, value in shapes.items():  # in place, to keep the versions of layers
        if value.is_floating_point() and "running_var" not in key:
            shapes[key] = torch.randn(value.shape, generator=generator) * 0.05
        else:
            shapes[key] = torch.ones(value.shape, dtype=value.dtype)
    return shapes


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``published(name, **options)`` sets the content of every file of weights."""

    def set_to(name: str, **options: Any) -> None:
        state = state_of(name, **options)
        monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda self, **_: copy.copy(state))

    # Skipped, since the weights overwrite it; it takes seconds for VGG and ViT.
    for draw in ("kaiming_normal_", "kaiming_uniform_", "trunc_normal_", "normal_", "xavier_uniform_"):
        monkeypatch.setattr(nn.init, draw, lambda tensor, *_, **__: tensor)
    return set_to


def test_every_family_is_here() -> None:
    def family(name: str) -> str:
        return models.get_model_builder(name).__module__

    assert {family(name) for name in models.list_models(models)} == {family(name) for name in MEMBERS}


@pytest.mark.parametrize("name", MEMBERS)
def test_outputs_are_torchvisions(name: str, published: Any) -> None:
    weights = models.get_model_weights(name).DEFAULT
    if name == "vit_b_16":
        weights = models.ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1
    transforms = weights.transforms()
    (crop,) = transforms.crop_size
    published(name, **({"image_size": crop} if name.startswith("vit") else {}))
    ours, notes = torchvision_network(f"torchvision/{name}", weights.name, num_classes=1000, size=crop)
    theirs = models.get_model(name, weights=weights)
    assert type(ours) is type(theirs)
    for attribute in ("transform_input", "aux_logits", "image_size"):
        assert getattr(ours, attribute, None) == getattr(theirs, attribute, None)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    side = crop if name.startswith(("vit", "maxvit")) else 96 if name == "inception_v3" else 64
    pixels = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    own_mean, own_std = (torch.tensor(v)[:, None, None] for v in (transforms.mean, transforms.std))
    with torch.no_grad():
        got = ours.eval()((pixels - mean) / std)
        wanted = theirs.eval()((pixels - own_mean) / own_std)
    assert wanted.isfinite().all()
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)
    assert bool(notes) == (name == "efficientnet_v2_l")


def test_the_image_size_of_weights(published: Any) -> None:
    swag = "IMAGENET1K_SWAG_E2E_V1"
    with pytest.raises(CheckpointError, match=r"needs images of 384 pixels with them, but data\.size = 224"):
        torchvision_network("torchvision/vit_b_16", swag, num_classes=1000, size=224)
    published("efficientnet_b1")
    _, notes = torchvision_network("torchvision/efficientnet_b1", "DEFAULT", num_classes=1000, size=224)
    assert notes == [
        "torchvision/efficientnet_b1 was trained for images of 240 pixels (IMAGENET1K_V2), the data have 224"
    ]


def test_features_alone_are_no_teacher() -> None:
    with pytest.raises(CheckpointError, match="these are features without a classifier"):
        torchvision_network("torchvision/vgg16", "IMAGENET1K_FEATURES", num_classes=1000, size=224)
    with pytest.raises(CheckpointError, match=r"unknown model 'torchvision/resnet19' \(did you mean"):
        torchvision_network("torchvision/resnet19", "DEFAULT", num_classes=1000, size=224)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """torch.hub's folder, which it searches first."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "checkpoints"


def test_old_names_of_densenet(hub: Path) -> None:
    # As published: norm.1 where the module is norm1.
    state = state_of("densenet121")
    old = {
        re.sub(r"(denselayer\d+\.(?:norm|relu|conv))(\d)\.", r"\1.\2.", key): value
        for key, value in state.items()
        if "num_batches_tracked" not in key
    }
    assert len(old.keys() - state.keys()) > 500
    torch.save(old, hub / models.DenseNet121_Weights.IMAGENET1K_V1.url.rpartition("/")[2])
    model, _ = torchvision_network("torchvision/densenet121", "IMAGENET1K_V1", num_classes=1000, size=224)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]) or key.endswith("num_batches_tracked")
    other = build_model("torchvision/densenet121", num_classes=1000)
    load_weights(other, next(hub.iterdir()), num_classes=1000, remedy="")
    assert torch.equal(other.classifier.weight, model.classifier.weight)


def test_a_file_of_weights(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "torchvision/squeezenet1_1"
    file = models.SqueezeNet1_1_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
    state = state_of("squeezenet1_1")
    torch.save(state, hub / file)
    for weights in ("IMAGENET1K_V1", "SqueezeNet1_1_Weights.IMAGENET1K_V1", "DEFAULT"):
        model, notes = torchvision_network(name, weights, num_classes=1000, size=224)
        assert torch.equal(model.classifier[1].weight, state["classifier.1.weight"])
        assert notes == []
    with pytest.raises(CheckpointError, match=r"no such weights; there are IMAGENET1K_V1"):
        torchvision_network(name, "V9", num_classes=1000, size=224)
    with pytest.raises(CheckpointError, match="for 1000 classes, but this data set has 10"):
        torchvision_network(name, "DEFAULT", num_classes=10, size=224)
    torch.save({"weight": Evil()}, hub / file)
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        torchvision_network(name, "DEFAULT", num_classes=1000, size=224)
    assert not Path("owned").exists()
    (hub / file).unlink()

    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    with pytest.raises(
        CheckpointError, match=rf"downloaded \(no route to host\); .* other means to .*{file}"
    ):
        torchvision_network(name, "DEFAULT", num_classes=1000, size=224)


def test_a_run_with_weights_by_name(hub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(state_of("squeezenet1_1"), hub / models.SqueezeNet1_1_Weights.DEFAULT.url.rpartition("/")[2])
    words = [
        "teacher.name=torchvision/squeezenet1_1",
        "student.name=torchvision/squeezenet1_0",
        "data.size=32",
    ]
    short = [
        "data.synthetic=3",
        "train.epochs=1",
        "train.batch_size=2",
        "train.milestones=[1]",
        "train.device=cpu",
    ]
    assert main(["train", "imagenet/r18-kd", *words, *short]) == 0
    out = capsys.readouterr().out
    assert (
        "torchvision/squeezenet1_1 was trained for images of 224 pixels (IMAGENET1K_V1), the data have 32"
        in out
    )
