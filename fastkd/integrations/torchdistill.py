"""fastkd's losses for torchdistill's YAML; needs ``torchdistill``.

Importing this module registers them; in a config that is one line::

    dependencies:
      - name: 'fastkd.integrations.torchdistill'

Then ``key: 'fastkd.KDLoss'`` replaces ``key: 'KDLoss'``, and likewise ``fastkd.LogitStdKDLoss``: same
arguments, same results. ``fastkd.LogitsLoss`` is any other loss of fastkd. By import path the same classes
are ``!import_call {key: 'fastkd.integrations.torchdistill.KDLoss', init: {kwargs: {...}}}``.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

import fastkd
from fastkd import losses
from fastkd.integrations.arguments import cross_entropy_and_kd, named
from fastkd.losses import arguments

try:
    from torchdistill.losses.registry import register_mid_level_loss
except ImportError as error:
    raise ImportError(
        "fastkd.integrations.torchdistill needs torchdistill: pip install torchdistill"
    ) from error

# LinearDistillLoss owns a head, which no file can give it.
MODULES = {
    name: getattr(losses, name)
    for name in losses.__all__
    if name.endswith("Loss") and name != "LinearDistillLoss"
}
IODict = dict[str, dict[str, Any]]
NAMES = {
    "student_logits": "the student's logits", "teacher_logits": "the teacher's logits", "target": "targets",
}  # fmt: skip


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
        student = _hooked(student_io_dict, "student", self.student_module_path, self.student_module_io)
        teacher = _hooked(teacher_io_dict, "teacher", self.teacher_module_path, self.teacher_module_io)
        if student.shape != teacher.shape:
            raise ValueError(
                f"the student's logits have shape {list(student.shape)} and the teacher's "
                f"{list(teacher.shape)}; expected equal shapes"
            )
        return student, teacher


def _hooked(io_dict: IODict, whose: str, path: str, io: str) -> Tensor:
    if path not in io_dict:
        raise ValueError(f"{whose}_module_path is {path!r}; hooks are on {', '.join(map(repr, io_dict))}")
    if io not in io_dict[path]:
        raise ValueError(f"{whose}_module_io is {io!r}; of {path!r} there is {', '.join(io_dict[path])}")
    logits = io_dict[path][io]
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"the {io} of the {whose}'s module {path!r} is a {type(logits).__name__}; expected a tensor of "
            f"logits ({whose}_module_path and {whose}_module_io choose it)"
        )
    return logits


def _check_targets(targets: Tensor, logits: Tensor, classes_at: int) -> None:
    expected = [size for dim, size in enumerate(logits.shape) if dim != classes_at % logits.dim()]
    if list(targets.shape) != expected:
        raise ValueError(
            f"targets has shape {list(targets.shape)}; expected {expected}, a label for each position of the "
            f"student's logits {list(logits.shape)}, whose classes are in dimension {classes_at}"
        )


@register_mid_level_loss(key="fastkd.KDLoss")
class KDLoss(_OnLogits):
    """torchdistill's ``KDLoss``: alpha CE + beta T^2 KL, beta = 1 - alpha by default, in one pass.

    Logits [N, C] or [N, C, d1, ...] with targets [N] or [N, d1, ...], as in torchdistill: the classes are in
    dimension 1, "batchmean" divides KL by N and CE by the targets that are not ``ignore_index``; KL includes
    all. With ``alpha`` None or 0, or in a call without targets, the loss is only KL, without beta and
    **without T^2**, as there. Of the further arguments of ``torch.nn.CrossEntropyLoss``, ``ignore_index`` and
    ``label_smoothing`` are supported. ``reduction`` is "batchmean" or "sum".

    Targets on a GPU are not read back to see whether one is ignored: CE and KL take one pass each there. If
    no target is left, CE is 0, whereas torch's is NaN.
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
        arguments.check_temperature(temperature)
        for name, value in (("alpha", alpha), ("beta", beta)):
            if value is not None:
                arguments.check_number(name, value)
        arguments.check_fraction("label_smoothing", label_smoothing)
        arguments.check_ignore_index(ignore_index)
        self.temperature = float(temperature)
        self.alpha = alpha
        self.beta = 1 - (alpha or 0) if beta is None else beta
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing

    def check_shape(self, logits: Tensor) -> None:
        if logits.dim() < 2:
            raise ValueError(
                f"the student's logits have shape {list(logits.shape)}; expected [N, C] or [N, C, d1, ...]"
            )

    def forward(
        self, student_io_dict: IODict, teacher_io_dict: IODict, targets: Tensor | None = None
    ) -> Tensor:
        student, teacher = self.logits(student_io_dict, teacher_io_dict)
        self.check_shape(student)
        hard = bool(self.alpha) and targets is not None
        if hard and isinstance(targets, Tensor) and not targets.is_floating_point():
            _check_targets(targets, student, 1)
        samples = max(student.shape[0], 1) if self.reduction == "batchmean" else 1
        if student.dim() > 2:
            student, teacher = student.movedim(1, -1), teacher.movedim(1, -1)
        soft = {"temperature": self.temperature, "standardize": self.standardize}
        if not hard:
            total = named(NAMES, fastkd.kd_loss, student, teacher, reduction="sum", **soft)
            return total / (samples * self.temperature**2)
        loss, _ = named(
            NAMES,
            cross_entropy_and_kd,
            student,
            teacher,
            targets,
            ce_weight=self.alpha,
            kd_weight=self.beta,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            **soft,
        )
        return loss


@register_mid_level_loss(key="fastkd.LogitStdKDLoss")
class LogitStdKDLoss(KDLoss):
    """torchdistill's ``LogitStdKDLoss``: ``KDLoss`` of standardised logits [N, C], CE of the raw ones.

    Of logits [N, C, d1, ...] torchdistill standardises the last dimension but takes the softmax over
    dimension 1, which is not logit standardisation: refused.
    """

    standardize = True

    def __init__(
        self,
        student_module_path: str,
        student_module_io: str,
        teacher_module_path: str,
        teacher_module_io: str,
        temperature: float,
        eps: float = 1e-7,
        *arguments: Any,
        **options: Any,
    ) -> None:
        """Those of ``KDLoss``, with ``eps`` after the temperature as in torchdistill."""
        if eps != 1e-7:
            raise ValueError(f"eps is {eps!r}; fastkd standardises with 1e-7")
        super().__init__(
            student_module_path,
            student_module_io,
            teacher_module_path,
            teacher_module_io,
            temperature,
            *arguments,
            **options,
        )

    def check_shape(self, logits: Tensor) -> None:
        if logits.dim() != 2:
            raise ValueError(f"the student's logits have shape {list(logits.shape)}; expected [N, C]")


@register_mid_level_loss(key="fastkd.LogitsLoss")
class LogitsLoss(_OnLogits):
    """Any loss of fastkd by the name of its module, such as ``loss: 'DKDLoss'``, with that module's options.

    Logits [N, C]; of other shapes ``class_dim`` says where the classes are: 1 in torchdistill's convention
    [N, C, d1, ...], -1 in [batch, length, C]. A loss with labels gets torchdistill's targets. The terms of
    ``DistillLoss`` are dropped.
    """

    def __init__(
        self,
        loss: str,
        student_module_path: str,
        student_module_io: str,
        teacher_module_path: str,
        teacher_module_io: str,
        class_dim: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(student_module_path, student_module_io, teacher_module_path, teacher_module_io)
        if loss not in MODULES:
            raise ValueError(f"loss is {loss!r}; expected one of {', '.join(MODULES)}")
        if class_dim not in (None, 1, -1):
            raise ValueError(f"class_dim is {class_dim!r}; expected 1, -1 or nothing")
        self.class_dim = class_dim
        self.loss = MODULES[loss](**options)
        target = inspect.signature(self.loss.forward).parameters.get("target")
        self.uses_labels = target is not None and target.default is target.empty

    def forward(
        self, student_io_dict: IODict, teacher_io_dict: IODict, targets: Tensor | None = None
    ) -> Tensor:
        student, teacher = self.logits(student_io_dict, teacher_io_dict)
        if student.dim() != 2 and (self.class_dim is None or student.dim() < 2):
            raise ValueError(
                f"the student's logits have shape {list(student.shape)}; expected [N, C], or more "
                "dimensions and class_dim: 1 for [N, C, d1, ...], -1 for [batch, length, C]"
            )
        class_dim = self.class_dim or 1
        if self.uses_labels and isinstance(targets, Tensor):
            _check_targets(targets, student, class_dim)
        if student.dim() > 2 and class_dim == 1:
            student, teacher = student.movedim(1, -1), teacher.movedim(1, -1)
        labels = [targets] if self.uses_labels else []
        result = named(NAMES, self.loss, student, teacher, *labels)
        value: Tensor = result[0] if isinstance(result, tuple) else result
        return value
