"""A loss of the user's as a method."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.losses import DistillLoss
from fastkd.losses.module import LossModule

from .method import Method, Seen
from .terms import TOTAL, TermError, Terms


class LossMethod(Method, abstract=True):
    """A loss of (student_logits, teacher_logits, target) that returns a scalar, or it and terms to log."""

    uses_teacher = False

    def __init__(self, student: nn.Module, teacher: nn.Module | None, loss: Callable[..., Any]) -> None:
        _check_loss(loss)
        super().__init__(student, teacher)
        self.callable = loss
        self.takes_forms = isinstance(loss, LossModule)

    def needs_teacher(self) -> bool:
        return True

    def terms(self, seen: Seen) -> Terms:
        teacher_logits = seen.teacher_logits
        if teacher_logits is None:
            teacher_logits = _without_teacher(self.callable, seen.student_logits)
        result = self.callable(seen.student_logits, teacher_logits, seen.target)
        value, terms = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
        if isinstance(value, tuple) or not isinstance(terms, Mapping):
            raise TermError(
                f"the loss returned {_described(result)}; expected a scalar, or a tuple of it and a dict of "
                "terms"
            )
        # The loss last: a term of its name is a copy to log.
        return {**{name: torch.as_tensor(term).detach() for name, term in terms.items()}, TOTAL: value}


def _described(result: tuple[Any, ...]) -> str:
    return f"a tuple of {', '.join(type(one).__name__ for one in result) or 'nothing'}"


def _check_loss(loss: Any) -> None:
    """Raise ``ValueError`` for a loss that cannot be called with three arguments."""
    arguments = "(student_logits, teacher_logits, target)"
    if not callable(loss):
        raise ValueError(f"loss is {loss!r}; expected a callable {arguments}")
    call = loss.forward if isinstance(loss, nn.Module) else loss
    try:
        inspect.signature(call).bind(None, None, None)
    except TypeError as error:
        raise ValueError(
            f"loss cannot be called with {arguments}: {error}; give a function of these three, such as "
            "lambda s, t, y: loss(s, t)"
        ) from None
    except ValueError:  # implemented in C, without a signature
        pass


def _without_teacher(loss: Any, student_logits: Tensor) -> Tensor | None:
    """The teacher logits passed to ``loss`` without a teacher: None, or a placeholder for losses of fastkd.

    Raises ``ValueError`` if the loss needs a teacher.
    """
    if not isinstance(loss, LossModule):
        return None
    weights = [
        value for name, value in loss.options.items() if name.endswith("_weight") and name != "ce_weight"
    ]
    if not isinstance(loss, DistillLoss) or any(weights):
        raise ValueError(
            f"teacher is None, but {loss!r} takes its logits; give a teacher, a loader of "
            "(images, target, teacher_logits), or DistillLoss(ce_weight=1.0) for the labels alone"
        )
    return student_logits.detach()
