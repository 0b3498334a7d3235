"""A training's state put back, if it is one of this training.

torch loads what fits: another optimizer's moments lie idle, another schedule's length is taken over in
silence. So what differs is named first.
"""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Number
from typing import Any

import torch
from torch import Tensor

from fastkd.distill.method import Method
from fastkd.errors import CheckpointError
from fastkd.messages import one_line

from .state_dicts import fill

_NEW_RUN = "start a new run for it, without --resume"


def restore(
    state: Mapping[str, Any],
    *,
    method: Method,
    optimizer: torch.optim.Optimizer,
    epochs: int,
    batches: int | None,
    parts: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Load ``state`` into what is trained; returns the history.

    ``parts``: scheduler, scaler and ema by name, None where there is none. ``batches``: of an epoch, where
    that is known.

    Raises ``CheckpointError`` that says what does not fit; then at most weights have changed.
    """
    try:
        _check_position(state, epochs, batches)
        for name, part in parts.items():
            if (part is None) != (state.get(name) is None):
                has = "has none" if state.get(name) is None else "has one"
                raise _unfit(f"{_PARTS[name]}: the state {has}, this training {_has(part)}")
        _check_optimizer(optimizer, state["optimizer"])
        if parts["scheduler"] is not None:
            _check_schedule(parts["scheduler"].state_dict(), state["scheduler"])
        fill(method.student, state["student"], "the state's student", _NEW_RUN)
        method.load_parts_state(state["method"])
        _check_moments(optimizer, state["optimizer"])
        optimizer.load_state_dict(state["optimizer"])
        for name, part in parts.items():
            if part is not None:
                part.load_state_dict(state[name])
        return list(state["history"])
    except CheckpointError:
        raise
    except Exception as error:  # whatever a state that is none of ours leads to
        raise _unfit(f"{type(error).__name__}: {one_line(error)[:300]}") from None


_PARTS = {
    "scheduler": "learning-rate schedule",
    "scaler": "loss scale (precision float16)",
    "ema": "averaged weights (ema)",
}


def _has(part: object) -> str:
    return "has none" if part is None else "has one"


def _unfit(reason: str) -> CheckpointError:
    return CheckpointError(f"the state does not fit this training: {reason}; {_NEW_RUN}")


def _check_position(state: Mapping[str, Any], epochs: int, batches: int | None) -> None:
    history, position = state["history"], state.get("position")
    for record in history:
        if not isinstance(record["val_accuracy"], Number):
            raise _unfit(f"its history has a record with val_accuracy {record['val_accuracy']!r}")
    if len(history) + bool(position) > epochs:
        begun = f", epoch {len(history) + 1} is begun" if position else ""
        raise _unfit(f"it has {len(history)} epochs{begun}, but epochs = {epochs}")
    before = state.get("batches")
    if before is not None and batches is not None and before != batches:
        raise _unfit(f"batches of an epoch: {before} → {batches}, of another batch size or other data")
    if position:
        steps = position["meter"]["steps"]
        if not isinstance(steps, int) or steps < 0 or (batches is not None and steps > batches):
            raise _unfit(f"it stopped after step {steps!r} of an epoch of {batches} steps")
        {part: float(value) for part, value in position["seconds"].items()}


def _check_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    own = optimizer.state_dict()
    groups, theirs = own["param_groups"], saved["param_groups"]
    # Newer versions of an optimizer add options; another optimizer lacks some as well.
    mine, others = set(groups[0]), set(theirs[0])
    if mine - others and others - mine:
        raise _unfit(
            f"optimizer: the state is of one with {', '.join(sorted(others - mine))}, "
            f"this one is {type(optimizer).__name__} with {', '.join(sorted(mine - others))}"
        )
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in theirs]:
        counts = [sum(len(group["params"]) for group in part) for part in (theirs, groups)]
        raise _unfit(f"optimizer: it trained {counts[0]} parameters, this one trains {counts[1]}")


def _check_moments(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    theirs = saved["param_groups"]
    shapes = [parameter.shape for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in theirs for number in group["params"]]
    for number, shape in zip(numbers, shapes, strict=True):
        for name, value in saved["state"].get(number, {}).items():
            if isinstance(value, Tensor) and value.dim() and value.shape != shape:
                raise _unfit(
                    f"optimizer: {name} of parameter {number} has shape {list(value.shape)}, "
                    f"expected {list(shape)}"
                )


# What torch's schedules are made with; the rest of their states changes as they run.
_MADE_WITH = (
    "total_steps", "T_max", "T_0", "T_mult", "milestones", "gamma", "step_size", "eta_min", "total_iters",
    "start_factor", "end_factor", "power", "base_lrs", "_schedule_phases",
)  # fmt: skip


def _check_schedule(own: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    if own.keys() - saved.keys() and saved.keys() - own.keys():
        raise _unfit("learning-rate schedule: the state is of another kind of schedule")
    for name in _MADE_WITH:
        if name in own and name in saved and own[name] != saved[name]:
            raise _unfit(f"learning-rate schedule: {name.strip('_')} {saved[name]} → {own[name]}")
    for mine, other in zip(own.get("_schedulers", ()), saved.get("_schedulers", ()), strict=True):
        _check_schedule(mine, other)
