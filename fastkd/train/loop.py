"""The training loop: one student, an optional frozen teacher, any method or loss."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.distill.logits import LossMethod
from fastkd.distill.method import TOTAL, Method, Terms, total_of

from .errors import TrainError
from .meters import LossMeter, PassTimer, Stopwatch
from .random_state import get_random_state, set_random_state

# (student_logits, teacher_logits or None, target) -> loss, or (loss, terms)
Loss = Callable[[Tensor, Any, Tensor], Any]
Batches = Iterable[tuple[Tensor, ...]]  # images, target and, where a cache gives them, teacher's logits
Record = dict[str, Any]


@dataclass(frozen=True)
class FitResult:
    """What ``fit`` returns. Accuracies are fractions of the validation set.

    ``history`` holds one record an epoch: ``epoch`` (from 1), ``loss``, ``terms``, ``train_accuracy``,
    ``val_accuracy``, ``val_loss``, ``lr`` (after the epoch) and ``seconds`` (data, teacher, student, loss,
    other, validation).
    """

    history: list[Record]

    @property
    def last(self) -> Record:
        return self.history[-1]

    @property
    def best(self) -> Record:
        """The first epoch of the highest validation accuracy."""
        return max(self.history, key=lambda record: record["val_accuracy"])

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds over all epochs, by part."""
        return {part: sum(r["seconds"][part] for r in self.history) for part in self.last["seconds"]}


class Watcher:
    """What ``fit`` tells while it runs; subclass to show or to store. Every method may be left out."""

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *exception: object) -> None: ...

    def epoch_started(self, epoch: int, epochs: int, batches: int | None) -> None: ...

    def batch_done(self, meter: LossMeter) -> None: ...

    def epoch_done(self, record: Record, state: Callable[[], dict[str, Any]]) -> None:
        """``state()`` is what ``fit(resume=…)`` takes to go on after this epoch."""


def fit(
    student: nn.Module,
    teacher: nn.Module | None,
    train_loader: Batches,
    val_loader: Batches,
    *,
    loss: Loss,
    device: torch.device | str | None = None,
    **options: Any,
) -> FitResult:
    """Train ``student`` on ``train_loader`` with a loss of its logits and, when there is one, ``teacher``'s.

    Args:
        student: maps a batch of images to logits ``[N, C]``; trained in place.
        teacher: likewise, or None. Frozen, in eval mode and without gradient while training; its modes and
            ``requires_grad`` flags are as before afterwards.
        loss: callable ``(student_logits, teacher_logits, target)`` that returns a scalar, or a scalar and a
            dict of detached scalar terms to log. If it is a module, its parameters are trained too.
        **options: those of ``fit_method``, whose other arguments and errors these are.
    """
    device = torch.device(device) if device is not None else _device_of(student)
    with frozen(teacher, device):
        method = LossMethod(student, teacher, loss)
        return fit_method(method, train_loader, val_loader, device=device, **options)


def fit_method(
    method: Method,
    train_loader: Batches,
    val_loader: Batches,
    *,
    epochs: int,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Any = None,
    scheduler_interval: str = "step",
    clip_norm: float | None = None,
    device: torch.device | str | None = None,
    precision: str = "float32",
    watcher: Watcher | None = None,
    progress: bool = True,
    resume: dict[str, Any] | None = None,
) -> FitResult:
    """Train the student of ``method``, and what the method trains beside it; validate the plain student.

    Args:
        train_loader, val_loader: any iterables of ``(images, target)``, iterated anew each epoch, targets
            int64 ``[N]``; in training also probabilities ``[N, C]``, where the method's loss is defined for
            them, and a third entry, the teacher's logits, where they are known. A ``set_epoch(epoch)`` of
            the loader or of its sampler is called first, from 0.
        optimizer: over ``method.parameters()``, heads among them; default AdamW, learning rate 1e-3.
        scheduler: stepped after each optimizer step, or each epoch with ``scheduler_interval="epoch"``.
        clip_norm: largest norm of the gradient over all parameters.
        device: where to train; default, where the student's parameters are.
        precision: ``"float32"``, or ``"bfloat16"`` to run networks and heads under autocast.
        watcher: told of every batch and epoch.
        progress: show a progress bar and a line an epoch; ignored when there is a ``watcher``.
        resume: a state that an earlier call handed to ``watcher.epoch_done``.

    Raises:
        NonFiniteLossError: the loss became NaN or infinite.
        TrainError: a loader yields nothing, or the loss does not depend on the student.
    """
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    if scheduler_interval not in ("step", "epoch"):
        raise ValueError(f"scheduler_interval must be 'step' or 'epoch', got {scheduler_interval!r}")
    student = method.student
    device = torch.device(device) if device is not None else _device_of(student)
    method.to(device)
    optimizer = optimizer or torch.optim.AdamW(method.parameters(), lr=1e-3)
    if watcher is None:
        from .console import ConsoleProgress  # rich is wanted only here

        watcher = ConsoleProgress() if progress else Watcher()

    history: list[Record] = []
    if resume is not None:
        student.load_state_dict(resume["student"])
        method.load_parts_state(resume["method"])
        optimizer.load_state_dict(resume["optimizer"])
        if scheduler is not None:
            scheduler.load_state_dict(resume["scheduler"])
        history = list(resume["history"])
        set_random_state(resume["random"])

    def state() -> dict[str, Any]:
        return {
            "student": student.state_dict(),
            "method": method.parts_state(),
            "optimizer": optimizer.state_dict(),
            "scheduler": None if scheduler is None else scheduler.state_dict(),
            "history": history,
            "random": get_random_state(),
        }

    with watcher:
        for epoch in range(len(history), epochs):
            set_epoch(train_loader, epoch)
            method.set_epoch(epoch)
            watcher.epoch_started(epoch + 1, epochs, _length(train_loader))
            watch = Stopwatch(device)
            meter = LossMeter(device, epoch + 1)
            method.train()
            with PassTimer(student, method.teacher, watch) as passes:
                for batch in train_loader:
                    batch = tuple(part.to(device, non_blocking=True) for part in batch)
                    watch.lap("data")

                    with _autocast(device, precision):
                        terms = method(batch)
                    watch.lap("loss")
                    meter.add(_total(terms), _logged(terms), passes.logits, batch[1])
                    watch.lap("other")

                    optimizer.zero_grad(set_to_none=True)
                    method.backward(terms)
                    method.finish_gradients()
                    if clip_norm is not None:
                        nn.utils.clip_grad_norm_(method.parameters(), clip_norm)
                    optimizer.step()
                    if scheduler is not None and scheduler_interval == "step":
                        scheduler.step()
                    watch.lap("student")
                    watcher.batch_done(meter)
                    watch.lap("other")

            meter.drain()
            if meter.rows == 0:
                again = (
                    "; a generator can be iterated once only: give a list or a DataLoader" if epoch else ""
                )
                raise TrainError(f"the train loader yielded no batch in epoch {epoch + 1}{again}")
            if scheduler is not None and scheduler_interval == "epoch":
                scheduler.step()
            watch.lap("other")
            val_accuracy, val_loss = evaluate(student, val_loader, device=device, precision=precision)
            watch.lap("validation")
            history.append(
                {
                    "epoch": epoch + 1,
                    "loss": meter.loss,
                    "terms": meter.terms,
                    "train_accuracy": meter.accuracy,
                    "val_accuracy": val_accuracy,
                    "val_loss": val_loss,
                    "lr": optimizer.param_groups[0]["lr"],
                    "seconds": watch.seconds(),
                }
            )
            watcher.epoch_done(history[-1], state)
    return FitResult(history)


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: Batches, *, device: torch.device | str, precision: str = "float32"
) -> tuple[float, float]:
    """Accuracy (a fraction) and mean cross-entropy of ``model`` over ``loader``; train/eval mode is kept."""
    device = torch.device(device)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    correct = torch.zeros((), dtype=torch.int64, device=device)
    total = torch.zeros((), dtype=torch.float64, device="cpu" if device.type == "mps" else device)
    rows = 0
    try:
        for images, target in loader:
            target = target.to(device, non_blocking=True)
            with _autocast(device, precision):
                logits = model(images.to(device, non_blocking=True))
            correct += (logits.argmax(-1) == target).sum()
            total += nn.functional.cross_entropy(logits.float(), target, reduction="sum").to(total)
            rows += target.numel()
    finally:
        for module, training in modes.items():
            module.training = training
    if rows == 0:
        raise TrainError("the validation loader yielded no batch")
    return correct.item() / rows, total.item() / rows


@contextlib.contextmanager
def frozen(model: nn.Module | None, device: torch.device) -> Iterator[None]:
    """``model`` in eval mode, without gradients, on ``device``; modes and flags are restored afterwards."""
    if model is None:
        yield
        return
    modes = {module: module.training for module in model.modules()}
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.to(device).eval().requires_grad_(False)
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def set_epoch(loader: Any, epoch: int) -> None:
    """Tell a loader, or its sampler, which epoch comes: the convention of DistributedSampler."""
    for owner in (loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)):
        tell = getattr(owner, "set_epoch", None)
        if callable(tell):
            tell(epoch)


def _total(terms: Terms) -> Tensor:
    try:
        total = total_of(terms)
    except ValueError as error:
        raise TrainError(str(error)) from None
    if not total.requires_grad:
        raise TrainError("the loss does not depend on student_logits: there is nothing to train")
    return total.detach()


def _logged(terms: Terms) -> Terms:
    return {name: value.detach() for name, value in terms.items() if name != TOTAL}


def _autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    if precision == "float32":
        return contextlib.nullcontext()
    if precision == "bfloat16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    raise ValueError(f"precision must be 'float32' or 'bfloat16', got {precision!r}")


def _device_of(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except TypeError:
        return None
