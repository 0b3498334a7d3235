"""The networks: parameter counts, shapes, and layers that can be tapped."""

from __future__ import annotations

import pytest
import torch

from fastkd.distill import find_classifier
from fastkd.models import build_model

# Parameters at 100 classes of the networks of CRD's benchmark and mdistiller. Published: WRN-40-2 exactly
# (2,255,156); rounded, ResNet-20, 32, 56 (0.278, 0.473, 0.862 million, pytorch-cifar100) and ResNet-50 (23.71
# million). No exact numbers were found for the others, which guard against changes.
COUNTS = {
    "resnet8": 83_892,
    "resnet14": 181_108,
    "resnet20": 278_324,
    "resnet32": 472_756,
    "resnet44": 667_188,
    "resnet56": 861_620,
    "resnet110": 1_736_564,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "wrn_16_1": 180_916,
    "wrn_16_2": 703_284,
    "wrn_40_1": 569_780,
    "wrn_40_2": 2_255_156,
    "vgg8": 3_965_028,
    "vgg11": 9_277_284,
    "vgg13": 9_462_180,
    "vgg16": 14_774_436,
    "vgg19": 20_086_692,
    "resnet50": 23_705_252,
    "mobilenet_v2": 812_836,
    "shufflenet_v1": 949_258,
    "shufflenet_v2": 1_355_528,
}


@pytest.mark.parametrize(("name", "count"), COUNTS.items())
def test_cifar_networks(name: str, count: int) -> None:
    model = build_model(name, num_classes=100)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    logits = model.eval()(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 100)
    assert logits.isfinite().all()
    assert find_classifier(model)[1].out_features == 100


def test_mobilenet_v1_has_its_published_size() -> None:
    model = build_model("mobilenet_v1", num_classes=1000)
    assert (
        sum(parameter.numel() for parameter in model.parameters()) == 4_231_976
    )  # "4.2 million", Howard et al.
    assert model.eval()(torch.randn(1, 3, 224, 224)).shape == (1, 1000)


def test_last_feature_maps() -> None:
    sizes = {"resnet20": 8, "wrn_16_2": 8, "resnet50": 4, "shufflenet_v1": 4, "shufflenet_v2": 4}
    for name, side in sizes.items():
        model = build_model(name, num_classes=10)
        last = model.layer4 if name == "resnet50" else model.layer3
        shapes = []
        last.register_forward_hook(lambda *a, shapes=shapes: shapes.append(a[2].shape[2:]))
        model.eval()(torch.randn(1, 3, 32, 32))
        assert shapes == [(side, side)], name
    for name, side in (("vgg8", 4), ("mobilenet_v2", 2)):
        model = build_model(name, num_classes=10).eval()
        x = torch.randn(1, 3, 32, 32)
        assert model.stages(model.stem(x) if name == "mobilenet_v2" else x).shape[2:] == (side, side)


def test_the_small_pair_and_torchvisions() -> None:
    for width in (4, 32):
        assert build_model("small_cnn", num_classes=10, width=width, channels=1)(
            torch.randn(2, 1, 28, 28)
        ).shape == (2, 10)
    assert build_model("torchvision/resnet18", num_classes=7).fc.out_features == 7
    with pytest.raises(ValueError, match=r"unknown model 'resnet9' .did you mean resnet"):
        build_model("resnet9", num_classes=10)
    with pytest.raises(
        ValueError, match=r"unknown model 'torchvision/resnet19' .did you mean torchvision/resnet1"
    ):
        build_model("torchvision/resnet19", num_classes=10)
    with pytest.raises(ValueError, match="small_cnn needs a width"):
        build_model("small_cnn", num_classes=10)
    with pytest.raises(ValueError, match="vgg8 takes images of 3 channels, but the data have 1"):
        build_model("vgg8", num_classes=10, channels=1)
