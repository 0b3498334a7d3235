"""Training a student or a teacher in a folder, with its records and checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from rich.console import Console

from fastkd.data.data import Data
from fastkd.distill import Method
from fastkd.files.sealed import short_digest_of
from fastkd.recipe.sections import Optimization, Train
from fastkd.train import distributed
from fastkd.train.display.console import ConsoleProgress
from fastkd.train.display.loggers import with_loggers
from fastkd.train.loop import FitResult, fit_method
from fastkd.train.optimization import build_optimizer, build_scheduler
from fastkd.train.random_state import seed_generators
from fastkd.train.signals import StopSignals
from fastkd.train.watcher import Shielded, Watcher

from .folder import RunRecorder, read_resume_state
from .lock import locked
from .teacher_cache import CachedLoader, TeacherCache
from .unreadable import UnreadableImages


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, on the first rank."""
    with locked(folder) if distributed.is_first() else contextlib.nullcontext():
        yield


def read_state(folder: Path, role: str, console: Console) -> dict[str, Any] | None:
    """The newest state in ``folder``, or None; damaged ones are reported on ``console``."""
    return read_resume_state(folder, lambda text: console.print(f"{role}: {text}", soft_wrap=True))


def fit_in_folder(
    folder: Path,
    role: str,
    method: Method,
    optimization: Optimization,
    data: Data,
    device: torch.device,
    console: Console,
    *,
    title: str,
    resume: dict[str, Any] | None,
    known_as: dict[str, Any] | None = None,
    teacher_accuracy: float | None = None,
    cache: TeacherCache | None = None,
    run: Mapping[str, Any] = MappingProxyType({}),
) -> FitResult:
    """Train with one method, from the state ``resume`` if given. ``known_as`` is added to the states written.

    ``run``: name, folder and recipe, for loggers.

    A teacher's section has no settings of precision or checkpoints: a teacher is trained in float32 and saved
    after every epoch.
    """
    train = optimization if isinstance(optimization, Train) else Train(epochs=optimization.epochs)
    train_loader: Any = data.train_loader(optimization.batch_size, optimization.seed, device)
    if cache is not None:
        train_loader = CachedLoader(train_loader, cache)
    optimizer = build_optimizer(method, optimization)
    if resume is not None:
        console.print(f"{role}: resuming after {_reached(resume)} of {optimization.epochs}")
    watcher = Watcher()
    if distributed.is_first():
        history = resume["history"] if resume else ()
        watcher = RunRecorder(
            folder,
            # Shielded separately: the console continues if a logger fails.
            with_loggers(Shielded(ConsoleProgress(role, console)), train, folder, run, history),
            facts={
                "num_classes": data.num_classes,
                "data": short_digest_of(data.fingerprint),
                "input": list(data.example()[0].shape[1:]),
                "classes": None if data.class_names is None else list(data.class_names),
                "transform": data.transform.model_dump(),
            },
            title=title,
            teacher_accuracy=teacher_accuracy,
            keep_every=train.keep_every,
            known_as=known_as or {},
            history=history,
        )
    corrupt = getattr(data, "corrupt", None)  # of images in files
    if corrupt is not None:
        watcher = UnreadableImages(watcher, corrupt, resume)
    # Every rank has the same weights, but draws different dropout masks.
    if distributed.rank():
        seed_generators(optimization.seed, distributed.rank())
    with StopSignals() as stop:
        return fit_method(
            method,
            train_loader,
            data.val_loader(device, train.val_batch_size or optimization.batch_size),
            epochs=optimization.epochs,
            optimizer=optimizer,
            scheduler=build_scheduler(optimizer, optimization, len(train_loader)),
            device=device,
            watcher=watcher,
            resume=resume,
            stop=stop,
            **{name: getattr(train, name) for name in _OF_THE_LOOP},
        )


# Settings of a recipe that are arguments of ``fit_method`` with the same names.
_OF_THE_LOOP = (
    "clip_norm", "precision", "teacher_precision", "channels_last", "compile", "accumulate", "ema",
    "nonfinite", "log_every", "checkpoint_every",
)  # fmt: skip


def _reached(state: dict[str, Any]) -> str:
    position = state.get("position")
    step = f"step {position['meter']['steps']} of epoch {len(state['history']) + 1}" if position else None
    return step or f"epoch {len(state['history'])}"
