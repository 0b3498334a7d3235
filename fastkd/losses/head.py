"""A module that owns the head: logits are computed inside its forward, chunk by chunk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import check_linear
from .forms import LinearLogits
from .module import LossModule


class LinearDistillLoss(nn.Module):
    """A loss of a head's output that is never stored: ``loss(LinearLogits(hidden, head.weight, …), …)``.

    Wrap the model that contains it with DDP, FSDP2 or activation checkpointing: the head is used inside its
    forward, where a sharded weight is whole, and its gradient is reduced like that of any layer. A weight
    tied to an embedding stays tied. Example::

        self.loss = LinearDistillLoss(self.head, fastkd.DistillLoss(ce_weight=0.5, kd_weight=0.5))
        loss, terms = self.loss(self.body(tokens), teacher_logits, target)

    Args:
        head: the student's last layer, [H] to [C].
        loss: a loss module of fastkd, such as ``KDLoss()``.
        teacher_head: the teacher's last layer, which gets ``requires_grad_(False)``; it is a submodule, so
            wrappers gather it too. With it, the forward's second argument is the teacher's hidden state, else
            its logits in any form.
        teacher_form: ``scale``, ``softcap`` and ``num_classes`` of the teacher's ``LinearLogits``; by default
            the student's ``num_classes``, and neither of the others.
        form: ``scale``, ``softcap``, ``num_classes`` and ``chunk_rows`` of the student's.

    Raises ``ValueError`` for wrong values and for heads of different classes, and ``TypeError`` for an
    unknown option and for a layer whose output is not that of its weight and bias: one with a forward of its
    own (LoRA, a cosine) or with hooks (``torch.nn.utils.weight_norm``; its successor in
    ``torch.nn.utils.parametrizations`` is fine).
    Each call asks again, but not compiled ones.
    """

    def __init__(
        self,
        head: nn.Linear,
        loss: LossModule,
        *,
        teacher_head: nn.Linear | None = None,
        teacher_form: Mapping[str, Any] | None = None,
        **form: Any,
    ) -> None:
        super().__init__()
        for name, layer in (("head", head), ("teacher_head", teacher_head)):
            if not isinstance(layer, nn.Linear) and (layer is not None or name == "head"):
                raise TypeError(f"{name} is a {type(layer).__name__}; expected an nn.Linear")
            if layer is not None:
                _check_plain(name, layer)
        if not isinstance(loss, LossModule):
            raise TypeError(f"loss is a {type(loss).__name__}; expected a loss module such as KDLoss()")
        self.head, self.loss, self.teacher_head, self.form = head, loss, teacher_head, form
        if teacher_head is not None:
            of_student = set(head.parameters())
            for parameter in teacher_head.parameters():
                # A layer of both models still learns as the student's.
                parameter.requires_grad_(parameter.requires_grad and parameter in of_student)
        elif teacher_form is not None:
            raise ValueError(f"teacher_form is {teacher_form!r}, but there is no teacher_head")
        shared = {"num_classes": form["num_classes"]} if "num_classes" in form else {}
        self.teacher_form = shared | dict(teacher_form or {})
        # Unknown options and wrong values are errors here rather than at the first step.
        classes = _checked_classes("LinearDistillLoss", head, form)
        if teacher_head is not None:
            name = "LinearDistillLoss.teacher_form"
            others = _checked_classes(name, teacher_head, self.teacher_form)
            if others != classes:
                raise ValueError(
                    f"head has {classes} classes and teacher_head {others}; both models must score the same "
                    "classes (num_classes leaves out the padding of a head)"
                )

    def forward(
        self, hidden: Tensor, teacher: Any, target: Tensor | None = None, *, weight: Tensor | None = None
    ) -> Any:
        """What ``loss`` returns for hidden states [..., H], the teacher, and the target if it takes one."""
        if not torch.compiler.is_compiling():
            for name, layer in (("head", self.head), ("teacher_head", self.teacher_head)):
                if layer is not None:  # it may have got a forward or hooks since
                    _check_plain(name, layer)
        student = LinearLogits(hidden, self.head.weight, self.head.bias, **self.form)
        if self.teacher_head is not None:
            layer = self.teacher_head
            teacher = LinearLogits(teacher, layer.weight, layer.bias, **self.teacher_form).detach()
        labels = () if target is None else (target,)
        return self.loss(student, teacher, *labels, weight=weight)


def _checked_classes(name: str, head: nn.Linear, form: Mapping[str, Any]) -> int:
    example = LinearLogits(head.weight.new_empty(1, head.in_features), head.weight, head.bias, **form)
    check_linear(name, example)
    return int(example.shape[-1])


def _check_plain(name: str, layer: nn.Linear) -> None:
    if type(layer).forward is not nn.Linear.forward or "forward" in vars(layer):
        what = f"{name} is a {type(layer).__name__}, which has a forward of its own"
    elif any(
        (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    ):
        what = f"{name} has hooks, which would not run"
    else:
        return
    raise TypeError(f"{what}, but only its weight and bias would be used; expected a plain nn.Linear")
