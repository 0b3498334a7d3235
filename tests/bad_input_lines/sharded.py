"""Lines about ShardedLogits, in a group of this process alone; tests/losses/test_sharded.py has several."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

import fastkd
from fastkd import BackendUnavailable, LinearLogits, ShardedLogits
from tests.bad_inputs import FUSED, Line, Refused

from .common import S, T, Y, auto, group, same_as

LINES: list[Line] = []


def kd(local: Any = S, teacher: Any = T, **place: Any) -> torch.Tensor:
    """In plain torch, whichever backend is being tried."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    place = {"first_class": 0, "num_classes": 6, **place}
    forms = [ShardedLogits(one, **place) for one in (local, teacher)]
    return auto(lambda: fastkd.kd_loss(*forms))


def form(local: Any = S) -> ShardedLogits:
    return ShardedLogits(local, first_class=0, num_classes=6)


add = group("ShardedLogits", LINES)
add("all classes on one rank", kd, same_as(lambda: fastkd.kd_loss(S, T)))
add(
    "without a process group",
    lambda: auto(lambda: fastkd.kd_loss(form(), form(T))),
    Refused(ValueError, "init_process_group"),
)
for words, call, pattern in (
    ("local: a list", lambda: kd([1.0]), r"^student_logits\.local is a list"),
    ("local: ShardedLogits", lambda: kd(form()), r"^student_logits\.local is a ShardedLogits"),
    ("local of int64", lambda: kd(S.long()), r"^student_logits\.local has dtype torch.int64"),
    ("first_class: a float", lambda: kd(first_class=0.0), r"^student_logits\.first_class is 0.0"),
    ("num_classes: None", lambda: kd(num_classes=None), r"^student_logits\.num_classes is None"),
    ("group: a name", lambda: kd(group="tp"), r"^student_logits\.group is 'tp'; expected a ProcessGroup"),
    ("a stored teacher", lambda: fastkd.kd_loss(form(), T), "^teacher_logits is a Tensor.*for both"),
    (
        "a teacher of K classes",
        lambda: fastkd.kd_loss(form(), fastkd.top_k(T, 3, temperature=4.0)),
        "^teacher_logits is a TopKLogits.*for both",
    ),
    ("top_k", lambda: fastkd.top_k(form(), 3), "^teacher_logits is a ShardedLogits"),
    (
        "probabilities as target",
        lambda: fastkd.distill_loss(form(), form(T), S.softmax(-1), ce_weight=1.0),
        "^target holds probabilities",
    ),
):
    add(words, call, Refused(TypeError, pattern))
for words, call, pattern in (
    ("classes that no rank has", lambda: kd(num_classes=7), "do not tile 0 to 7: rank 0 has 0 to 6"),
    ("first_class: negative", lambda: kd(first_class=-1), r"^student_logits\.first_class is -1"),
    ("local: no dimension", lambda: kd(S[0, 0]), r"^student_logits\.local has shape \[\]"),
    ("a teacher of other rows", lambda: kd(teacher=T[:3]), "expected equal shapes"),
    (
        "local.weight of another width",
        lambda: kd(LinearLogits(S, torch.ones(6, 5))),
        r"^student_logits\.local\.weight has shape \[6, 5\]; expected \[C, 6\]",
    ),
    (
        "a label out of range",
        lambda: fastkd.dkd_loss(form(), form(T), Y + 1),
        "^target has the label 6; expected 0 to 5",
    ),
):
    add(words, call, Refused(ValueError, pattern))


def on_the_backend() -> torch.Tensor:
    kd()
    return fastkd.kd_loss(form(), form(T))


add(
    "a fused backend named",
    on_the_backend,
    Refused(BackendUnavailable, "has no kernel for ShardedLogits"),
    FUSED,
)
