"""Lines about TopKLogits."""

from __future__ import annotations

from typing import Any

import torch

import fastkd
from fastkd import LinearLogits, TopKLogits
from tests.bad_inputs import Line, Refused

from .common import group, same_as

LINES: list[Line] = []

_generator = torch.Generator().manual_seed(0)
S, T = (torch.randn(4, 6, generator=_generator) for _ in range(2))
Y = torch.tensor([0, 5, 2, 1])
FORM = fastkd.top_k(T, 3, Y, temperature=4.0)
LOG_PROBS, INDICES, LOG_REST = FORM.tensors.values()


def form(
    log_probs: Any = LOG_PROBS, indices: Any = INDICES, log_rest: Any = LOG_REST, **options: Any
) -> TopKLogits:
    return TopKLogits(log_probs, indices, log_rest, **{"num_classes": 6, "temperature": 4.0, **options})


def kd(*tensors: Any, **options: Any) -> torch.Tensor:
    return fastkd.kd_loss(S, form(*tensors, **options))


def changed(tensor: torch.Tensor, value: float) -> torch.Tensor:
    """With ``value`` at [1, 1]."""
    tensor = tensor.clone()
    tensor[1, 1] = value
    return tensor


add = group("TopKLogits", LINES)
for words, call, error, pattern in (
    ("log_probs: None", lambda: kd(None), TypeError, r"^teacher_logits\.log_probs is a NoneType"),
    ("log_probs of dtype int64", lambda: kd(INDICES), TypeError, r"^teacher_logits\.log_probs has dtype"),
    (
        "indices: a list",
        lambda: kd(LOG_PROBS, INDICES.tolist()),
        TypeError,
        r"^teacher_logits\.indices is a list",
    ),
    (
        "indices of dtype float32",
        lambda: kd(LOG_PROBS, LOG_PROBS),
        TypeError,
        r"^teacher_logits\.indices has dtype",
    ),
    (
        "indices of another shape",
        lambda: kd(LOG_PROBS, INDICES[:, :2]),
        ValueError,
        r"^teacher_logits\.indices has shape \[4, 2\]",
    ),
    (
        "log_rest of another shape",
        lambda: kd(LOG_PROBS, INDICES, LOG_PROBS),
        ValueError,
        r"^teacher_logits\.log_rest has shape",
    ),
    (
        "more known than classes",
        lambda: kd(num_classes=2),
        ValueError,
        r"log_probs has shape \[4, 3\]; expected \[\.\.\., K\] with K from 1 to 2",
    ),
    ("no known class", lambda: kd(LOG_PROBS[:, :0], INDICES[:, :0]), ValueError, "with K from 1 to 6"),
    (
        "other classes than the student",
        lambda: kd(num_classes=7),
        ValueError,
        "6 classes and teacher_logits 7",
    ),
    (
        "other rows than the student",
        lambda: kd(LOG_PROBS[:3], INDICES[:3], LOG_REST[:3]),
        ValueError,
        r"\[4, 6\] and teacher_logits \[3, 6\]",
    ),
    (
        "num_classes: 6.0",
        lambda: kd(num_classes=6.0),
        TypeError,
        r"num_classes is 6\.0; expected a whole number",
    ),
    ("temperature: 0", lambda: kd(temperature=0.0), ValueError, r"^teacher_logits\.temperature is 0"),
    (
        "another temperature than the loss's",
        lambda: kd(temperature=1.0),
        ValueError,
        "at temperature 1, and the loss reads them at 4",
    ),
    (
        "rest: 'uniform'",
        lambda: kd(rest="uniform"),
        ValueError,
        r"rest is 'uniform'; expected 'one_class' or 'renormalize'",
    ),
    (
        "that requires grad",
        lambda: kd(LOG_PROBS.clone().requires_grad_()),
        ValueError,
        "^teacher_logits requires grad",
    ),
    (
        "an index out of range",
        lambda: kd(LOG_PROBS, changed(INDICES, 6)),
        ValueError,
        "row 1 .* has the index 6; expected 0 to 5",
    ),
    (
        "a negative index",
        lambda: kd(LOG_PROBS, changed(INDICES, -1)),
        ValueError,
        "row 1 .* has the index -1",
    ),
    (
        "an index twice",
        lambda: kd(LOG_PROBS, changed(INDICES, int(INDICES[1, 0]))),
        ValueError,
        "row 1 .* twice",
    ),
    (
        "a log-probability above 0",
        lambda: kd(changed(LOG_PROBS, 0.25)),
        ValueError,
        r"row 1 .* 0\.25; expected at most 0",
    ),
    (
        "probabilities that sum to 3",
        lambda: kd(torch.zeros(4, 3)),
        ValueError,
        "row 0 .* sum to 3; expected at most 1",
    ),
    (
        "a rest of another distribution",
        lambda: kd(LOG_PROBS, INDICES, LOG_REST - 1),
        ValueError,
        r"row 0 .* and exp\(log_rest\) .*; expected 1 together",
    ),
    ("a rest of more than 1", lambda: kd(LOG_PROBS, INDICES, LOG_REST + 9), ValueError, "log_rest"),
    (
        "without the label",
        lambda: fastkd.dkd_loss(S, form(), 5 - Y),
        ValueError,
        "row 0 .* lacks its label 5",
    ),
    ("as a student", lambda: fastkd.kd_loss(form(), T), TypeError, "^student_logits is a TopKLogits"),
    ("BinaryKL", lambda: fastkd.binary_kl_loss(S, form()), ValueError, "binary_kl is not defined because"),
    (
        "standardized",
        lambda: fastkd.kd_loss(S, form(), standardize=True),
        ValueError,
        "not defined with standardize",
    ),
    (
        "reverse KL of a renormalized teacher",
        lambda: fastkd.reverse_kl_loss(S, form(rest="renormalize"), temperature=4.0),
        ValueError,
        "infinite",
    ),
    ("top_k: k 0", lambda: fastkd.top_k(T, 0), ValueError, "^k is 0; expected 1 to 6"),
    ("top_k: k 7", lambda: fastkd.top_k(T, 7), ValueError, "^k is 7; expected 1 to 6, the number of classes"),
    ("top_k of TopKLogits", lambda: fastkd.top_k(form(), 2), TypeError, "^teacher_logits is a TopKLogits"),
    (
        "top_k: a target of another shape",
        lambda: fastkd.top_k(T, 2, Y[:3]),
        ValueError,
        r"^target has shape \[3\]",
    ),
):
    add(words, call, Refused(error, pattern))
add("indices in any order", lambda: kd(LOG_PROBS.flip(1), INDICES.flip(1)), same_as(kd))
add(
    "a bad index in a row of weight 0",
    lambda: fastkd.kd_loss(
        S, form(LOG_PROBS, changed(INDICES, 99)), weight=torch.tensor([1.0, 0.0, 1.0, 1.0])
    ),
    same_as(lambda: fastkd.kd_loss(S, form(), weight=torch.tensor([1.0, 0.0, 1.0, 1.0]))),
)
add(
    "a student that is a layer",
    lambda: fastkd.kd_loss(LinearLogits(S, torch.eye(6)), form()),
    same_as(kd),
)
