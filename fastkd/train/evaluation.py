"""Accuracy and loss of a network on a validation set, counting each image once for any number of ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from fastkd.distill.taps import eval_mode, logits_of
from fastkd.errors import TrainError
from fastkd.reference import at_least_float32

from . import distributed
from .batches import Batches
from .precision import Numerics, autocast
from .preflight import first_of


def evaluate(
    model: nn.Module,
    loader: Any,
    *,
    device: torch.device | str,
    precision: str = "float32",
    channels_last: bool = False,
) -> tuple[float, float]:
    """Accuracy (a fraction) and mean cross-entropy of ``model`` on ``loader``; train/eval mode is restored.

    In a process group each rank computes its share of every batch, and all return the overall result.
    """
    accuracy, loss, _ = evaluate_rows(
        model, loader, device=device, precision=precision, channels_last=channels_last
    )
    return accuracy, loss


@torch.no_grad()
def evaluate_rows(
    model: nn.Module,
    loader: Any,
    *,
    device: torch.device | str,
    precision: str = "float32",
    channels_last: bool = False,
) -> tuple[float, float, int]:
    """Like ``evaluate``, with the number of images. Raises ``TrainError`` if there are none."""
    device = torch.device(device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    total = torch.zeros((), dtype=torch.float64, device="cpu" if device.type == "mps" else device)
    rows = 0
    with eval_mode(model):
        for images, target, *_ in Batches(
            loader, device, even=False, channels_last=channels_last, name="val_loader"
        ).start():
            if len(target) == 0:  # this rank has no rows of the batch
                continue
            with autocast(device, precision):
                logits = logits_of(model, images, "network")
            correct += (logits.argmax(-1) == target).sum()
            total += F.cross_entropy(at_least_float32(logits), target, reduction="sum").to(total)
            rows += len(target)
    counts = torch.stack([correct.to(total), total, torch.full_like(total, rows)])
    correct_rows, loss, all_rows = distributed.sum_over_ranks(counts).tolist()
    if all_rows == 0:
        raise TrainError("the validation loader yielded no batch")
    return correct_rows / all_rows, loss / all_rows, int(all_rows)


def try_validation(student: nn.Module, loader: Any, numerics: Numerics) -> None:
    """Validate on the loader's first batch before training, if the loader can be read twice.

    Raises ``TrainError``.
    """
    batch = first_of(loader)
    if batch is None:
        return
    try:
        evaluate_rows(student, [batch], **vars(numerics))
    except TrainError:
        raise
    except Exception as error:
        images, target = batch[:2]
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
    accuracy, loss, rows = evaluate_rows(student, loader, **vars(numerics))
    record: dict[str, Any] = {}
    if average is not None:
        record["student_accuracy"] = accuracy
        distributed.share_buffers(average.module)
        accuracy, loss, _ = evaluate_rows(average.module, loader, **vars(numerics))
    return {**record, "val_accuracy": accuracy, "val_loss": loss, "val_rows": rows}
