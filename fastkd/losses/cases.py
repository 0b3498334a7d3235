"""The cases of ops/spec.py as calls of the public functions, for whatever runs all of them."""

import inspect
from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor

from fastkd import losses
from fastkd.ops.spec import Case


def use_of_target(case: Case) -> Literal["label", "rows"] | None:
    """Whether the case's function takes a target for its labels, or only to ignore rows, or not at all."""
    target = inspect.signature(getattr(losses, case.function)).parameters.get("target")
    if target is None:
        return None
    return "label" if target.default is target.empty else "rows"


def call_of(case: Case, *, ignores_rows: bool = False) -> Callable[..., Tensor]:
    """``loss(student_logits, teacher_logits, target, **more)``; terms beside the loss are dropped.

    The target is passed on to a loss that needs labels, and with ``ignores_rows`` to one that takes it to
    ignore rows.
    """
    function = getattr(losses, case.function)
    use = use_of_target(case)
    takes_target = use == "label" or (use == "rows" and ignores_rows)

    def loss(student_logits: Any, teacher_logits: Any, target: Tensor | None, **more: Any) -> Tensor:
        if takes_target:
            more["target"] = target
        result = function(student_logits, teacher_logits, **case.arguments, **more)
        value: Tensor = result[0] if isinstance(result, tuple) else result
        return value

    return loss
