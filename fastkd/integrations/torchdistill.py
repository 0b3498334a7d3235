"""fastkd's losses for torchdistill's YAML; needs ``torchdistill``.

Importing this module registers them; in a config that is one line::

    dependencies:
      - name: 'fastkd.integrations.torchdistill'

Then ``key: 'fastkd.KDLoss'`` stands where ``key: 'KDLoss'`` stood, and likewise ``fastkd.LogitStdKDLoss``:
same arguments, same results. ``fastkd.LogitsLoss`` gives any other loss of fastkd. By import path the same
classes are ``!import_call {key: 'fastkd.integrations.torchdistill.KDLoss', init: {kwargs: {...}}}``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

import fastkd
from fastkd import losses

try:
    from torchdistill.losses.registry import register_mid_level_loss
except ImportError as error:
    raise ImportError(
        "fastkd.integrations.torchdistill needs torchdistill: pip install torchdistill"
    ) from error

IODict = dict[str, dict[str, Any]]


class _OnLogits(nn.Module):
    """Finds student and teacher logits in torchdistill's input-output dictionaries."""

    def __init__(
        self,
        student_module_path: str,
        student_module_io: str,
        teacher_module_path: str,
        teacher_module_io: str,
    ) -> None:
        super().__init__()
        self.student_module_path = student_module_path
        self.student_module_io = student_module_io
        self.teacher_module_path = teacher_module_path
        self.teacher_module_io = teacher_module_io

    def logits(self, student_io_dict: IODict, teacher_io_dict: IODict) -> tuple[Tensor, Tensor]:
        student = student_io_dict[self.student_module_path][self.student_module_io]
        teacher = teacher_io_dict[self.teacher_module_path][self.teacher_module_io]
        return student, teacher.detach()


@register_mid_level_loss(key="fastkd.KDLoss")
class KDLoss(_OnLogits):
    """torchdistill's ``KDLoss``: alpha CE + beta T^2 KL, beta = 1 - alpha by default, in one pass.

    As there, ``alpha`` None or 0, or a call without targets, gives KL alone, without beta and **without
    T^2**. Further keyword arguments are those of ``torch.nn.CrossEntropyLoss``, of which ``ignore_index`` and
    ``label_smoothing`` are taken. ``reduction`` is "batchmean" or "sum"; rows labelled ``ignore_index`` are
    left out of both terms, where torchdistill leaves them out of CE alone.
    """

    standardize = False

    def __init__(
        self,
        student_module_path: str,
        student_module_io: str,
        teacher_module_path: str,
        teacher_module_io: str,
        temperature: float,
        alpha: float | None = None,
        beta: float | None = None,
        reduction: str = "batchmean",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(student_module_path, student_module_io, teacher_module_path, teacher_module_io)
        if reduction not in ("batchmean", "sum"):
            raise ValueError(f"reduction is {reduction!r}; expected 'batchmean' or 'sum'")
        if alpha is None and beta is None:
            raise ValueError("alpha and beta are both None; expected a number for one of them")
        self.temperature = float(temperature)
        self.alpha = alpha
        self.beta = 1 - (alpha or 0) if beta is None else beta
        self.soft = losses.KDLoss(
            temperature=self.temperature, standardize=self.standardize, reduction=reduction
        )
        self.both = losses.DistillLoss(
            ce_weight=self.alpha or 0.0,
            kd_weight=self.beta,
            temperature=self.temperature,
            label_smoothing=label_smoothing,
            standardize=self.standardize,
            ignore_index=ignore_index,
            reduction=reduction,
        )

    def forward(
        self,
        student_io_dict: IODict,
        teacher_io_dict: IODict,
        targets: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        student, teacher = self.logits(student_io_dict, teacher_io_dict)
        if not self.alpha or targets is None:
            return self.soft(student, teacher) / self.temperature**2
        loss, _ = self.both(student, teacher, targets)
        return loss


@register_mid_level_loss(key="fastkd.LogitStdKDLoss")
class LogitStdKDLoss(KDLoss):
    """torchdistill's ``LogitStdKDLoss``: ``KDLoss`` of standardised logits, CE of the raw ones."""

    standardize = True

    def __init__(self, *args: Any, eps: float = 1e-7, **kwargs: Any) -> None:
        if eps != 1e-7:
            raise ValueError(f"eps is {eps!r}; fastkd standardises with 1e-7")
        super().__init__(*args, **kwargs)


@register_mid_level_loss(key="fastkd.LogitsLoss")
class LogitsLoss(_OnLogits):
    """Any loss of fastkd by the name of its module, such as ``loss: 'DKDLoss'``, with that module's options.

    A loss that takes labels gets torchdistill's targets. ``DistillLoss``'s terms are dropped.
    """

    def __init__(
        self,
        loss: str,
        student_module_path: str,
        student_module_io: str,
        teacher_module_path: str,
        teacher_module_io: str,
        **options: Any,
    ) -> None:
        super().__init__(student_module_path, student_module_io, teacher_module_path, teacher_module_io)
        if loss not in losses.__all__:
            raise ValueError(f"loss is {loss!r}; expected one of {', '.join(losses.__all__)}")
        self.loss = getattr(fastkd, loss)(**options)
        self.uses_labels = loss in ("DKDLoss", "DCKDLoss", "NKDLoss", "DistillLoss")

    def forward(
        self,
        student_io_dict: IODict,
        teacher_io_dict: IODict,
        targets: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        logits = self.logits(student_io_dict, teacher_io_dict)
        value = self.loss(*logits, targets) if self.uses_labels else self.loss(*logits)
        return value[0] if isinstance(value, tuple) else value
