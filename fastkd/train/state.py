"""A training in progress, saved as a state and loaded from one.

torch loads whatever fits: it ignores another optimizer's moments and silently adopts another schedule's
length. ``load_state`` therefore compares first and names every difference.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Number
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel

from fastkd.distill.method import Method
from fastkd.errors import CheckpointError
from fastkd.messages import one_line

from . import distributed
from .random_state import get_random_state, set_random_state
from .state_dicts import fill
from .watcher import Record

_NEW_RUN = "start a new run for it, without --resume"


@dataclass
class Training:
    """Everything that a training changes.

    ``runner`` is the method, from the first step on under DDP if there are several ranks.
    """

    method: Method
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scheduler_interval: str  # "step" or "epoch"
    scaler: GradScaler | None
    average: AveragedModel | None
    batches: int | None  # per epoch, where the loader knows
    generators: list[torch.Generator]  # of the loader
    history: list[Record] = field(default_factory=list)
    position: dict[str, Any] | None = None  # within the epoch after those of the history, if resumed there

    def __post_init__(self) -> None:
        self.runner: nn.Module = self.method

    def step_scheduler(self, after: str) -> None:
        """Step the scheduler if it is stepped after each ``after``: ``"step"`` or ``"epoch"``."""
        if self.scheduler is None or self.scheduler_interval != after:
            return
        if self.scaler is None:
            self.scheduler.step()
            return
        with warnings.catch_warnings():  # the scaler may have left out the optimizer's first step
            warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler\.step\(\)` before")
            self.scheduler.step()

    def buffers_beside(self) -> dict[str, Tensor]:
        """The buffers that state dicts leave out (``persistent=False``), which training may change too."""
        found: dict[str, Tensor] = {}
        for owner, module in (("method", self.method), ("ema", self.average)):
            if module is not None:
                kept = module.state_dict()
                buffers = module.named_buffers(owner)
                found |= {k: b for k, b in buffers if k.partition(".")[2] not in kept and not is_lazy(b)}
        return found

    def parts(self) -> dict[str, Any]:
        """What a training may have or not, by the names in a state."""
        return {"scheduler": self.scheduler, "scaler": self.scaler, "ema": self.average}


def save_state(training: Training, position: dict[str, Any] | None = None) -> Callable[[], dict[str, Any]]:
    """A function that returns the state, at ``position`` within an epoch or after one.

    Every rank calls ``save_state``, in which ranks exchange buffers and random states. Only the first rank
    calls the function. It returns the tensors in training, as torch's ``state_dict`` does, not copies.
    """
    distributed.share_buffers(training.method)
    randoms = distributed.of_all_ranks(get_random_state(training.generators))
    return lambda: {
        "student": training.method.student.state_dict(),
        "method": training.method.parts_state(),
        "buffers": training.buffers_beside(),
        "optimizer": training.optimizer.state_dict(),
        **{name: None if part is None else part.state_dict() for name, part in training.parts().items()},
        "history": list(training.history),
        "random": randoms,
        "position": position,
        "batches": training.batches,
    }


def load_state(training: Training, state: Mapping[str, Any], epochs: int) -> None:
    """Load ``state`` into a training of ``epochs`` epochs, and set the random generators.

    Raises ``CheckpointError`` that says what does not fit; by then at most weights have changed.
    """
    method, optimizer, parts = training.method, training.optimizer, training.parts()
    try:
        _check_position(state, epochs, training.batches)
        for name, part in parts.items():
            if (part is None) != (state.get(name) is None):
                has, now = _has(state.get(name)), _has(part)
                raise _unfit(f"{_PARTS[name]}: the state {has}, this training {now}")
        _check_optimizer(optimizer, state["optimizer"])
        if training.scheduler is not None:
            _check_schedule(training.scheduler.state_dict(), state["scheduler"])
        fill(method.student, state["student"], "the state's student", _NEW_RUN)
        method.load_parts_state(state["method"])
        _fill_buffers(training.buffers_beside(), state.get("buffers", {}))  # older states have none
        _check_moments(optimizer, state["optimizer"])
        # The optimizer would go on in the tensors that it is given.
        optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        for name, part in parts.items():
            if part is not None:
                part.load_state_dict(state[name])
        training.history = list(state["history"])
        training.position = state.get("position") or None
    except CheckpointError:
        raise
    except Exception as error:  # a damaged or foreign state can raise anything
        raise _unfit(f"{type(error).__name__}: {one_line(error)[:300]}") from None
    set_random_state(of_this_rank(state["random"], training.generators), training.generators)


@torch.no_grad()
def _fill_buffers(buffers: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    for name, buffer in buffers.items():
        # A cache that has grown to another shape is made again by its network.
        if name in saved and saved[name].shape == buffer.shape:
            buffer.copy_(saved[name])


def of_this_rank(states: list[Any], generators: list[torch.Generator]) -> Any:
    """This rank's random state; the present one if the number of ranks has changed."""
    return states[distributed.rank()] if len(states) == distributed.world() else get_random_state(generators)


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
        # Without validation there is no val_accuracy.
        for name, value in (("lr", record["lr"]), ("val_accuracy", record.get("val_accuracy", 0.0))):
            if not isinstance(value, Number):
                raise _unfit(f"its history has a record with {name} {value!r}")
    if len(history) + bool(position) > epochs:
        begun = f", epoch {len(history) + 1} is begun" if position else ""
        raise _unfit(f"it has {len(history)} epochs{begun}, but epochs = {epochs}")
    before = state.get("batches")
    if before is not None and batches is not None and before != batches:
        raise _unfit(f"batches per epoch: {before} → {batches}, of another batch size or other data")
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
