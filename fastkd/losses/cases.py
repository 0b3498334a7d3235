"""The cases of ops/spec.py as calls of the public functions, for whatever runs all of them."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastkd import losses
from fastkd.ops.spec import Case


def takes_target(case: Case) -> bool:
    """Whether the case's function takes a target: for its labels, or only to ignore rows."""
    return "target" in inspect.signature(getattr(losses, case.function)).parameters


def call_of(case: Case, *, ignores_rows: bool = False) -> Callable[..., Tensor]:
    """``loss(student_logits, teacher_logits, target, **more)``; terms beside the loss are dropped.

    The target is passed on to a loss that needs labels, and with ``ignores_rows`` to one that takes it to
    ignore rows.
    """
    function = getattr(losses, case.function)
    passes_target = case.labelled or (ignores_rows and takes_target(case))

    def loss(student_logits: Any, teacher_logits: Any, target: Tensor | None, **more: Any) -> Tensor:
        if passes_target:
            more["target"] = target
        result = function(student_logits, teacher_logits, **case.arguments, **more)
        value: Tensor = result[0] if isinstance(result, tuple) else result
        return value

    return loss
