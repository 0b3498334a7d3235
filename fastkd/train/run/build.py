"""Building the networks and the method of a recipe, and trying them on a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastkd.data.data import Data
from fastkd.distill import CrossEntropy, GivenTeacher, Method, find_method
from fastkd.distill.heads import RowBatchNorm
from fastkd.errors import RecipeError, TrainError
from fastkd.messages import first_line, kind_and_text
from fastkd.models import build_model
from fastkd.recipe.sections import Model, Optimization, Recipe, Train
from fastkd.train import distributed
from fastkd.train.batches import Batch
from fastkd.train.preflight import check_trainable
from fastkd.train.random_state import get_random_state, set_random_state
from fastkd.train.trial import left_out, repeated, try_step

from .checkpoint import check_extra_states


def prepare_device(train: Train) -> torch.device:
    """Set torch's number of threads, and return the device; ``auto`` is CUDA if available.

    Every command that computes with a recipe starts here. Raises ``RecipeError`` for a device that cannot be
    used.
    """
    if train.threads is not None:
        torch.set_num_threads(train.threads)
    name = train.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and distributed.world() > 1:
        return distributed.local_device()
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except Exception as error:  # each backend raises types of its own
        raise RecipeError(f"train.device = {name!r} cannot be used here: {first_line(error)}") from None
    return device


def build_network(config: Model, data: Data) -> nn.Module:
    """A new network for the data. Raises ``RecipeError`` if it does not accept the images."""
    size = data.example()[0].shape[-1]
    try:
        return build_model(
            config.name, num_classes=data.num_classes, width=config.width, channels=data.channels, size=size
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


def synchronised(module: nn.Module) -> nn.Module:
    """``module`` with torch's SyncBatchNorm for every BatchNorm; unchanged with one rank.

    A method holds references to layers: convert the student before it is given to one. Raises ``RecipeError``
    for a layer that does more than normalise, which SyncBatchNorm would lose.
    """
    if distributed.world() == 1:
        return module
    for name, layer in module.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and type(layer).forward not in _NORMALISE_ONLY:
            raise RecipeError(
                f"train.sync_batchnorm: layer {name!r} is a {type(layer).__name__}, with a forward of its "
                "own; only torch's BatchNorm can be synchronised"
            )
    return nn.SyncBatchNorm.convert_sync_batchnorm(module)


# A head's RowBatchNorm differs only for a batch of one row, which all ranks together never have.
_NORMALISE_ONLY = tuple(
    kind.forward for kind in (nn.modules.batchnorm._BatchNorm, RowBatchNorm, nn.SyncBatchNorm)
)


def try_method(
    recipe: Recipe,
    data: Data,
    device: torch.device,
    *,
    teacher: nn.Module | None = None,
    given: GivenTeacher | None = None,
) -> list[str]:
    """Try training steps with an untrained student, and with the teacher if it will be trained.

    The steps have the sizes of the first and the last batch of an epoch. Returns notes on last batches that
    will be left out.

    ``teacher``: the trained one, or a cached one. ``given``: the cached one that a teacher will become, which
    the student is tried with. Raises ``RecipeError``.
    """
    config = recipe.teacher
    randoms = get_random_state()
    notes: list[str] = []
    try:
        if config is not None and teacher is None:
            teacher = tried(f"teacher {config.name}", build_network, config, data)
            if config.checkpoint is None and config.weights is None and config.cache is None:
                method: Method = CrossEntropy(teacher.to(device))
                notes += _try_steps(f"teacher {config.name}", method, config, "float32", 1, data, device)
        student = tried(f"student {recipe.student.name}", build_network, recipe.student, data)
        what = f"method {recipe.method}"
        method = tried(what, build_method, recipe, student.to(device), given or teacher, data, device)
        images, target = (part.to(device) for part in data.example())
        tried(what, method.check, with_given((images, target), method.teacher))
        train = recipe.train
        notes += _try_steps(what, method, train, train.precision, train.accumulate, data, device)
    finally:
        set_random_state(randoms)
    return notes


def _try_steps(
    what: str,
    method: Method,
    config: Optimization,
    precision: str,
    accumulate: int,
    data: Data,
    device: torch.device,
) -> list[str]:
    tried(what, check_trainable, method)
    tried(what, check_extra_states, method)
    images, target = (part.to(device) for part in data.example())
    notes = []
    loader = data.train_loader(config.batch_size, config.seed, device)
    for number, size in enumerate(loader.sizes()):
        rows = size // distributed.world()
        if number and distributed.world() > 1 and rows < 2:
            notes.append(f"{what}: {left_out(size, f'{distributed.world()} processes need two images each')}")
            continue
        batch = with_given((repeated(images, rows), repeated(target, rows)), method.teacher)
        try:
            try_step(method, batch, precision, accumulate)
        except Exception as error:  # layers can raise anything
            if number:
                notes.append(f"{what}: {left_out(size, kind_and_text(error))}")
                continue
            raise RecipeError(
                f"{what}: a training step on images {list(batch[0].shape)} fails: {kind_and_text(error)}"
            ) from error
    return notes


def with_given(batch: Batch, teacher: nn.Module | None) -> Batch:
    """A batch of images and target, with outputs of a cached teacher to try a step with."""
    return (*batch, *teacher.example(batch[1])) if isinstance(teacher, GivenTeacher) else batch


def tried(what: str, do: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call ``do(…)`` and turn its errors into ``RecipeError``."""
    try:
        return do(*arguments, **options)
    except TrainError:
        raise
    except ValueError as error:
        raise RecipeError(f"{what}: {error}") from error
    except Exception as error:  # layers and the user's networks can raise anything
        raise RecipeError(f"{what}: {kind_and_text(error)}") from error
