"""The offset of a teacher's logits, which losses on single logits see and softmax does not."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd.losses.forms import LinearLogits

# Enough for a line of text: all rows of many classes, dense and in float64, need memory for N x C numbers.
_ROWS = 16
# Share of the squared logits that the row mean may have before a loss that sees it gets a warning.
_VISIBLE = 0.1


@torch.no_grad()
def describe_offset(teacher_logits: Tensor | LinearLogits, centered: bool) -> str:
    """One line on the row mean of ``[N, C]`` logits, and on what a loss makes of it. Waits for the device.

    It is taken from the first 16 rows.
    """
    if isinstance(teacher_logits, LinearLogits):
        hidden, *layer = teacher_logits.tensors.values()
        logits = teacher_logits.of([hidden[:_ROWS], *layer]).dense()
    else:
        logits = teacher_logits[:_ROWS]
    logits = logits.cpu().double()  # not every device has float64
    offset = logits.mean().item()
    spread = logits.std(-1).mean().item()
    share = (logits.mean(-1).square().mean() / logits.square().mean()).item()
    said = (
        f"teacher's logits in the first batch: row mean {offset:+.2f}, standard deviation within a row "
        f"{spread:.2f}"
    )
    if centered:
        return f"{said}; center_teacher=true takes the mean out"
    if share > _VISIBLE:
        return (
            f"{said}; center_teacher=false: {share:.0%} of the squared logits that the loss pulls towards is "
            "this mean, which says nothing about the classes; center_teacher=true takes it out"
        )
    return f"{said}; center_teacher=false"
