"""Measurements of the training loop that do not stall a GPU: loss terms, accuracy, time."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastkd.distill.logits import IGNORED
from fastkd.distill.taps import named_logits
from fastkd.errors import NonFiniteLossError

from . import distributed

PARTS = ("data", "teacher", "student", "loss", "other", "validation")


class LossMeter:
    """Running means of loss, terms and accuracy over an epoch and over all ranks, weighted by rows.

    Accuracy is that of the rows with a label, as in validation.

    Values stay on the device and are fetched in one copy every ``interval`` steps: by default every step on a
    CPU and every 20 steps on a GPU, where fetching synchronises. A loss that is not finite is found when it
    is fetched, at the same step on every rank.
    """

    def __init__(self, device: torch.device, epoch: int = 1, interval: int | None = None) -> None:
        self.interval = interval or (1 if device.type == "cpu" else 20)
        self.epoch = epoch
        self.steps = 0
        self.skipped = 0  # steps left out because the loss was not finite
        self.rows = 0  # fetched so far; further ones are pending
        self.waited = 0.0  # seconds that the host waited for data
        self._began = (time.perf_counter(), 0, 0)  # with the steps and rows at that time
        self._names: tuple[str, ...] = ()
        self._step: Tensor | None = None
        self._pending: list[tuple[int, Tensor]] = []  # with the number of the step, from 1
        self._sums: list[float] = []
        self._correct = 0.0
        self._labelled = 0.0

    def add(self, loss: Tensor, terms: dict[str, Tensor], logits: Tensor, target: Tensor) -> None:
        """Add a micro-batch: scalar loss and terms, logits [N, C], target [N] (or [N, C] if mixed)."""
        self._names = tuple(terms)
        labels = target.argmax(-1) if target.dim() == 2 else target
        correct = (logits.argmax(-1) == labels).sum()
        labelled = (labels != IGNORED).sum()
        # Not in the logits' dtype: bfloat16 counts only to 256.
        means = torch.stack([value.detach().float() for value in (loss, *terms.values())])
        rows = torch.full_like(correct, len(target))
        values = torch.cat([means * len(target), torch.stack([correct, labelled, rows]).float()])
        self._step = values if self._step is None else self._step + values

    def end_step(self) -> None:
        """End the step to which micro-batches were added; may fetch. Raises ``NonFiniteLossError``."""
        assert self._step is not None
        self.steps += 1
        self._pending.append((self.steps, self._step))
        self._step = None
        if self.steps % self.interval == 0:
            self.drain()

    def step_is_finite(self) -> bool:
        """Whether every loss of the step is finite on every rank; makes the host wait."""
        assert self._step is not None
        return bool(distributed.sum_over_ranks(self._step).isfinite().all())

    def skip_step(self) -> None:
        self._step = None
        self.steps += 1
        self.skipped += 1
        if self.steps % self.interval == 0:
            self.drain()

    def drain(self) -> None:
        """Fetch the pending values. Raises ``NonFiniteLossError`` that names step and terms."""
        if not self._pending:
            return
        steps, values = zip(*self._pending, strict=True)
        fetched = distributed.sum_over_ranks(torch.stack(values).cpu().double()).tolist()
        self._pending.clear()
        for step, (*losses, correct, labelled, rows) in zip(steps, fetched, strict=True):
            if not all(math.isfinite(value) for value in losses):
                terms = dict(zip(("loss", *self._names), (value / rows for value in losses), strict=True))
                raise NonFiniteLossError.at(self.epoch, step, terms)
            self._sums = self._sums or [0.0] * len(losses)
            self._sums = [total + value for total, value in zip(self._sums, losses, strict=True)]
            self._correct += correct
            self._labelled += labelled
            self.rows += int(rows)

    def state(self) -> dict[str, Any]:
        """The state as plain values, for ``load_state``; fetches the pending values."""
        self.drain()
        names = ("steps", "skipped", "rows", "_names", "_sums", "_correct", "_labelled")
        return {name: getattr(self, name) for name in names}

    def load_state(self, state: dict[str, Any]) -> None:
        self._labelled = state["rows"]  # of a state that does not count them
        for name, value in state.items():
            setattr(self, name, value)
        self._names, self._sums = tuple(self._names), list(self._sums)
        self._began = (time.perf_counter(), self.steps, self.rows)

    def since_start(self) -> tuple[float, int, int]:
        """Seconds, steps and images since the epoch began or was resumed."""
        when, steps, rows = self._began
        return time.perf_counter() - when, self.steps - steps, self.rows - rows

    @property
    def loss(self) -> float:
        return self._sums[0] / self.rows if self.rows else math.nan

    @property
    def terms(self) -> dict[str, float]:
        if not self.rows:
            return {}
        return {name: total / self.rows for name, total in zip(self._names, self._sums[1:], strict=True)}

    @property
    def accuracy(self) -> float:
        return self._correct / self._labelled if self._labelled else math.nan


class Stopwatch:
    """Seconds by part. ``lap(part)`` adds the time since the last lap to ``part``.

    On a CUDA device laps are events on the current stream that are read later, so that the host never waits.
    Time in which the GPU waits for data counts as ``data``; preparing data while the GPU is busy does not
    count. On other devices it is the host's clock.
    """

    _PENDING = 2048

    def __init__(self, device: torch.device, seconds: dict[str, float] | None = None) -> None:
        """``seconds``: measured by the run before it was stopped."""
        self._cuda = device.type == "cuda"
        self._seconds: defaultdict[str, float] = defaultdict(float, seconds or {})
        self._events: list[tuple[str, torch.cuda.Event]] = []
        self._last_time = time.perf_counter()
        if self._cuda:
            self._events.append(("", self._event()))

    def lap(self, part: str) -> None:
        if self._cuda:
            self._events.append((part, self._event()))
            if len(self._events) >= self._PENDING:
                self._read(self._PENDING // 2)
            return
        now = time.perf_counter()
        self._seconds[part] += now - self._last_time
        self._last_time = now

    def seconds(self) -> dict[str, float]:
        if self._cuda:
            self._read(len(self._events))
        return {part: self._seconds[part] for part in PARTS}

    def _read(self, count: int) -> None:
        self._events[count - 1][1].synchronize()
        for (_, before), (part, after) in zip(self._events[: count - 1], self._events[1:count], strict=True):
            self._seconds[part] += before.elapsed_time(after) / 1e3
        del self._events[: count - 1]

    @staticmethod
    def _event() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class PassTimer:
    """Takes laps where teacher and student run inside a method, by hooks on the two modules.

    The time between is the loss's: forward of loss and heads, and their backward down to the student's
    logits. Keeps the student's logits of the last pass.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module | None, watch: Stopwatch) -> None:
        self._student, self._teacher, self._watch = student, teacher, watch
        self._hooks: list[RemovableHandle] = []
        self._backward_seen = False
        self.logits = torch.empty(0)

    def __enter__(self) -> PassTimer:
        modules = {"student": self._student} | (
            {"teacher": self._teacher} if self._teacher is not None else {}
        )
        for part, module in modules.items():
            self._hooks.append(module.register_forward_pre_hook(lambda *_: self._watch.lap("loss")))
            self._hooks.append(module.register_forward_hook(lambda *_, part=part: self._watch.lap(part)))
        self._hooks.append(self._student.register_forward_hook(self._after_student))
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _after_student(self, module: nn.Module, inputs: object, output: object) -> None:
        logits = named_logits(output)
        if not isinstance(logits, Tensor):  # the method reports what it got
            return
        self.logits = logits.detach()
        self._backward_seen = False
        if logits.requires_grad:
            logits.register_hook(self._at_the_logits)

    def _at_the_logits(self, gradient: Tensor) -> None:
        # The second backward pass of gradient alignment comes after the student's first one.
        self._watch.lap("student" if self._backward_seen else "loss")
        self._backward_seen = True
