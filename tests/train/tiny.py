"""A data set and networks of a few kilobytes, and every method on them: trainings that take milliseconds.

Also a loss of the labels alone, a watcher that keeps notes, an exception in place of a signal, and an object
whose unpickling runs code.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastkd.distill import Method, find_method
from fastkd.train import Watcher

CLASSES = 7
# The last batch of an epoch has 8 rows: fewer than the others, and divisible among ranks.
ROWS, BATCH = 56, 16

# A recipe of two steps an epoch, on random images.
STUDENT = [
    "fashion-mnist/student", "data.synthetic=20", "student.width=2", "train.epochs=2", "train.batch_size=10",
    "train.device=cpu", "train.threads=1",
]  # fmt: skip


class Net(nn.Module):
    """Two stages with BatchNorm, pooling, optional dropout, a linear classifier."""

    def __init__(self, width: int, dropout: float = 0.0, norm: bool = True) -> None:
        super().__init__()
        self.features = nn.Sequential(_stage(3, width, norm), _stage(width, 2 * width, norm))
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(2 * width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.dropout(self.features(images).mean((2, 3))))


def _stage(inputs: int, outputs: int, norm: bool) -> nn.Module:
    convolution = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=not norm)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs) if norm else nn.Identity(), nn.ReLU())


class Loader:
    """Random images with labels; shuffled by (seed, epoch), jittered by (seed, epoch, position)."""

    def __init__(self, rows: int = ROWS, batch_size: int = BATCH, *, shuffle: bool = True) -> None:
        generator = torch.Generator().manual_seed(3)
        self.images = torch.randn(rows, 3, 8, 8, generator=generator)
        self.target = torch.randint(0, CLASSES, (rows,), generator=generator)
        self.batch_size, self.shuffle, self.epoch = batch_size, shuffle, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.target) // self.batch_size)

    def __iter__(self) -> Any:
        generator = torch.Generator().manual_seed(100 + self.epoch)
        order = torch.arange(len(self.target))
        if self.shuffle:
            order = torch.randperm(len(order), generator=generator)
        for chosen in order.split(self.batch_size):
            images = self.images[chosen]
            if self.shuffle:
                images = images + 0.1 * torch.randn(images.shape, generator=generator)
            yield images, self.target[chosen]


def labels_alone(student: Tensor, teacher: Tensor | None, target: Tensor) -> Tensor:
    return F.cross_entropy(student, target)


def without_time(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key != "seconds"} for record in history]


class Notes(Watcher):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


class Killed(BaseException):
    """Ends a training like an uncatchable signal."""


class Evil:
    """A pickle of it would create the file ``owned``."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch owned",)


# Every method, with options that enable all its terms and without dropout in heads.
METHODS: dict[str, dict[str, Any]] = {
    "cross_entropy": {"label_smoothing": 0.1},
    "kd": {"warmup_epochs": 2},
    "lskd": {},
    "dkd": {},
    "dckd": {"hint_layer": "features.1", "hint_weight": 0.1, "distance_weight": 1.0, "angle_weight": 1.0},
    "nkd": {},
    "binary_kl": {"weight": 0.1},
    "binary_kl_norm": {"weight": 0.1},
    "fitnets": {"hint_layer": "features.0", "hint_weight": 0.1},
    "rkd": {"distance_weight": 1.0, "angle_weight": 1.0},
    "dhkd": {"hidden": 8, "alpha": 0.5, "dropout": 0.0},
    "mhkd": {"layers": ["features.0"], "head_width": 4},
}
# Variants of DHKD: alignment of shared parameters, and a stop, after which the head is unused.
VARIANTS = {
    **{name: (name, options) for name, options in METHODS.items()},
    "dhkd shared": ("dhkd", {**METHODS["dhkd"], "align": "shared"}),
    "dhkd stop": ("dhkd", {**METHODS["dhkd"], "stop_epoch": 1}),
}


def make_method(
    variant: str,
    prepare: Callable[[nn.Module], nn.Module] = lambda m: m,
    *,
    compile_teacher: str | None = None,
    **net: Any,
) -> Method:
    """``prepare`` is applied to the student before the method gets it, and to the method's own parts.

    ``compile_teacher``: the backend.
    """
    name, options = VARIANTS[variant]
    torch.manual_seed(0)
    teacher, student = Net(6), prepare(Net(4, **net))
    if compile_teacher is not None:
        teacher = torch.compile(teacher, backend=compile_teacher)
    method = find_method(name)(student, teacher, example=torch.zeros(2, 3, 8, 8), **options)
    for part, module in method.named_children():
        if part != "student":
            setattr(method, part, prepare(module))
    return method
