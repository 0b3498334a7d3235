"""One training step: forward, backward and the optimizer's step on a batch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastkd.distill.terms import TOTAL, TermError, Terms, total_of
from fastkd.errors import TrainError

from . import distributed
from .batches import Batch, micro_batches
from .meters import LossMeter, PassTimer, Stopwatch
from .precision import Numerics
from .state import Training
from .trial import Snapshot


@dataclass(frozen=True)
class StepOptions:
    """How a step is computed; see ``fit_method``."""

    numerics: Numerics
    accumulate: int = 1
    clip_norm: float | None = None
    skip_nonfinite: bool = False


def train_step(
    training: Training,
    options: StepOptions,
    batch: Batch,
    meter: LossMeter,
    watch: Stopwatch,
    passes: PassTimer,
) -> None:
    """Train on ``batch``.

    With ``skip_nonfinite`` a step whose loss or gradient is not finite changes nothing. Otherwise the meter
    raises ``NonFiniteLossError`` when it fetches the loss. Raises ``TrainError`` for a loss that does not
    depend on the student.
    """
    method, optimizer, scaler = training.method, training.optimizer, training.scaler
    optimizer.zero_grad(set_to_none=True)
    before = Snapshot(method) if options.skip_nonfinite else None
    parts = micro_batches(batch, options.accumulate)
    for number, (part, share) in enumerate(parts, start=1):
        # Ranks exchange gradients once per step.
        with distributed.without_sync(training.runner, number < len(parts)):
            with options.numerics.autocast():
                terms = _terms(training.runner, part)
            watch.lap("loss")
            meter.add(total_of(terms).detach(), _logged(terms), passes.logits, part[1])
            watch.lap("other")
            method.backward(terms, scaler=scaler, micro_batches=share)
    finite = not options.skip_nonfinite or meter.step_is_finite()
    if finite and scaler is not None:
        scaler.unscale_(optimizer)
    method.finish_gradients()  # also clears what the method keeps between backward passes
    if finite and options.skip_nonfinite and scaler is None:  # a scaler leaves such steps out itself
        finite = all_finite(p.grad for p in method.parameters() if p.grad is not None)
    if before is not None and not finite:
        meter.skip_step()
        before.restore()  # the forward pass has updated the running statistics
        return
    meter.end_step()
    if options.clip_norm is not None:
        nn.utils.clip_grad_norm_(method.parameters(), options.clip_norm)
    if scaler is not None:
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.step()
    if training.average is not None:
        training.average.update_parameters(method.student)


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no number of them is NaN or infinite; makes the host wait once."""
    values = (tensor.coalesce().values() if tensor.is_sparse else tensor for tensor in tensors)
    finite = [tensor.isfinite().all() for tensor in values]
    return not finite or bool(torch.stack(finite).all())


def weights_are_finite(method: nn.Module) -> bool:
    """Of those that are trained; makes the host wait once."""
    return all_finite(p.detach() for p in method.parameters() if p.requires_grad)


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
