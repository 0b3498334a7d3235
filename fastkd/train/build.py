"""Networks and methods of a recipe, built and tried on a device."""

from __future__ import annotations

import torch
from torch import nn

from fastkd.distill import Method, find_method
from fastkd.models import build_model

from . import distributed
from .data import Data
from .errors import RecipeError
from .recipe import Model, Recipe


def resolve_device(name: str) -> torch.device:
    """``auto`` is a CUDA device if there is one. Raises ``RecipeError`` for one that cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and distributed.world() > 1:
        return distributed.local_device()
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except Exception as error:  # each backend raises its own kind
        reason = str(error).strip().splitlines()[0]
        raise RecipeError(f"train.device = {name!r} cannot be used here: {reason}") from None
    return device


def build_network(config: Model, data: Data) -> nn.Module:
    """A fresh network for the data. Raises ``RecipeError`` if it takes other images."""
    try:
        return build_model(
            config.name, num_classes=data.num_classes, width=config.width, channels=data.channels
        )
    except ValueError as error:
        raise RecipeError(str(error)) from None


def build_method(
    recipe: Recipe, student: nn.Module, teacher: nn.Module | None, data: Data, device: torch.device
) -> Method:
    """The recipe's method on ``device``. Raises ``RecipeError`` if it does not fit the networks."""
    example, _ = data.example()
    if teacher is not None:
        teacher.to(device)
    try:
        method = find_method(recipe.method)(student, teacher, example=example.to(device), **recipe.options)
    except ValueError as error:
        raise RecipeError(f"method {recipe.method}: {error}") from None
    return method.to(device)


def try_method(recipe: Recipe, data: Data, device: torch.device, *, cached: bool = False) -> None:
    """A step on two images with untrained networks: what does not fit is found before any training.

    ``cached``: the teacher will be a cache of logits, which has no layers. Raises ``RecipeError``.
    """
    with torch.random.fork_rng():
        student = build_network(recipe.student, data).to(device)
        teacher = build_network(recipe.teacher, data) if recipe.teacher is not None else None
        method = build_method(recipe, student, teacher, data, device)
        images, target = (part.to(device) for part in data.example())
        logits = torch.zeros(len(target), data.num_classes, device=device)
        try:
            method.check((images, target, logits) if cached else (images, target))
        except ValueError as error:
            raise RecipeError(f"method {recipe.method}: {error}") from None
