"""Lines about LinearLogits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

import fastkd
from fastkd import BackendUnavailable, LinearLogits
from tests.bad_inputs import FUSED, Gives, Line, Refused

from .common import auto, group, same_as
from .unusual import WithoutStorage, as_dtensor

LINES: list[Line] = []

_generator = torch.Generator().manual_seed(0)
HIDDEN, WEIGHT, BIAS = (torch.randn(*size, generator=_generator) for size in ((4, 3), (6, 3), (6,)))
TEACHER = LinearLogits(torch.randn(4, 5, generator=_generator), torch.randn(6, 5, generator=_generator))
PADDED = LinearLogits(HIDDEN, WEIGHT, num_classes=5), replace(TEACHER, num_classes=5)
CHUNKLESS = replace(TEACHER, chunk_rows=0)


def kd(hidden: Any = HIDDEN, weight: Any = WEIGHT, bias: Any = None, **options: Any) -> torch.Tensor:
    return fastkd.kd_loss(LinearLogits(hidden, weight, bias, **options), TEACHER)


def step(form: Callable[[LinearLogits], Any] = lambda logits: logits, **options: Any) -> list[torch.Tensor]:
    """The loss and the gradients of a layer of which the loss sees ``form``."""
    leaves = [tensor.clone().requires_grad_() for tensor in (HIDDEN, WEIGHT, BIAS)]
    value = fastkd.kd_loss(form(LinearLogits(*leaves, chunk_rows=3)), TEACHER, **options)
    value.backward()
    return [value.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def dense(form: LinearLogits) -> torch.Tensor:
    return form.dense()


def float64() -> torch.Tensor:
    teacher = TEACHER.of([tensor.double() for tensor in TEACHER.tensors.values()])
    return fastkd.kd_loss(LinearLogits(HIDDEN.double(), WEIGHT.double()), teacher)


def under_autocast(call: Callable[[], torch.Tensor]) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return call()


def _freed(tensor: torch.Tensor) -> torch.Tensor:
    freed = tensor.clone()
    freed.untyped_storage().resize_(0)
    return freed


class _Lora(nn.Linear):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden) + hidden.mean()


add = group("LinearLogits", LINES)
add("a layer", step, same_as(lambda: step(dense)))
for number in (0.0, -2.0):
    add(
        f"scale: {number}",
        lambda number=number: kd(scale=number),
        same_as(lambda number=number: fastkd.kd_loss(number * (HIDDEN @ WEIGHT.t()), TEACHER.dense())),
    )
for words, call, pattern in (
    ("hidden: None", lambda: kd(None), r"^student_logits\.hidden is a NoneType"),
    ("hidden: a list", lambda: kd(HIDDEN.tolist()), r"^student_logits\.hidden is a list"),
    ("weight: the layer itself", lambda: kd(weight=nn.Linear(3, 6)), r"^student_logits\.weight is a Linear"),
    ("weight: None", lambda: kd(weight=None), r"^student_logits\.weight is a NoneType"),
    ("bias: False", lambda: kd(bias=False), r"^student_logits\.bias is a bool"),
    ("hidden of int64", lambda: kd(HIDDEN.long()), r"^student_logits\.hidden has dtype torch.int64"),
    ("bfloat16 beside float32", lambda: kd(HIDDEN.bfloat16()), "expected one dtype, or torch.autocast"),
    ("bias of another dtype", lambda: kd(bias=BIAS.half()), "expected one dtype, or torch.autocast"),
    ("weight: sparse", lambda: kd(weight=WEIGHT.to_sparse()), r"^student_logits\.weight.*to_dense"),
    (
        "weight: a wrapper without storage",
        lambda: kd(weight=WithoutStorage.of(WEIGHT)),
        r"\.weight is a Without",
    ),
    ("weight: DTensor", lambda: kd(weight=as_dtensor(WEIGHT)), r"\.weight is a DTensor.*inside the forward"),
    ("num_classes: a float", lambda: kd(num_classes=5.0), r"^student_logits\.num_classes is 5.0"),
    ("chunk_rows: True", lambda: kd(chunk_rows=True), r"^student_logits\.chunk_rows is True"),
    ("scale: a tensor", lambda: kd(scale=torch.ones(())), r"^student_logits\.scale is a tensor"),
    ("scale: None", lambda: kd(scale=None), r"^student_logits\.scale is None"),
    ("softcap: a string", lambda: kd(softcap="30"), r"^student_logits\.softcap is '30'"),
    (
        "beside a list",
        lambda: fastkd.kd_loss(LinearLogits(HIDDEN, WEIGHT), [TEACHER]),
        "^teacher_logits is a list",
    ),
    (
        "as target",
        lambda: fastkd.dkd_loss(LinearLogits(HIDDEN, WEIGHT), TEACHER, TEACHER),
        "^target is a LinearLogits",
    ),
    (
        "as weight of the rows",
        lambda: fastkd.kd_loss(LinearLogits(HIDDEN, WEIGHT), TEACHER, weight=TEACHER),
        "^weight is a LinearLogits",
    ),
):
    add(words, call, Refused(TypeError, pattern))
for words, call, pattern in (
    ("hidden: no dimension", lambda: kd(HIDDEN[0, 0]), r"\.hidden has shape \[\]; expected \[\.\.\., H\]"),
    (
        "hidden: no width",
        lambda: kd(HIDDEN[:, :0], WEIGHT[:, :0]),
        r"\.hidden has shape \[4, 0\]",
    ),
    ("a hidden width that does not fit", lambda: kd(HIDDEN[:, :2]), r"\.weight has shape.*expected \[C, 2\]"),
    (
        "weight: the other way round",
        lambda: kd(weight=WEIGHT.t()),
        r"\[3, 6\]; expected \[C, 3\]",
    ),
    ("weight: three dimensions", lambda: kd(weight=WEIGHT[None]), r"\.weight has shape \[1, 6, 3\]"),
    ("weight: one class", lambda: kd(weight=WEIGHT[:1]), r"\.weight has shape \[1, 3\]; expected at least 2"),
    ("bias of other classes", lambda: kd(bias=BIAS[:5]), r"\.bias has shape \[5\]; expected \[6\]"),
    ("more classes than rows of weight", lambda: kd(num_classes=7), r"\.num_classes is 7; expected 2 to 6"),
    ("num_classes: 1", lambda: kd(num_classes=1), r"\.num_classes is 1"),
    ("num_classes of one model only", lambda: kd(num_classes=5), "5 classes and teacher_logits 6"),
    ("a chunk of no rows", lambda: kd(chunk_rows=0), r"\.chunk_rows is 0; expected 1 or more"),
    ("scale: NaN", lambda: kd(scale=float("nan")), r"^student_logits\.scale is nan"),
    ("scale: infinite", lambda: kd(scale=float("-inf")), r"^student_logits\.scale is -inf"),
    ("softcap: NaN", lambda: kd(softcap=float("nan")), r"^student_logits\.softcap is nan"),
    ("softcap: infinite", lambda: kd(softcap=float("inf")), r"^student_logits\.softcap is inf"),
    (
        "softcap: negative",
        lambda: kd(softcap=-30.0),
        r"^student_logits\.softcap is -30.0; expected.* above 0",
    ),
    ("softcap: 0", lambda: kd(softcap=0.0), r"^student_logits\.softcap is 0.0; expected a number above 0"),
    (
        "a label of the padding",
        lambda: fastkd.dkd_loss(*PADDED, torch.tensor([0, 1, 5, 4])),
        r"^target has the label 5; expected 0 to 4",
    ),
    (
        "teacher: a chunk of no rows",
        lambda: fastkd.kd_loss(TEACHER, CHUNKLESS),
        r"^teacher_logits\.chunk_rows is 0",
    ),
    ("weight on another device", lambda: kd(weight=WEIGHT.to("meta")), r"\.weight is on meta"),
    ("other rows", lambda: kd(HIDDEN[:3]), r"\[3, 6\] and teacher_logits \[4, 6\]"),
    (
        "teacher's weight requires grad",
        lambda: fastkd.kd_loss(TEACHER, LinearLogits(HIDDEN, WEIGHT.clone().requires_grad_())),
        "^teacher_logits requires grad",
    ),
):
    add(words, call, Refused(ValueError, pattern))
add(
    "reduction none with a gradient",
    lambda: step(reduction="none"),
    Refused(ValueError, "^reduction='none' has no gradient.*weight="),
    FUSED,
)
add(
    "reduction none without one",
    lambda: fastkd.kd_loss(LinearLogits(HIDDEN, WEIGHT), TEACHER, reduction="none"),
    same_as(lambda: fastkd.kd_loss(LinearLogits(HIDDEN, WEIGHT).dense(), TEACHER.dense(), reduction="none")),
)
add(
    "freed storage",
    lambda: kd(weight=_freed(WEIGHT)),
    Refused(ValueError, r"^student_logits\.weight has shape.*its storage is empty"),
)
add(
    "float64, no backend named",
    lambda: auto(float64),
    same_as(float64),
    ("eager",),
)
add("float64 with a fused backend named", float64, Refused(BackendUnavailable, "float64"), FUSED)
add(
    "float64 and float32 under autocast",
    lambda: under_autocast(lambda: kd(HIDDEN.double())),
    Refused(TypeError, "expected one dtype"),
)
add(
    "bfloat16 and float32 under autocast",
    lambda: under_autocast(lambda: kd(HIDDEN.bfloat16())),
    Gives("a float32 loss", holds=lambda value: value.dtype == torch.float32 and bool(value.isfinite())),
)
add(
    "one row, hidden [H]",
    lambda: fastkd.kd_loss(LinearLogits(HIDDEN[0], WEIGHT), LinearLogits(TEACHER.hidden[0], TEACHER.weight)),
    same_as(lambda: fastkd.kd_loss((HIDDEN @ WEIGHT.t())[0], TEACHER.dense()[0])),
)
add(
    "a negated view",
    lambda: kd(torch._neg_view(HIDDEN), torch._neg_view(WEIGHT)),
    same_as(lambda: kd(-HIDDEN, -WEIGHT)),
)
add(
    "LinearDistillLoss of a layer with a forward of its own",
    lambda: fastkd.LinearDistillLoss(_Lora(3, 6), fastkd.KDLoss()),
    Refused(TypeError, "^head is a _Lora, which has a forward of its own"),
    ("eager",),
)
