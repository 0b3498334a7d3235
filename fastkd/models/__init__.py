"""Networks that the recipes name."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial

from torch import nn

from .cifar_resnet import ResNet, ResNet50, WideResNet
from .cifar_vgg import VGG
from .glyphs import GlyphCNN
from .mobile import MobileNetV1, MobileNetV2, ShuffleNetV1, ShuffleNetV2
from .small import SmallCNN

__all__ = [
    "VGG",
    "GlyphCNN",
    "MobileNetV1",
    "MobileNetV2",
    "ResNet",
    "ResNet50",
    "ShuffleNetV1",
    "ShuffleNetV2",
    "SmallCNN",
    "WideResNet",
    "build_model",
    "check_model",
]

_X4 = (32, 64, 128, 256)
# Networks that have a width to choose, and those that do not: each is called with the number of classes.
_SCALABLE: dict[str, Callable[..., nn.Module]] = {"glyph_cnn": GlyphCNN, "small_cnn": SmallCNN}
_FIXED: dict[str, Callable[[int], nn.Module]] = {
    **{f"resnet{depth}": partial(ResNet, depth) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": partial(ResNet, depth, widths=_X4) for depth in (8, 32)},
    **{f"wrn_{depth}_{width}": partial(WideResNet, depth, width) for depth in (16, 40) for width in (1, 2)},
    **{f"vgg{depth}": partial(VGG, depth) for depth in (8, 11, 13, 16, 19)},
    "resnet50": ResNet50,
    "mobilenet_v1": MobileNetV1,
    "mobilenet_v2": MobileNetV2,
    "shufflenet_v1": ShuffleNetV1,
    "shufflenet_v2": ShuffleNetV2,
}
_TORCHVISION = "torchvision/"


def check_model(name: str, width: int | None) -> None:
    """Raise ``ValueError`` unless there is a network ``name``, and a width just where it takes one.

    Names of torchvision's are believed until they are built: importing it takes seconds.
    """
    if not name.startswith(_TORCHVISION):
        _check_name(name, [*_SCALABLE, *_FIXED])
    if (width is None) == (name in _SCALABLE):
        raise ValueError(f"{name} needs a width" if width is None else f"{name} has no width, got {width}")


def _check_name(name: str, names: list[str]) -> None:
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        hint = f" (did you mean {', '.join(near)}?)" if near else ""
        raise ValueError(f"unknown model {name!r}{hint}; there are {', '.join(names[:40])}")


def build_model(name: str, *, num_classes: int, width: int | None = None, channels: int = 3) -> nn.Module:
    """The network called ``name`` in recipes, for images of ``channels`` channels.

    ``torchvision/NAME`` is torchvision's, untrained. Raises ``ValueError``.
    """
    check_model(name, width)
    if name == "small_cnn":
        return SmallCNN(num_classes, width=width or 1, channels=channels)
    wanted = 1 if name == "glyph_cnn" else 3
    if channels != wanted:
        raise ValueError(f"{name} takes images of {wanted} channels, but the data have {channels}")
    if name in _SCALABLE:
        return _SCALABLE[name](num_classes, width=width)
    if name.startswith(_TORCHVISION):
        from torchvision import models

        _check_name(name, [_TORCHVISION + model for model in models.list_models(models)])
        return models.get_model(name.removeprefix(_TORCHVISION), num_classes=num_classes)
    return _FIXED[name](num_classes)
