"""Lines about numbers and switches, row weights, labels, and logits that are not numbers."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

import fastkd
from tests.bad_inputs import Gives, Line, Refused

from .common import Result, S, T, W, Y, dkd, group, same_as, step

LINES: list[Line] = []
NAN, INF = float("nan"), float("inf")
FINITE = Gives("finite loss and gradient", holds=lambda r: all(bool(x.isfinite().all()) for x in r))
NOTHING = Gives("loss 0, gradient 0", holds=lambda r: r[0] == 0 and not r[1].any() and r[1].shape == (4, 6))


def spoils(*rows: int) -> Gives:
    """Of losses per row: those rows alone are not finite."""
    expected = [row not in rows for row in range(4)]
    return Gives("not finite in that row alone", holds=lambda losses: losses.isfinite().tolist() == expected)


add = group("Numbers and switches", LINES)
for value in (0.0, -1, NAN, INF, 1e39, 1e-50, 1e-7, 1e7):
    add(
        f"temperature={value!r}",
        lambda v=value: fastkd.kd_loss(S, T, temperature=v),
        Refused(ValueError, f"^temperature is {value!r}".replace("+", r"\+")),
    )
    add(
        f"KDLoss(temperature={value!r})",
        lambda v=value: fastkd.KDLoss(temperature=v),
        Refused(ValueError, f"^temperature is {value!r}".replace("+", r"\+")),
        ("eager",),
    )
for wrong in ("4", None, torch.tensor(4.0), 4j):
    add(
        f"temperature={wrong!r}",
        lambda v=wrong: fastkd.kd_loss(S, T, temperature=v),
        Refused(TypeError, "^temperature is"),
    )
add(
    "temperature=np.float32(2)",
    lambda: step(temperature=np.float32(2)),
    same_as(lambda: step(temperature=2.0)),
)
add(
    "temperature=np.int8(20), whose square is -112",
    lambda: step(temperature=np.int8(20)),
    same_as(lambda: step(temperature=20.0)),
)
for value in (1e6, 1e-6):
    add(f"temperature={value!r}", lambda v=value: step(temperature=v), FINITE)
for name, value in (("alpha", NAN), ("alpha", INF), ("beta", 1e39), ("alpha", -1e300)):
    add(
        f"{name}={value!r}",
        lambda n=name, v=value: fastkd.dkd_loss(S, T, Y, **{n: v}),
        Refused(ValueError, f"^{name} is"),
    )
add("alpha='1'", lambda: fastkd.dkd_loss(S, T, Y, alpha="1"), Refused(TypeError, "^alpha is '1'"))
add("alpha=0, beta=0", lambda: dkd(alpha=0.0, beta=0.0), NOTHING)
add("alpha=-1", lambda: dkd(alpha=-1.0), same_as(lambda: dkd(alpha=-1.0)))
add("distill_loss, all weights 0", lambda: step(fastkd.distill_loss, S, T, Y, ce_weight=0.0), NOTHING)
add(
    "kd_weight=inf",
    lambda: fastkd.distill_loss(S, T, Y, ce_weight=1, kd_weight=INF),
    Refused(ValueError, "^kd_weight is inf"),
)
add(
    "ce_weight='1'",
    lambda: fastkd.distill_loss(S, T, Y, ce_weight="1"),
    Refused(TypeError, "^ce_weight is '1'"),
)
add(
    "label_smoothing=2",
    lambda: fastkd.distill_loss(S, T, Y, ce_weight=1, label_smoothing=2),
    Refused(ValueError, "^label_smoothing is 2"),
)
add("gamma=0", lambda: fastkd.ttm_loss(S, T, gamma=0.0), Refused(ValueError, r"^gamma is 0\.0"))
add("jsd_loss, beta=1.5", lambda: fastkd.jsd_loss(S, T, beta=1.5), Refused(ValueError, r"^beta is 1\.5"))
for wrong in ("a", 1.5, True, None):
    add(
        f"ignore_index={wrong!r}",
        lambda v=wrong: fastkd.dkd_loss(S, T, Y, ignore_index=v),
        Refused(TypeError, "^ignore_index is"),
    )
    add(
        f"DKDLoss(ignore_index={wrong!r})",
        lambda v=wrong: fastkd.DKDLoss(ignore_index=v),
        Refused(TypeError, "^ignore_index is"),
        ("eager",),
    )
for wrong in ("yes", 1, None):
    add(
        f"standardize={wrong!r}",
        lambda v=wrong: fastkd.kd_loss(S, T, standardize=v),
        Refused(TypeError, "^standardize is"),
    )
    add(
        f"fix_acquired={wrong!r}",
        lambda v=wrong: fastkd.dckd_loss(S, T, Y, fix_acquired=v),
        Refused(TypeError, "^fix_acquired is"),
    )
    add(
        f"center_teacher={wrong!r}",
        lambda v=wrong: fastkd.binary_kl_norm_loss(S, T, center_teacher=v),
        Refused(TypeError, "^center_teacher is"),
    )
    add(
        f"weighted={wrong!r}",
        lambda v=wrong: fastkd.ttm_loss(S, T, gamma=1.0, weighted=v),
        Refused(TypeError, "^weighted is"),
    )
    add(
        f"KDLoss(standardize={wrong!r})",
        lambda v=wrong: fastkd.KDLoss(standardize=v),
        Refused(TypeError, "^standardize is"),
        ("eager",),
    )
add(
    "reduction='mean'",
    lambda: fastkd.kd_loss(S, T, reduction="mean"),
    Refused(ValueError, "weaker by the number of classes"),
)
for wrong in ("avg", None):
    add(
        f"reduction={wrong!r}",
        lambda v=wrong: fastkd.kd_loss(S, T, reduction=v),
        Refused(ValueError, "^reduction is"),
    )
add("temprature=2", lambda: fastkd.kd_loss(S, T, temprature=2.0), Refused(TypeError, "temprature"))

# Weights and labels -----------------------------------------------------------------------------------------
add = group("Row weights", LINES)
for words, wrong, kind in (
    ("a list", W.tolist(), TypeError), ("a string", "1", TypeError), ("a number", 2.0, TypeError),
    ("int64", Y, TypeError), ("bool", Y > 2, TypeError), ("of another length", W[:3], ValueError),
    ("[N, 1]", W[:, None], ValueError), ("requires grad", W.clone().requires_grad_(), ValueError),
    ("on another device", W.to("meta"), ValueError),
):  # fmt: skip
    add(words, lambda w=wrong: fastkd.kd_loss(S, T, weight=w), Refused(kind, "^weight"))
HOLED = torch.where(torch.arange(4)[:, None] == 1, torch.full_like(S, NAN), S)
ZERO_AT_1 = torch.tensor([1.0, 0.0, 2.0, 0.5])
add("NaN in one row", lambda: step(weight=torch.tensor([1.0, NAN, 1.0, 1.0]), reduction="none")[0], spoils(1))
add("inf in one row", lambda: step(weight=torch.tensor([1.0, INF, 1.0, 1.0]), reduction="none")[0], spoils(1))
add("negative", lambda: step(weight=-W), same_as(lambda: step(weight=-W)))
add("all 0", lambda: step(weight=torch.zeros(4)), NOTHING)
add(
    "0 in a row with the label 99",
    lambda: dkd(target=Y.where(ZERO_AT_1 != 0, 99), weight=ZERO_AT_1),
    same_as(lambda: dkd(weight=ZERO_AT_1)),
)
add(
    "0 for a row of NaN",
    lambda: step(student=HOLED, weight=ZERO_AT_1),
    same_as(lambda: step(weight=ZERO_AT_1), "the others' value"),
)
add(
    "0 for a row of NaN in float16",
    lambda: step(student=HOLED.half(), weight=ZERO_AT_1),
    same_as(lambda: step(student=S.half(), weight=ZERO_AT_1), "the others' value"),
)
add("float64", lambda: step(weight=W.double()), same_as(lambda: step(weight=W)))

add = group("Labels", LINES)
for words, wrong, kind in (
    ("None", None, TypeError), ("a list", Y.tolist(), TypeError), ("int32", Y.int(), TypeError),
    ("probabilities", S.softmax(-1), TypeError), ("of another length", Y[:3], ValueError),
    ("one too large", Y + 1, ValueError), ("negative", Y - 1, ValueError),
    ("on another device", Y.to("meta"), ValueError),
):  # fmt: skip
    add(words, lambda y=wrong: fastkd.dkd_loss(S, T, y), Refused(kind, "^target"))
add("all ignored", lambda: dkd(target=torch.full((4,), -100)), NOTHING)
add(
    "a row of NaN ignored",
    lambda: dkd(student=HOLED, target=torch.tensor([0, -100, 2, 3])),
    same_as(lambda: dkd(target=torch.tensor([0, -100, 2, 3])), "the others' value"),
)
add(
    "ignore_index that is a class",
    lambda: dkd(ignore_index=5),
    same_as(lambda: dkd(target=torch.tensor([0, -100, 2, 3]))),
)

add = group("Probabilities as target of distill_loss", LINES)
P = torch.full((4, 6), 1 / 6)


def soft(target: torch.Tensor, **options: Any) -> Result:
    return step(fastkd.distill_loss, S, T, target, **{"ce_weight": 0.5, "kd_weight": 0.5, **options})


for words, target, options, message in (
    ("negative", P - 0.5 * torch.eye(4, 6), {}, "^row 0 of target has -0.333"),
    ("rows that sum to 2", 2 * P, {}, "^row 0 of target sums to 2"),
    ("rows of 0", 0 * P, {}, "^row 0 of target sums to 0"),
    ("NaN", P * NAN, {}, "^row 0 of target sums to nan"),
    ("of other classes", P[:, :5], {}, r"^target has dtype torch.float32 and shape \[4, 5\]"),
    ("labels in floating point", Y.float(), {}, r"^target has dtype torch.float32 and shape \[4\]"),
    ("that require grad", P.clone().requires_grad_(), {}, "^target requires grad"),
    ("on another device", P.to("meta"), {}, "^target is on meta"),
    ("with tckd_weight", P, {"tckd_weight": 1.0}, "^tckd_weight is 1.0"),
    ("with ignore_index", P, {"ignore_index": 0}, "^ignore_index is 0"),
):
    add(words, lambda y=target, o=options: soft(y, **o), Refused(ValueError, message))
add("in bfloat16", lambda: soft(P.bfloat16()), FINITE)
add(
    "anything in a row of weight 0",
    lambda: soft(P - torch.tensor([[0.0], [1.0], [0.0], [0.0]]), weight=ZERO_AT_1),
    same_as(lambda: soft(P, weight=ZERO_AT_1), "the others' value"),
)

# Values -----------------------------------------------------------------------------------------------------
add = group("NaN and infinity in the logits", LINES)


def spoilt(row: int, column: int, value: float) -> torch.Tensor:
    logits = S.clone()
    logits[row, column] = value
    return logits


def in_row(row: int, column: int | None = None) -> Gives:
    """A softmax spreads it over the gradient of its row; a pointwise loss keeps it in its class."""

    def holds(results: Result) -> bool:
        loss, gradient = results
        others = [other for other in range(4) if other != row]
        good = loss[others].isfinite().all() and gradient[others].isfinite().all() and loss[row].isnan()
        spread = [column is None or column == place for place in range(6)]
        return bool(good) and gradient[row].isnan().tolist() == spread

    where = "that row" if column is None else "that row, in its gradient of that class"
    return Gives(f"NaN in {where} alone", holds=holds)


for name, loss, labels in (
    ("kd_loss", fastkd.kd_loss, ()), ("dkd_loss", fastkd.dkd_loss, (Y,)), ("nkd_loss", fastkd.nkd_loss, (Y,)),
    ("jsd_loss", fastkd.jsd_loss, ()), ("reverse_kl_loss", fastkd.reverse_kl_loss, ()),
    ("ttm_loss", partial(fastkd.ttm_loss, gamma=0.5), ()),
    ("binary_kl_loss", fastkd.binary_kl_loss, ()), ("binary_kl_norm_loss", fastkd.binary_kl_norm_loss, ()),
):  # fmt: skip
    pointwise = name.startswith("binary")
    add(
        f"{name}, NaN in the student",
        lambda f=loss, y=labels: step(f, spoilt(2, 1, NAN), T, *y, reduction="none"),
        in_row(2, 1 if pointwise else None),
    )
    add(
        f"{name}, NaN in the teacher",
        lambda f=loss, y=labels: step(f, T, spoilt(1, 5, NAN), *y, reduction="none"),
        in_row(1, 5 if pointwise else None),
    )
add("kd_loss, +inf in the student", lambda: step(student=spoilt(2, 1, INF), reduction="none")[0], spoils(2))
