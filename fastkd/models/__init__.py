"""The networks that recipes can name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from fastkd.imports import import_named
from fastkd.messages import nearest

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
# Networks with a configurable width, and networks without; each is called with the number of classes.
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
_TORCHVISION, _TIMM = "torchvision/", "timm/"


def check_model(name: str, width: int | None) -> None:
    """Raise ``ValueError`` if there is no network ``name``, or for a missing or superfluous width.

    Names of torchvision, timm and ``module:callable`` are checked when they are built.
    """
    if ":" in name:  # the callable checks its width
        return
    if not name.startswith((_TORCHVISION, _TIMM)):
        _check_name(name, [*_SCALABLE, *_FIXED], list_all=True)
    if (width is None) == (name in _SCALABLE):
        raise ValueError(f"{name} needs a width" if width is None else f"{name} has no width, got {width}")


def build_model(
    name: str, *, num_classes: int, width: int | None = None, channels: int = 3, size: int | None = None
) -> nn.Module:
    """Build the untrained network ``name`` for images with ``channels`` channels.

    ``size``: side of the images, for torchvision's networks with a fixed size (ViT, MaxViT). Auxiliary
    classifiers (GoogLeNet, Inception) are left out, since they need a loss of their own.

    ``name`` is a network of fastkd, ``torchvision/NAME``, ``timm/NAME`` (timm must be installed), or
    ``module:callable``, which is called with ``num_classes=`` (and ``width=`` if given). Raises
    ``ValueError``.
    """
    check_model(name, width)
    if ":" in name:
        return _call_named(name, num_classes, width)
    if name.startswith(_TIMM):
        return _from_timm(name, num_classes, channels)
    if name == "small_cnn":
        return SmallCNN(num_classes, width=width or 1, channels=channels)
    wanted = 1 if name == "glyph_cnn" else 3
    if channels != wanted:
        raise ValueError(f"{name} takes images of {wanted} channels, but the data have {channels}")
    if name in _SCALABLE:
        return _SCALABLE[name](num_classes, width=width)
    if name.startswith(_TORCHVISION):
        from torchvision import models

        model = torchvision_builder(name)
        return models.get_model(model, num_classes=num_classes, **_torchvision_options(model, size))
    return _FIXED[name](num_classes)


def _check_name(name: str, names: list[str], list_all: bool = False) -> None:
    if name not in names:
        rest = (
            f"; there are {', '.join(names)}; others are torchvision/NAME, timm/NAME or module:callable"
            if list_all
            else ""
        )
        raise ValueError(f"unknown model {name!r}{nearest(name, names)}{rest}")


def torchvision_builder(name: str) -> str:
    """torchvision's own name of ``torchvision/NAME``. Raises ``ValueError`` if it has no such network."""
    from torchvision import models

    _check_name(name, [_TORCHVISION + model for model in models.list_models(models)])
    return name.removeprefix(_TORCHVISION)


def _torchvision_options(model: str, size: int | None) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if model in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": True}
    if size is not None and model.startswith("vit_"):
        options["image_size"] = size
    if size is not None and model.startswith("maxvit"):
        options["input_size"] = (size, size)
    return options


def _from_timm(name: str, num_classes: int, channels: int) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise ValueError(f"{name} needs timm, which is not installed: pip install timm") from None
    _check_name(name, [_TIMM + model for model in timm.list_models()])
    model = name.removeprefix(_TIMM)
    return timm.create_model(model, pretrained=False, num_classes=num_classes, in_chans=channels)


def _call_named(name: str, num_classes: int, width: int | None) -> nn.Module:
    build = import_named(name, "the model")
    options = {"num_classes": num_classes} | ({} if width is None else {"width": width})
    if not callable(build):
        raise ValueError(f"the model {name!r} is {build!r}; expected a callable with an argument num_classes")
    try:
        model = build(**options)
    except TypeError as error:
        raise ValueError(f"the model {name!r} cannot be built with {options}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"the model {name!r} gave {type(model).__name__}; expected a torch.nn.Module")
    return model
