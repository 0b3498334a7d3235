"""torchvision's networks with published weights, made by torchvision's builders."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from fastkd.errors import CheckpointError
from fastkd.models import torchvision_builder


def torchvision_network(
    name: str, weights: str, *, num_classes: int, size: int
) -> tuple[nn.Module, list[str]]:
    """torchvision's network ``name`` with ``weights``, such as "IMAGENET1K_V1", and notes to print.

    torchvision's builders handle what a state dict does not say: old names in files, the image size (ViT), a
    transformed input (Inception, GoogLeNet). Weights are downloaded once, to torch.hub's folder.

    ``size`` is the side of the images, which are normalised with ImageNet's mean and standard deviation. For
    weights that expect other values the input is converted.

    Raises ``CheckpointError``.
    """
    from torchvision import models

    try:
        builder = torchvision_builder(name)
    except ValueError as error:
        raise CheckpointError(f"teacher.name: {error}") from None
    member = weights.rpartition(".")[2]
    known = models.get_model_weights(builder)
    if member not in known.__members__:
        raise CheckpointError(
            f"teacher.weights = {weights!r}: {name} has no such weights; "
            f"there are {', '.join(known.__members__) or 'none'}"
        )
    entry = known[member]
    _check_classes(entry, weights, num_classes)
    wanted = entry.transforms()
    (crop,) = set(wanted.crop_size)
    if crop != size and builder.startswith(("vit_", "maxvit")):
        raise CheckpointError(
            f"teacher.weights = {weights}: {name} needs images of {crop} pixels with them, but data.size = "
            f"{size}; data.size={crop}, or another network"
        )
    _read_once(entry, weights)
    model = models.get_model(builder, weights=entry, progress=False)
    notes = []
    if crop != size:
        notes.append(f"{name} was trained for images of {crop} pixels ({entry.name}), the data have {size}")
    if (tuple(wanted.mean), tuple(wanted.std)) != (IMAGENET_MEAN, IMAGENET_STD):
        model.register_forward_pre_hook(_Renormalised(wanted.mean, wanted.std))
        notes.append(
            f"{name} expects another normalisation than ImageNet's ({entry.name}); its input is converted"
        )
    return model, notes


def _check_classes(entry: Any, weights: str, num_classes: int) -> None:
    categories = entry.meta.get("categories")
    if categories is None:
        raise CheckpointError(f"teacher.weights = {weights}: these are features without a classifier")
    if len(categories) != num_classes:
        raise CheckpointError(
            f"teacher.weights = {weights}: they are for {len(categories)} classes, but this data set has "
            f"{num_classes}; teacher.weights=null trains a teacher, teacher.checkpoint=FILE loads another"
        )


def _read_once(entry: Any, weights: str) -> None:
    """Download the file and read it as plain tensors; torchvision's builders could run code in it."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / entry.url.rpartition("/")[2]
    try:
        entry.get_state_dict(progress=False, check_hash=True, weights_only=True, map_location="cpu")
    except OSError as error:  # URLError is one
        raise CheckpointError(
            f"teacher.weights = {weights}: {entry.url} cannot be downloaded ({error}); "
            f"download it by other means to {file}"
        ) from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError):
        raise CheckpointError(
            f"teacher.weights = {weights}: {file} is damaged or holds more than tensors; "
            "delete it to download it again"
        ) from None


class _Renormalised:
    """A forward pre-hook that converts from ImageNet's mean and standard deviation to others."""

    def __init__(self, mean: Any, std: Any) -> None:
        old, new = (
            (torch.tensor(m), torch.tensor(s)) for m, s in ((IMAGENET_MEAN, IMAGENET_STD), (mean, std))
        )
        self._scale = (old[1] / new[1]).view(1, -1, 1, 1)
        self._shift = ((old[0] - new[0]) / new[1]).view(1, -1, 1, 1)

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        images, *rest = inputs
        if self._scale.device != images.device:  # once: a copy makes the host wait
            self._scale, self._shift = self._scale.to(images.device), self._shift.to(images.device)
        return (images * self._scale.to(images.dtype) + self._shift.to(images.dtype), *rest)
