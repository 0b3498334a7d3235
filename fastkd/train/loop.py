"""The training loop: one student, an optional frozen teacher, any method or loss."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.distill.logits import LossMethod
from fastkd.distill.method import TOTAL, Method, TermError, Terms, total_of
from fastkd.distill.sharing import check_apart
from fastkd.errors import NonFiniteLossError, Preempted, TrainError

from . import distributed
from .batches import Batch, Batches, micro_batches
from .ema import make_ema
from .evaluation import evaluate, try_validation, validate
from .freezing import frozen
from .meters import LossMeter, PassTimer, Stopwatch
from .precision import autocast, compile_networks, dtype_of, make_scaler
from .preflight import check_channels_last, check_loaders, check_optimizer, check_options, check_scheduler
from .random_state import get_random_state, set_random_state
from .restore import restore
from .signals import Control
from .trial import Sizes
from .watcher import Record, Shielded, Watcher

__all__ = ["FitResult", "Watcher", "evaluate", "fit", "fit_method"]

# (student_logits, teacher_logits or None, target) -> loss, or (loss, terms)
Loss = Callable[[Tensor, Any, Tensor], Any]
Loader = Iterable[Batch]


@dataclass(frozen=True)
class FitResult:
    """What ``fit`` returns. Accuracies are fractions of the validation set.

    ``history`` holds one record an epoch: ``epoch`` (from 1), ``loss``, ``terms``, ``train_accuracy``,
    ``rows`` (images trained on, over all ranks), ``skipped`` (steps left out), ``val_accuracy``,
    ``val_loss``, ``val_rows``, ``lr`` (after the epoch) and ``seconds`` (data, teacher, student, loss, other,
    validation).
    With an average of the weights, ``val_accuracy`` and ``val_loss`` are the average's, and
    ``student_accuracy`` is that of the weights in training.
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


def fit(
    student: nn.Module,
    teacher: nn.Module | None,
    train_loader: Loader,
    val_loader: Loader,
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
    check_apart(student, teacher)  # before the teacher, and what is shared, is frozen
    device = torch.device(device) if device is not None else _device_of(student)
    with frozen(teacher, device):
        method = LossMethod(student, teacher, loss)
        return fit_method(method, train_loader, val_loader, device=device, **options)


def fit_method(
    method: Method,
    train_loader: Loader,
    val_loader: Loader,
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
    """Train the student of ``method``, and what the method trains beside it; validate the plain student.

    A batch so small that the network cannot take it in train mode, such as a last one of a single row, is
    left out; the watcher is told, and ``skipped`` counts it.

    In a ``torch.distributed`` process group the method runs under DDP, and each batch of the loaders is
    shared among the ranks, so that n processes do what one does (see ``batches.Batches``).

    Args:
        train_loader, val_loader: any iterables of ``(images, target)``, iterated anew each epoch, targets
            int64 ``[N]``. A ``set_epoch(epoch)`` of the loader or of its sampler is called first, from 0.
        optimizer: over ``method.parameters()``, heads among them; default AdamW, learning rate 1e-3.
        scheduler: stepped after each optimizer step, or each epoch with ``scheduler_interval="epoch"``.
        clip_norm: largest norm of the gradient over all parameters.
        accumulate: compute each rank's batch in so many parts, to need less memory; the step is the same.
        ema: decay of an average of the student's weights, which is then what is validated.
        nonfinite: of a loss, ``"stop"`` or ``"skip"`` the step and count it; to skip, the host waits for
            every step.
        device: where to train; default, where the student's parameters are.
        precision: ``"float32"``, or ``"bfloat16"`` or ``"float16"`` to run networks and heads under autocast,
            float16 with scaled gradients.
        teacher_precision: that of the teacher, if it is another.
        channels_last: keep images and convolutions in that memory format.
        compile: ``torch.compile`` both networks; a text names its backend.
        log_every: steps between fetching losses from the device; default 1 on a CPU, else 20.
        checkpoint_every: call ``watcher.checkpoint`` every so many steps, or every ``"15min"``.
        stop: asked after each step whether to end early, with a last ``watcher.checkpoint``.
        watcher: told of every batch and epoch.
        progress: show a progress bar and a line an epoch; ignored when there is a ``watcher``.
        resume: a state that an earlier call handed to ``watcher.epoch_done`` or ``watcher.checkpoint``.

    Raises:
        NonFiniteLossError: the loss became NaN or infinite.
        Preempted: ``stop`` said so.
        ValueError: an option, optimizer or scheduler that does not fit the method; found before training.
        CheckpointError: ``resume`` is the state of another training.
        TrainError: a loader yields nothing or something else, or the loss does not depend on the student.
    """
    check_options(epochs, scheduler_interval, accumulate, ema, nonfinite)
    student = method.student
    check_loaders(train_loader, val_loader, epochs)
    device = torch.device(device) if device is not None else _device_of(student)
    method.to(device)
    if channels_last:
        check_channels_last(method)
        method.to(memory_format=torch.channels_last)
    if teacher_precision is not None:
        method.teacher_dtype = dtype_of(teacher_precision, "teacher_precision") or torch.float32
    scaler = make_scaler(device, precision)
    own_optimizer = optimizer is None
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-3) if optimizer is None else optimizer
    check_optimizer(method, optimizer)
    average = make_ema(student, ema) if ema is not None else None
    if watcher is None:
        watcher = _default_watcher(progress)
    for note in compile_networks(method, "inductor" if compile is True else compile) if compile else ():
        watcher.note(note)

    train = Batches(train_loader, device, even=True, channels_last=channels_last)
    history: list[Record] = []
    if resume is not None:
        history = restore(
            resume,
            method=method,
            optimizer=optimizer,
            epochs=epochs,
            batches=train.length,
            parts={"scheduler": scheduler, "scaler": scaler, "ema": average},
        )
        set_random_state(_of_this_rank(resume["random"]))
    runner = distributed.wrap(method)
    buffers = list(method.buffers())
    steps = 1 if scheduler_interval == "epoch" else train.length
    check_scheduler(
        scheduler,
        optimizer,
        own_optimizer=own_optimizer,
        interval=scheduler_interval,
        total=None if steps is None else steps * epochs,
    )
    try_validation(student, val_loader, device, precision, channels_last)

    def state(**position: Any) -> Callable[[], dict[str, Any]]:
        # Here and not in the function: all ranks take part, only the first one writes.
        distributed.share_buffers(method)
        randoms = distributed.of_all_ranks(get_random_state())
        return lambda: {
            "student": student.state_dict(),
            "method": method.parts_state(),
            "optimizer": optimizer.state_dict(),
            "scheduler": None if scheduler is None else scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "ema": None if average is None else average.state_dict(),
            "history": list(history),
            "random": randoms,
            "position": position or None,
            "batches": train.length,
        }

    sizes = Sizes(method, precision, accumulate, watcher.note)
    with watcher:
        for epoch in range(len(history), epochs):
            train.set_epoch(epoch)
            method.set_epoch(epoch)
            watcher.epoch_started(epoch + 1, epochs, train.length)
            meter = LossMeter(device, epoch + 1, log_every)
            within = resume.get("position") if resume and epoch == len(resume["history"]) else None
            watch = Stopwatch(device, within["seconds"] if within else None)
            control = Control(checkpoint_every, stop, meter.interval)
            random_now = random_at_start = get_random_state()
            if within:  # a loader that draws its order from the global generator draws the same again
                random_at_start = _of_this_rank(within["random"])
                set_random_state(random_at_start)
            batches = train.start(within["meter"]["steps"] if within else 0)
            if within:
                meter.load_state(within["meter"])
                set_random_state(random_now)
            method.train()
            with PassTimer(student, method.teacher, watch) as passes, _saving(watcher, train):
                for batch in batches:
                    watch.lap("data")
                    if not sizes.take(batch, resumed=within is not None):
                        meter.skip_step()
                        if scheduler is not None and scheduler_interval == "step":
                            scheduler.step()
                        continue
                    optimizer.zero_grad(set_to_none=True)
                    kept = [buffer.clone() for buffer in buffers] if nonfinite == "skip" else []
                    parts = micro_batches(batch, accumulate)
                    for number, (part, share) in enumerate(parts, start=1):
                        # Ranks exchange gradients once a step.
                        with distributed.without_sync(runner, number < len(parts)):
                            with autocast(device, precision):
                                terms = _terms(runner, part)
                            watch.lap("loss")
                            meter.add(total_of(terms).detach(), _logged(terms), passes.logits, part[1])
                            watch.lap("other")
                            method.backward(terms, scaler=scaler, micro_batches=share)
                    if nonfinite == "skip" and not meter.step_is_finite():
                        meter.skip_step()
                        method.finish_gradients()  # what it keeps between backward passes is not for the next
                        _restore(buffers, kept)
                    else:
                        meter.end_step()
                        if scaler is not None:
                            scaler.unscale_(optimizer)
                        method.finish_gradients()
                        if clip_norm is not None:
                            nn.utils.clip_grad_norm_(method.parameters(), clip_norm)
                        if scaler is not None:
                            scaler.step(optimizer)
                            scaler.update()
                        else:
                            optimizer.step()
                        if average is not None:
                            average.update_parameters(student)
                    if scheduler is not None and scheduler_interval == "step":
                        scheduler.step()
                    watch.lap("student")
                    meter.waited = train.waited
                    watcher.batch_done(meter)
                    save, ask_to_stop = control.after_step(meter.steps)
                    if save:
                        position = {"meter": meter.state(), "seconds": watch.seconds()}
                        start = distributed.of_all_ranks(random_at_start)
                        watcher.checkpoint(epoch + 1, meter.steps, state(**position, random=start))
                    if ask_to_stop:
                        distributed.barrier()  # who ends early has the others killed, as they write
                        raise Preempted(f"stopped in epoch {epoch + 1} after step {meter.steps}")
                    watch.lap("other")
                meter.drain()

            if train.left_out and not history:
                watcher.note(
                    f"left out in each epoch: {train.left_out} batches of under two images per process"
                )
            if meter.rows == 0:
                raise TrainError(_nothing_came(epoch, meter))
            if scheduler is not None and scheduler_interval == "epoch":
                scheduler.step()
            watch.lap("other")
            validated = validate(student, average, val_loader, device, precision, channels_last)
            watch.lap("validation")
            history.append(
                {
                    "epoch": epoch + 1,
                    "loss": meter.loss,
                    "terms": meter.terms,
                    "train_accuracy": meter.accuracy,
                    "rows": meter.rows,
                    "skipped": meter.skipped,
                    **validated,
                    "lr": optimizer.param_groups[0]["lr"],
                    "seconds": watch.seconds(),
                }
            )
            watcher.epoch_done(history[-1], state())
    return FitResult(history)


def _default_watcher(progress: bool) -> Watcher:
    if not progress or not distributed.is_first():
        return Watcher()
    from .display.console import ConsoleProgress  # rich is wanted only here

    return Shielded(ConsoleProgress())


@contextlib.contextmanager
def _saving(watcher: Watcher, train: Batches) -> Iterator[None]:
    """Hands the watcher the batch of a loss that is not finite: read anew, since losses are fetched late."""
    try:
        yield
    except NonFiniteLossError as error:
        watcher.not_finite(error, train.whole(error.step - 1) if distributed.is_first() else None)
        raise


@torch.no_grad()
def _restore(buffers: list[Tensor], kept: list[Tensor]) -> None:
    # Running statistics have seen the batch that is skipped.
    for buffer, before in zip(buffers, kept, strict=True):
        buffer.copy_(before)


def _of_this_rank(states: list[Any]) -> Any:
    """Its random state; with other ranks than then there is none, and the present one stays."""
    return states[distributed.rank()] if len(states) == distributed.world() else get_random_state()


def _nothing_came(epoch: int, meter: LossMeter) -> str:
    if meter.skipped:
        return f"no loss was finite in all of epoch {epoch + 1}: {meter.skipped} steps skipped"
    again = "; a generator can be iterated once only: give a list or a DataLoader" if epoch else ""
    return f"the train loader yielded no batch in epoch {epoch + 1}{again}"


def _terms(runner: nn.Module, batch: Batch) -> Terms:
    try:
        terms: Terms = runner(batch)
    except TermError as error:
        raise TrainError(str(error)) from None
    if not total_of(terms).requires_grad:
        raise TrainError("the loss does not depend on student_logits: there is nothing to train")
    return terms


def _logged(terms: Terms) -> Terms:
    return {name: value.detach() for name, value in terms.items() if name != TOTAL}


def _device_of(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
