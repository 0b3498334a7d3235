"""The training loop: one student, an optional frozen teacher, any method or loss."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.distill.loss_method import LossMethod
from fastkd.distill.method import Method
from fastkd.distill.sharing import check_apart
from fastkd.distill.taps import eval_mode
from fastkd.errors import NonFiniteLossError, Preempted, TrainError

from . import distributed
from .batches import Batch, Batches
from .crowding import Crowding
from .ema import make_ema
from .epoch import Epoch
from .evaluation import best_of, evaluate, try_validation, validate
from .meters import LossMeter, PassTimer
from .precision import Numerics, compiled_networks, make_scaler, place
from .preflight import (
    check_loaders,
    check_not_scripted,
    check_optimizer,
    check_others,
    check_scheduler,
    checked_options,
    formats_named,
)
from .random_state import own_generators
from .signals import Control
from .state import Training, load_state, save_state
from .step import StepOptions, train_step, weights_are_finite
from .trial import Sizes, leaves_parameters_out
from .watcher import Record, Shielded, Watcher

__all__ = ["FitResult", "Watcher", "evaluate", "fit", "fit_method"]

# (student_logits, teacher_logits or None, target) -> loss, or (loss, terms)
Loss = Callable[[Tensor, Any, Tensor], Any]
Loader = Iterable[Batch]


@dataclass(frozen=True)
class FitResult:
    """What ``fit`` returns. Accuracies are fractions of the validation set.

    ``history`` has one record per epoch: ``epoch`` (from 1), ``loss``, ``terms``, ``train_accuracy``,
    ``rows`` (images trained on, over all ranks), ``skipped`` (steps left out), ``val_accuracy``,
    ``val_top5_accuracy`` (with more than 10 classes), ``val_loss``, ``val_rows``, ``lr`` (after the epoch)
    and ``seconds`` (data, teacher, student, loss, other, validation).
    Without a validation loader it has none of ``val_…`` and ``student_accuracy``.
    With an average of the weights, ``val_accuracy`` and ``val_loss`` are the average's, and
    ``student_accuracy`` is that of the weights in training.

    ``average`` is that average, a copy of the student with the averaged weights after the last epoch and
    without gradients; None without ``ema``. ``student`` itself keeps the weights in training.
    """

    history: list[Record]
    average: nn.Module | None = None

    @property
    def last(self) -> Record:
        return self.history[-1]

    @property
    def best(self) -> Record:
        """The first epoch with the highest validation accuracy.

        Raises ``TrainError`` if no epoch was validated.
        """
        best = best_of(self.history)
        if best is None:
            raise TrainError("no epoch is the best: val_loader was None, so none was validated; use last")
        return best

    @property
    def seconds(self) -> dict[str, float]:
        """Total seconds by part."""
        return {part: sum(r["seconds"][part] for r in self.history) for part in self.last["seconds"]}


def fit(
    student: nn.Module,
    teacher: nn.Module | None,
    train_loader: Loader,
    val_loader: Loader | None = None,
    *,
    loss: Loss,
    device: torch.device | str | None = None,
    **options: Any,
) -> FitResult:
    """Train ``student`` with a loss on its logits and those of ``teacher``, if there is one.

    Args:
        student: maps a batch of images to logits ``[N, C]``; trained in place.
        teacher: likewise, or None. In eval mode and without gradients during training; its modes and
            ``requires_grad`` flags are restored afterwards.
        loss: callable ``(student_logits, teacher_logits, target)`` that returns a scalar, or a scalar and a
            dict of detached scalar terms to log. If it is a module, its parameters are trained too.
        **options: those of ``fit_method``. Its other arguments and errors apply as well.
    """
    check_apart(student, teacher)  # before freezing the teacher and what it shares
    check_not_scripted(student, teacher)
    device = torch.device(device) if device is not None else _device_of(student)
    with _frozen(teacher, device):
        method = LossMethod(student, teacher, loss)
        return fit_method(method, train_loader, val_loader, device=device, **options)


def fit_method(
    method: Method,
    train_loader: Loader,
    val_loader: Loader | None = None,
    *,
    epochs: int,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Any = None,
    scheduler_interval: str = "step",
    clip_norm: float | None = None,
    accumulate: int = 1,
    ema: float | None = None,
    nonfinite: str = "stop",
    device: torch.device | str | None = None,
    precision: str = "float32",
    teacher_precision: str | None = None,
    channels_last: bool = False,
    compile: bool | str = False,
    log_every: int | None = None,
    checkpoint_every: int | str | None = None,
    stop: Callable[[], bool] | None = None,
    watcher: Watcher | None = None,
    progress: bool = True,
    resume: dict[str, Any] | None = None,
) -> FitResult:
    """Train the student of ``method`` and the method's heads; validate the student after each epoch.

    A batch that is too small for the network in train mode, such as a last one with a single row, is left
    out; the watcher gets a note, and ``skipped`` counts it.

    In a ``torch.distributed`` process group the method runs under DDP, and each batch of the loaders is
    divided among the ranks, so that n processes compute the same as one (see ``batches.Batches``): all ranks
    must draw the same batches, as a shuffling ``DataLoader`` does with a ``generator`` of the same seed;
    others are a ``LaunchError``.

    Args:
        train_loader, val_loader: iterables of ``(images, target)``, iterated once per epoch, with ``ema``
            ``val_loader`` twice; int64 targets ``[N]``. ``set_epoch(epoch)`` of the loader or its sampler is
            called first, counting from 0.
            Without a ``val_loader`` nothing is validated, and no epoch is the best.
        optimizer: of ``method.parameters()``, including heads; by default AdamW with learning rate 1e-3.
        scheduler: stepped after each optimizer step, or each epoch with ``scheduler_interval="epoch"``.
        clip_norm: largest gradient norm over all parameters, above 0; None does not clip.
        accumulate: number of micro-batches in which each rank computes its batch, to save memory.
        ema: decay of an average of the student's weights, between 0 and 1; it is then validated instead,
            and ``FitResult.average``.
        nonfinite: what to do if the loss is not finite: ``"stop"``, or ``"skip"`` the step and count it, for
            which the host waits at every step.
        device: where to train; by default where the student's parameters are.
        precision: ``"float32"``, or ``"bfloat16"`` or ``"float16"`` to run networks and heads under autocast,
            float16 with loss scaling.
        teacher_precision: the teacher's precision, if it differs.
        channels_last: keep images and convolutions in that memory format.
        compile: ``torch.compile`` both networks while they are trained; a string names the backend.
        log_every: steps between fetching losses from the device; by default 1 on a CPU, else 20.
        checkpoint_every: steps between calls of ``watcher.checkpoint``, or a time such as ``"15min"``.
        stop: called after each step; if it returns true, training stops after ``watcher.checkpoint``.
        watcher: receives the progress.
        progress: show a progress bar and one line per epoch; ignored if there is a ``watcher``.
        resume: a state that an earlier call gave to ``watcher.epoch_done`` or ``watcher.checkpoint``; it is
            not changed.

    Raises:
        NonFiniteLossError: the loss or a weight became NaN or infinite.
        Preempted: ``stop`` returned true.
        ValueError, TypeError: an option has a wrong value or type; raised before anything is changed.
        ValueError: the optimizer or scheduler does not fit the method; raised before training.
        CheckpointError: ``resume`` is not a state of this training.
        TrainError: a loader yields no or wrong batches, or the loss does not depend on the student.
    """
    epochs, clip_norm, accumulate, ema, log_every, checkpoint_every = checked_options(
        epochs=epochs,
        clip_norm=clip_norm,
        accumulate=accumulate,
        ema=ema,
        log_every=log_every,
        checkpoint_every=checkpoint_every,
    )
    checked_options(
        nonfinite=nonfinite,
        precision=precision,
        teacher_precision=teacher_precision,
        channels_last=channels_last,
    )
    check_others(scheduler_interval, compile, stop)
    check_loaders(train_loader, val_loader, epochs, averaged=ema is not None)
    check_not_scripted(method.student, method.teacher)
    student = method.student
    device = torch.device(device) if device is not None else _device_of(student)
    numerics = Numerics(device, precision, channels_last)
    place(method, numerics, teacher_precision)
    own_optimizer = optimizer is None
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-3) if optimizer is None else optimizer
    check_optimizer(method, optimizer)
    train = Batches(train_loader, device, even=True, channels_last=channels_last)
    training = Training(
        method,
        optimizer,
        scheduler,
        scheduler_interval,
        scaler=make_scaler(device, precision, optimizer),
        average=make_ema(student, ema) if ema is not None else None,
        batches=train.length,
        generators=own_generators(train_loader),
    )
    watcher = _default_watcher(progress) if watcher is None else watcher
    if resume is not None:
        load_state(training, resume, epochs)
        if training.history and getattr(train_loader, "persistent_workers", False):
            watcher.note(_PERSISTENT)
    check_scheduler(
        scheduler,
        optimizer,
        own_optimizer=own_optimizer,
        interval=scheduler_interval,
        epochs=epochs,
        batches=train.length,
    )
    if val_loader is None:
        watcher.note("val_loader is None: no epoch is validated, and none is the best")
    else:
        try_validation(student, val_loader, numerics)

    options = StepOptions(numerics, accumulate, clip_norm, skip_nonfinite=nonfinite == "skip")
    sizes = Sizes(method, precision, accumulate, watcher.note)
    crowding = Crowding(device)
    backend = "inductor" if compile is True else compile or None
    with compiled_networks(method, backend) as notes, watcher:
        for note in notes:
            watcher.note(note)
        for number in range(len(training.history), epochs):
            train.set_epoch(number)
            method.set_epoch(number)
            watcher.epoch_started(number + 1, epochs, train.length)
            epoch = Epoch(number, device, log_every, training.position, training.generators)
            training.position = None
            control = Control(checkpoint_every, stop, epoch.meter.interval)
            _train_epoch(training, options, epoch, train, sizes, control, watcher, crowding)
            if train.left_out and not training.history:
                few = "of under two images per process" if distributed.world() > 1 else "without images"
                watcher.note(f"left out in epoch {epoch.number}: {train.left_out} batches {few}")
            if epoch.meter.rows == 0:
                raise TrainError(_nothing_came(number, epoch.meter))
            training.step_scheduler("epoch")
            epoch.watch.lap("other")
            validated: Record = {}
            if val_loader is not None:
                validated = validate(student, training.average, val_loader, numerics)
                epoch.watch.lap("validation")
            training.history.append(epoch.record(validated, optimizer.param_groups[0]["lr"]))
            watcher.epoch_done(training.history[-1], save_state(training))
    return FitResult(training.history, None if training.average is None else training.average.module)


def _train_epoch(
    training: Training,
    options: StepOptions,
    epoch: Epoch,
    train: Batches,
    sizes: Sizes,
    control: Control,
    watcher: Watcher,
    crowding: Crowding,
) -> None:
    """Train on the remaining batches of ``epoch``. Raises what ``train_step`` raises, and ``Preempted``."""
    method, meter, watch = training.method, epoch.meter, epoch.watch
    batches = epoch.batches(train)

    def check_weights() -> None:
        if not weights_are_finite(method):
            raise NonFiniteLossError.of_weights(epoch.number, meter.steps)

    def save_or_stop(save: bool, stop: bool) -> None:
        if save:
            check_weights()
            watcher.checkpoint(epoch.number, meter.steps, save_state(training, epoch.position()))
        if stop:
            # The launcher kills the other ranks once one has exited; all must have written by then.
            distributed.barrier()
            raise Preempted(f"stopped in epoch {epoch.number} after step {meter.steps}")

    method.train()
    crowding.start()
    reporting = _reporting(training, epoch, train, watcher)
    with PassTimer(method.student, method.teacher, watch) as passes, reporting:
        for batch in batches:
            watch.lap("data")
            if batch is None or not sizes.take(batch, resumed=epoch.resumed):
                meter.skip_step()
                training.step_scheduler("step")
            else:
                if distributed.world() > 1 and training.runner is method:
                    left_out = leaves_parameters_out(
                        method, batch, options.numerics.precision, options.accumulate
                    )
                    training.runner = distributed.wrap(method, leaves_parameters_out=left_out)
                with formats_named(method, batch[0], options.numerics.precision):
                    train_step(training, options, batch, meter, watch, passes)
                for note in method.take_notes():
                    watcher.note(note)
                training.step_scheduler("step")
                watch.lap("student")
                meter.waited = train.waited
                watcher.batch_done(meter)
                if (hint := crowding.hint(meter.waited)) is not None:
                    watcher.note(hint)
            save_or_stop(*control.after_step(meter.steps))
            watch.lap("other")
        meter.drain()
        check_weights()
        save_or_stop(*control.after_epoch(meter.steps))


@contextlib.contextmanager
def _frozen(model: nn.Module | None, device: torch.device) -> Iterator[None]:
    """Put ``model`` on ``device`` in eval mode without gradients; restore modes and flags afterwards."""
    if model is None:
        yield
        return
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    with eval_mode(model):
        try:
            model.to(device).requires_grad_(False)
            yield
        finally:
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)


def _default_watcher(progress: bool) -> Watcher:
    if not progress or not distributed.is_first():
        return Watcher()
    from .display.console import ConsoleProgress  # the only use of rich

    return Shielded(ConsoleProgress())


@contextlib.contextmanager
def _reporting(training: Training, epoch: Epoch, train: Batches, watcher: Watcher) -> Iterator[None]:
    """Give the watcher the batch of a loss that is not finite, read again, since losses are fetched later."""
    try:
        yield
    except NonFiniteLossError as raised:
        error = raised
        # A loss that is fetched in its own step has not changed the weights: then the batch is not the cause.
        if error.step and epoch.meter.interval == 1 and not weights_are_finite(training.method):
            error = NonFiniteLossError.of_weights(error.epoch, error.step - 1)
        known = error.step and distributed.is_first()
        watcher.not_finite(error, epoch.whole(train, error.step) if known else None)
        raise error from None


_PERSISTENT = (
    "train_loader has persistent workers, whose random states no checkpoint has: if they draw numbers, "
    "this run ends differently than without the stop; persistent_workers=False avoids it"
)


def _nothing_came(epoch: int, meter: LossMeter) -> str:
    if meter.skipped:
        return (
            f"nothing was trained on in all of epoch {epoch + 1}: {meter.skipped} steps skipped, of too few "
            "images or with a loss that is not finite"
        )
    again = "; a generator can be iterated once only: give a list or a DataLoader" if epoch else ""
    return f"the train loader yielded no batch in epoch {epoch + 1}{again}"


def _device_of(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
