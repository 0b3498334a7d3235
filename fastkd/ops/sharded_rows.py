"""Row losses of logits whose classes are spread over ranks, in plain torch: a launcher of ``ops.chunks``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd.ops.call import Call, Outputs
from fastkd.ops.shards import Shard
from fastkd.reference import centered

# Elements of the formula's tensors, of which there are about ten. Rows are divided alike on all ranks.
_BLOCK = {"cpu": 1 << 21, "cuda": 1 << 25}


def block_rows(shard: Shard, device: str) -> int:
    """Rows that the formula takes at a time."""
    return max(_BLOCK.get(device, _BLOCK["cuda"]) // max(shard.largest, 1), 1)


def row_loss(
    shard: Shard,
    center_teacher: bool,
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    call: Call,
    outputs: Outputs,
) -> None:
    """As the launchers of kernels: of one pair [N, C_local], weighted losses, terms and gradient."""
    (student,), (teacher,) = students, teachers
    step = block_rows(shard, student.device.type)
    for start in range(0, len(student), step):
        part = slice(start, start + step)
        label = None if call.target is None else call.target[part]
        weight = None if call.row_weight is None else call.row_weight[part]
        with torch.set_grad_enabled(outputs.gradient is not None):
            logits = student[part].detach()
            losses, terms = _rows(shard, center_teacher, logits, teacher[part].detach(), label, weight, call)
            if outputs.gradient is not None:
                (gradient,) = torch.autograd.grad(losses.sum(), logits)
                outputs.gradient[part] = gradient
        outputs.rows[part] = losses.detach()
        if outputs.terms is not None:
            outputs.terms[:, part] = terms.detach()


def _rows(
    shard: Shard,
    center_teacher: bool,
    student: Tensor,
    teacher: Tensor,
    label: Tensor | None,
    weight: Tensor | None,
    call: Call,
) -> tuple[Tensor, Tensor]:
    """Weighted losses [N] and terms [K, N]; ``student`` becomes the leaf of their graph."""
    student.requires_grad_(torch.is_grad_enabled())
    ours, theirs = student, teacher
    if weight is not None:  # such a row may hold anything, as in ``losses.rows.eager_rows``
        unread = weight == 0
        ours, theirs = (logits.masked_fill(unread[:, None], 0.0) for logits in (ours, theirs))
        label = None if label is None else label.masked_fill(unread, 0)
    if label is not None and not label.is_cpu:  # on a CPU ``losses.arguments.check_labels`` has raised
        ours = ours.masked_fill(((label < 0) | (label >= shard.classes))[:, None], torch.nan)
    rows: tuple[Tensor, Tensor] = shard.rows(ours), shard.rows(theirs)
    if center_teacher:
        rows = rows[0], centered(rows[1])
    losses, terms = call.spec.rows(*rows, label, *call.options)
    factor = 1.0 / call.divisor if weight is None else weight / call.divisor
    return losses * factor, terms * factor
