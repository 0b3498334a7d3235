"""Checks before training, for mistakes that would silently train nothing or fail late."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _BaseDataLoaderIter

from fastkd.distill.method import Method
from fastkd.distill.options import checked_by, model_of
from fastkd.errors import TrainError
from fastkd.messages import kind_and_text, some

from .random_state import get_random_state, own_generators, set_random_state

if TYPE_CHECKING:
    from pydantic import BaseModel

_LISTED = 4
_ENTRIES = "expected (images, target), or (images, target, teacher_logits) to train"


def checked_options(**given: Any) -> Sequence[Any]:
    """The values, in types and ranges of the recipe's ``train`` section; NumPy's numbers become Python's.

    Raises ``ValueError`` that names options, values and what is expected.
    """
    plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in given.items()}
    return list(checked_by(_model_of(tuple(given)), plain).values())


@functools.lru_cache
def _model_of(names: tuple[str, ...]) -> type[BaseModel]:
    from fastkd.recipe.sections import Train

    fields = {name: Train.model_fields[name] for name in names}
    return model_of(
        {name: (Annotated[(field.annotation, None, *field.metadata)], ...) for name, field in fields.items()}
    )


def check_others(scheduler_interval: str, compile: Any, stop: Callable[[], bool] | None) -> None:
    """Check the options that recipes do not have. Raises ``ValueError`` or ``TypeError``."""
    if scheduler_interval not in ("step", "epoch"):
        raise ValueError(f"scheduler_interval is {scheduler_interval!r}; expected 'step' or 'epoch'")
    if not isinstance(compile, bool | str) and not callable(compile):
        raise TypeError(f"compile is {compile!r}; expected True, False or the name of a backend")
    if stop is not None and not callable(stop):
        raise TypeError(f"stop is {stop!r}; expected a function without arguments, or None")


def check_trainable(method: Method) -> None:
    """Raise ``ValueError`` if all parameters are frozen."""
    if not any(parameter.requires_grad for parameter in method.parameters()):
        raise ValueError("nothing to train: no parameter of the network or the method has requires_grad=True")


def check_optimizer(method: Method, optimizer: Any) -> None:
    """``optimizer`` must have exactly the parameters that the method trains. Raises ``ValueError``.

    Parameters with ``requires_grad=False`` may be left out.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        several = isinstance(optimizer, list | tuple | dict)
        raise ValueError(
            f"optimizer is {_kind(optimizer)}; expected one torch.optim.Optimizer"
            + (", with parameter groups for different settings" if several else "")
        )
    check_trainable(method)
    wanted = {p: name for name, p in method.named_parameters() if p.requires_grad}
    held = dict.fromkeys(parameter for group in optimizer.param_groups for parameter in group["params"])
    known = dict.fromkeys(method.parameters(), "")
    # Not by the teacher's truth value: a compiled module has a length only if the module in it has one.
    named = () if method.teacher is None else method.teacher.named_parameters()
    of_teacher = {p: name for name, p in named}
    strangers = [
        f"teacher.{of_teacher[p]}" if p in of_teacher else f"a parameter of shape {list(p.shape)}"
        for p in held
        if p not in known
    ]
    missing = [name for parameter, name in wanted.items() if parameter not in held]
    faults = []
    if missing:
        faults.append(f"lacks {some(missing, _LISTED)}, which would never change")
    if strangers:
        faults.append(f"has {some(strangers, _LISTED)}, which this method does not train")
    if faults:
        raise ValueError(
            f"optimizer: it {' and '.join(faults)}; give it method.parameters() (with fit: those of the "
            "student and of the loss), and set requires_grad=False on parameters that must not change"
        )


def check_scheduler(
    scheduler: Any,
    optimizer: torch.optim.Optimizer,
    *,
    own_optimizer: bool,
    interval: str,
    epochs: int,
    batches: int | None,
) -> None:
    """The scheduler must change this optimizer's learning rate, up to the end of training.

    ``own_optimizer``: the caller gave none. ``batches``: per epoch. Raises ``ValueError``.
    """
    if scheduler is None:
        return
    per_epoch = 1 if interval == "epoch" else batches
    total = None if per_epoch is None else per_epoch * epochs
    if own_optimizer:
        raise ValueError("scheduler is given, but the optimizer it belongs to is not: give optimizer too")
    if not callable(getattr(scheduler, "step", None)):
        raise ValueError(f"scheduler is {_kind(scheduler)}; expected a torch.optim.lr_scheduler")
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        raise ValueError(
            "scheduler is ReduceLROnPlateau, whose step() takes a metric; expected one that counts steps"
        )
    for part in _parts(scheduler):
        bound = getattr(part, "optimizer", optimizer)
        if bound is not optimizer:
            raise ValueError(
                f"scheduler: this {type(part).__name__} belongs to another optimizer and "
                "would change its learning rate; make it with the optimizer that is given"
            )
        steps = getattr(part, "total_steps", None)  # OneCycleLR raises beyond it
        if isinstance(steps, int) and total is not None and steps < total:
            raise ValueError(
                f"scheduler: {type(part).__name__} ends after {steps} steps, but there are {total} "
                f"({interval}s over all epochs)"
            )


def _parts(scheduler: Any) -> Iterable[Any]:
    yield scheduler
    for part in getattr(scheduler, "_schedulers", ()):
        yield from _parts(part)


def cannot_be_averaged(student: nn.Module, error: Exception) -> ValueError:
    """The error for a student whose copy, with which an average starts, raised ``error``."""
    old = [
        name or type(module).__name__
        for name, module in student.named_modules()
        if any(type(hook).__name__ == "WeightNorm" for hook in module._forward_pre_hooks.values())
    ]
    if old:
        remedy = (
            f"torch.nn.utils.weight_norm of {some(old, _LISTED)} recomputes the weight in each pass; "
            "torch.nn.utils.parametrizations.weight_norm can be copied"
        )
    else:
        remedy = f"copy.deepcopy raises {kind_and_text(error)}"
    return ValueError(f"ema: the average starts as a copy of the student, which cannot be copied: {remedy}")


def check_not_scripted(student: nn.Module, teacher: nn.Module | None) -> None:
    """Raise ``ValueError`` for a network of torch.jit, which takes no hooks."""
    for role, network in (("student", student), ("teacher", teacher)):
        if isinstance(network, torch.jit.ScriptModule):
            raise ValueError(
                f"{role} is {_kind(network)} of torch.jit, which cannot be trained here; expected the "
                "torch.nn.Module that it was made of (compile=True compiles it)"
            )


def other_format(role: str, network: nn.Module | None, images: Tensor, error: Exception) -> str | None:
    """What to say of ``error`` if ``network`` has parameters of another format than ``images``; else None."""
    if "type" not in str(error):  # as in torch's messages about it, and not in one about memory
        return None
    parameters = () if network is None else network.parameters()
    found = next((p.dtype for p in parameters if p.is_floating_point()), images.dtype)
    if found == images.dtype:
        return None
    remedy = "give it as float32, and precision='bfloat16' or 'float16' to compute in another format"
    if role == "teacher" and found in (torch.bfloat16, torch.float16):
        remedy = f"give teacher_precision={str(found).removeprefix('torch.')!r}"
    return f"the {role}'s parameters are {found}, but its images {images.dtype}: {remedy} ({error})"


@contextlib.contextmanager
def formats_named(method: Method, images: Tensor, precision: str) -> Iterator[None]:
    """Name the network in torch's error about a network and images of different formats."""
    try:
        yield
    except RuntimeError as error:
        networks = [("teacher", method.teacher)] if method.teacher_dtype in (None, torch.float32) else []
        for role, network in (*networks, ("student", method.student)) if precision == "float32" else ():
            if (hint := other_format(role, network, images, error)) is not None:
                raise TrainError(hint) from error
        raise


def check_channels_last(method: Method) -> None:
    """Raise ``ValueError`` if a network has weights of 3-D convolutions."""
    for role, network in (("method", method), ("teacher", method.teacher)):
        for name, parameter in network.named_parameters() if network is not None else ():
            if isinstance(parameter, nn.UninitializedParameter) or parameter.dim() != 5:
                continue
            name = name if role == "method" else f"teacher.{name}"
            raise ValueError(
                f"channels_last is a format of images [N, C, H, W], but {name} has shape "
                f"{list(parameter.shape)}; leave channels_last out"
            )


def check_loaders(train: Any, val: Any, epochs: int, *, averaged: bool) -> None:
    """Raise ``TrainError`` for a loader that is empty or cannot be iterated as often as it is read.

    ``val`` may be None. ``averaged``: each epoch validates the student and its average.
    """
    for name, loader in (("train_loader", train), ("val_loader", val)):
        if loader is None and name == "val_loader":
            continue
        if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
            raise TrainError(f"{name} is {_kind(loader)}; expected an iterable of (images, target)")
        if isinstance(loader, Mapping | str | bytes | Tensor):
            raise TrainError(f"{name} is {_kind(loader)}; expected an iterable of batches (images, target)")
        twice = averaged and name == "val_loader"
        if _once(loader) and (epochs > 1 or twice):
            often = f"there are {epochs} epochs" if epochs > 1 else "with ema an epoch is validated twice"
            raise TrainError(
                f"{name} is {_kind(loader)}, but {often}; {_kind(loader)} can be iterated once only: give a "
                "list or a DataLoader"
            )
    if isinstance(val, Sequence) and not len(val):
        raise TrainError("the validation loader yielded no batch")


def _once(loader: Any) -> bool:
    """Whether ``loader`` is an iterator that cannot restart. Others may, as NVIDIA DALI's do."""
    known = isinstance(loader, _BaseDataLoaderIter) or type(loader).__module__ in ("builtins", "itertools")
    return isinstance(loader, Iterator) and known


def first_of(loader: Any) -> Any:
    """The first batch of a list or of a ``DataLoader`` without workers, or None; restores random states."""
    if isinstance(loader, DataLoader):
        if loader.num_workers or isinstance(loader.dataset, torch.utils.data.IterableDataset):
            return None
    elif not isinstance(loader, list | tuple):
        return None
    own = own_generators(loader)
    randoms = get_random_state(own)
    try:
        return next(iter(loader), None)
    finally:
        set_random_state(randoms, own)


def checked_batch(batch: Any, name: str) -> Sequence[Any]:
    """``batch`` if it is images, target and optional logits; else raises ``TrainError`` that describes it."""
    if isinstance(batch, Mapping):
        keys = list(map(str, batch))
        labels = next((key for key in ("labels", "label", "target") if key in keys), "labels")
        inputs = next((key for key in keys if key != labels), "images")
        raise TrainError(
            f"{name} yields a {type(batch).__name__} with {', '.join(keys[:8])}; {_ENTRIES}: give a loader "
            f'that yields (batch["{inputs}"], batch["{labels}"])'
        )
    if not isinstance(batch, tuple | list) or len(batch) < 2:
        shape = f" of shape {list(batch.shape)}" if isinstance(batch, Tensor) else ""
        length = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
        raise TrainError(f"{name} yields {_kind(batch)}{shape}{length}; {_ENTRIES}")
    for number, entry in enumerate(batch):
        if not isinstance(entry, Tensor):
            raise TrainError(
                f"{name} yields batches whose entry {number} is {_kind(entry)}; {_ENTRIES}, all tensors"
            )
    return batch


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
