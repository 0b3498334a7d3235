"""Accuracy and loss of a network on a validation set, counting each image once for any number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from fastkd.distill.logits import IGNORED
from fastkd.distill.taps import eval_mode, logits_of
from fastkd.errors import TrainError
from fastkd.reference import at_least_float32

from . import distributed
from .batches import Batches
from .precision import Numerics, autocast
from .preflight import first_of, other_format
from .watcher import Record

# Of few classes, five are no measure: with 10, half of all guesses are right.
TOP5_ABOVE = 10  # classes
# Entries of a record; the second is missing where top-5 is.
ACCURACIES = ("val_accuracy", "val_top5_accuracy")


@dataclass(frozen=True)
class Validated:
    """Means over the ``rows`` images with a label. ``top5`` is None with ``TOP5_ABOVE`` classes or fewer."""

    accuracy: float
    top5: float | None
    loss: float
    rows: int

    def record(self) -> dict[str, Any]:
        """The entries of an epoch's record."""
        top5 = {} if self.top5 is None else {"val_top5_accuracy": self.top5}
        return {"val_accuracy": self.accuracy, **top5, "val_loss": self.loss, "val_rows": self.rows}


class _Unlabelled(TrainError):
    """No row had a label."""


def evaluate(
    model: nn.Module,
    loader: Any,
    *,
    device: torch.device | str,
    precision: str = "float32",
    channels_last: bool = False,
) -> tuple[float, float]:
    """Accuracy (a fraction) and mean cross-entropy of ``model`` on ``loader``; train/eval mode is restored.

    Rows labelled -100 are left out.
    In a process group each rank computes its share of every batch, and all return the overall result.
    """
    result = evaluate_rows(model, loader, device=device, precision=precision, channels_last=channels_last)
    return result.accuracy, result.loss


@torch.no_grad()
def evaluate_rows(
    model: nn.Module,
    loader: Any,
    *,
    device: torch.device | str,
    precision: str = "float32",
    channels_last: bool = False,
) -> Validated:
    """Like ``evaluate``, with top-5 and the number of labelled images. Raises ``TrainError`` without one."""
    device = torch.device(device)
    correct, among_five, rows = torch.zeros(3, dtype=torch.int64, device=device)
    batches = has_top5 = 0
    total = torch.zeros((), dtype=torch.float64, device="cpu" if device.type == "mps" else device)
    with eval_mode(model):
        for batch in Batches(
            loader, device, even=False, channels_last=channels_last, name="val_loader"
        ).start():
            if batch is None:  # this rank has no rows of the batch
                continue
            images, target, *_ = batch
            with autocast(device, precision):
                logits = logits_of(model, images, "network")
            labelled = target != IGNORED
            guess = logits.argmax(-1)  # of NaN, if there is any: no guess
            certain = ~logits.gather(1, guess.unsqueeze(1)).isnan().squeeze(1)
            correct += ((guess == target) & certain).sum()
            if logits.shape[-1] > TOP5_ABOVE:
                has_top5 = 1
                before = ranks(logits, target.masked_fill(~labelled, 0))
                among_five += (labelled & (before < 5)).sum()
            total += F.cross_entropy(at_least_float32(logits), target, reduction="sum").to(total)
            rows += labelled.sum()
            batches += 1
    known = (torch.full_like(total, value) for value in (has_top5, batches))
    counts = torch.stack([*(count.to(total) for count in (correct, among_five, rows)), total, *known])
    top1, top5, all_rows, loss, has_top5, batches = distributed.sum_over_ranks(counts).tolist()
    if not batches:
        raise TrainError("the validation loader yielded no batch")
    if not all_rows:
        raise _Unlabelled(f"no image of the validation loader has a label: all are {IGNORED}")
    return Validated(top1 / all_rows, top5 / all_rows if has_top5 else None, loss / all_rows, int(all_rows))


def ranks(logits: Tensor, target: Tensor) -> Tensor:
    """The number of classes that come before the target's, for each row of ``logits`` [N, C].

    Of equal logits the lower class comes first, so that the result does not depend on how rows are divided
    among ranks, as it may with ``topk``; NaN comes before all numbers.
    """
    own = logits.gather(1, target.unsqueeze(1))
    classes = torch.arange(logits.shape[1], device=logits.device)
    before = (logits == own) & (classes < target.unsqueeze(1))
    return (~(logits <= own) | before).sum(1)


def best_of(history: Sequence[Record]) -> Record | None:
    """The first record with the highest validation accuracy; None if no epoch was validated."""
    validated = [record for record in history if "val_accuracy" in record]
    return max(validated, key=lambda record: record["val_accuracy"], default=None)


def try_validation(student: nn.Module, loader: Any, numerics: Numerics) -> None:
    """Validate on the loader's first batch before training, if the loader can be read twice.

    Raises ``TrainError``.
    """
    batch = first_of(loader)
    if batch is None:
        return
    try:
        evaluate_rows(student, [batch], **vars(numerics))
    except _Unlabelled:  # later batches may have labels
        return
    except TrainError:
        raise
    except Exception as error:
        images, target = batch[:2]
        hint = None
        if numerics.precision == "float32":
            hint = other_format("student", student, images, error)
        if target.is_floating_point():
            hint = f"target is {target.dtype} of shape {list(target.shape)}; expected int64 labels [N]"
        if hint is not None:
            raise TrainError(f"validation fails on the first batch of val_loader: {hint}") from error
        raise TrainError(
            f"validation fails on the first batch of val_loader, images {list(images.shape)} of "
            f"{images.dtype} and target {list(target.shape)} of {target.dtype}: "
            f"{type(error).__name__}: {error}"
        ) from error


def validate(
    student: nn.Module, average: AveragedModel | None, loader: Any, numerics: Numerics
) -> dict[str, Any]:
    """The validation part of an epoch's record: that of the average, if there is one."""
    distributed.share_buffers(student)
    result = evaluate_rows(student, loader, **vars(numerics))
    record: dict[str, Any] = {}
    if average is not None:
        record["student_accuracy"] = result.accuracy
        distributed.share_buffers(average.module)
        result = evaluate_rows(average.module, loader, **vars(numerics))
    return {**record, **result.record()}
