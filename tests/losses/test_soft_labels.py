"""distill_loss with probabilities in place of labels (MixUp, CutMix), against plain torch in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

import fastkd
from fastkd.losses.arguments import SUM_TOLERANCE
from tests.cases import make_logits

ROWS, CLASSES = 6, 37
S, T, Y = make_logits(ROWS, CLASSES)
W = torch.tensor([0.5, 2.0, 0.0, 1.0, 0.25, 3.0])
P = 0.3 * F.one_hot(Y, CLASSES) + 0.7 * F.one_hot(Y.flip(0), CLASSES)
WEIGHTS = {"ce_weight": 0.3, "kd_weight": 0.7}


def in_torch(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    ce_weight: float,
    kd_weight: float = 0.0,
    temperature: float = 4.0,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    reduction: str = "batchmean",
) -> Tensor:
    ce = F.cross_entropy(student, target, reduction="none", label_smoothing=label_smoothing)
    log_q, log_p = ((logits / temperature).log_softmax(-1) for logits in (student, teacher))
    kd = temperature**2 * F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    rows = ce_weight * ce + kd_weight * kd
    rows = rows if weight is None else rows * weight
    return {"batchmean": rows.sum() / len(rows), "sum": rows.sum(), "none": rows}[reduction]


def value_and_gradient(loss: Any, student: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = student.detach().clone().requires_grad_()
    value = loss(leaf, *arguments, **options)
    value = value[0] if isinstance(value, tuple) else value
    value.sum().backward()
    return value.detach(), leaf.grad


OPTIONS: list[dict[str, Any]] = [
    WEIGHTS,
    {"ce_weight": 1.0},
    {"ce_weight": 0.0, "kd_weight": 1.0},
    {**WEIGHTS, "label_smoothing": 0.1, "temperature": 2.0},
    {**WEIGHTS, "weight": W},
    {**WEIGHTS, "weight": W, "reduction": "sum", "label_smoothing": 0.1},
    {**WEIGHTS, "weight": W, "reduction": "none"},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_float64_is_plain_torch(options: dict[str, Any]) -> None:
    double = [S.double(), T.double(), P.double()]
    options = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
    got = value_and_gradient(fastkd.distill_loss, *double, **options)
    expected = value_and_gradient(in_torch, *double, **options)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("options", OPTIONS[::3])
def test_every_backend(fused: str, dtype: torch.dtype, tolerance: float, options: dict[str, Any]) -> None:
    student, teacher = S.to(dtype), T.to(dtype)
    moved = {k: v.to(fused) if isinstance(v, Tensor) else v for k, v in options.items()}
    value, gradient = value_and_gradient(
        fastkd.distill_loss, student.to(fused), teacher.to(fused), P.to(fused), **moved
    )
    expected = value_and_gradient(in_torch, student.double(), teacher.double(), P.double(), **options)
    assert (value.dtype, gradient.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(value.cpu().double(), expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(
        gradient.cpu().double(), expected[1], rtol=tolerance, atol=tolerance * expected[1].abs().max().item()
    )


def test_a_label_as_probabilities_gives_the_same_terms() -> None:
    hot = F.one_hot(Y, CLASSES).float()
    loss, terms = fastkd.distill_loss(S, T, Y, **WEIGHTS)
    soft_loss, soft_terms = fastkd.distill_loss(S, T, hot, **WEIGHTS)
    torch.testing.assert_close(soft_loss, loss)
    assert list(soft_terms) == ["ce", "kd"]
    for name, term in terms.items():
        torch.testing.assert_close(soft_terms[name], term)
        assert not soft_terms[name].requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_targets_of_other_dtypes(dtype: torch.dtype) -> None:
    """Half precision rounds them, so that rows no longer sum to 1 exactly."""
    target = (0.9 * P + 0.1 / CLASSES).to(dtype)
    value, gradient = value_and_gradient(fastkd.distill_loss, S, T, target, **WEIGHTS)
    expected = value_and_gradient(in_torch, S.double(), T.double(), target.double(), **WEIGHTS)
    torch.testing.assert_close(value.double(), expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient.double(), expected[1], rtol=1e-5, atol=1e-8)


def test_mixup_and_cutmix_of_torchvision() -> None:
    images = torch.rand(ROWS, 3, 8, 8)
    for mix in (v2.MixUp(num_classes=CLASSES), v2.CutMix(num_classes=CLASSES)):
        _, target = mix(images, Y)
        value = fastkd.distill_loss(S, T, target, **WEIGHTS)[0]
        torch.testing.assert_close(value, in_torch(S, T, target, **WEIGHTS))


def test_tokens_and_pairs() -> None:
    """[B, T, C], and the same probabilities for two heads."""
    shape = (2, 3, CLASSES)
    tokens = value_and_gradient(
        fastkd.distill_loss, S.view(shape), T.view(shape), P.view(shape), reduction="none", **WEIGHTS
    )
    rows = value_and_gradient(fastkd.distill_loss, S, T, P, reduction="none", **WEIGHTS)
    torch.testing.assert_close([part.flatten() for part in tokens], [part.flatten() for part in rows])
    pairs, terms = fastkd.distill_loss([S, T], [T, S], P, reduction="none", **WEIGHTS)
    other = fastkd.distill_loss(T, S, P, reduction="none", **WEIGHTS)[0]
    torch.testing.assert_close(pairs, torch.stack([rows[0], other]))
    assert terms["ce"].shape == (2, ROWS)


def test_masked_classes_add_nothing() -> None:
    student, teacher, target = (
        torch.cat([one, torch.full((ROWS, 1), fill)], 1)
        for one, fill in ((S, -torch.inf), (T, -torch.inf), (P, 0.0))
    )
    got = value_and_gradient(fastkd.distill_loss, student, teacher, target, **WEIGHTS)
    expected = value_and_gradient(fastkd.distill_loss, S, T, P, **WEIGHTS)
    torch.testing.assert_close((got[0], got[1][:, :-1]), expected)
    assert not got[1][:, -1].any()


def test_rows_of_weight_0_may_hold_anything() -> None:
    student, target = S.clone(), P.clone()
    student[2], target[2] = torch.nan, -5.0
    got = value_and_gradient(fastkd.distill_loss, student, T, target, weight=W, **WEIGHTS)
    expected = value_and_gradient(fastkd.distill_loss, S, T, P, weight=W, **WEIGHTS)
    torch.testing.assert_close(got, expected)


def test_teachers_in_other_forms() -> None:
    hidden, weight = torch.randn(ROWS, 5), torch.randn(CLASSES, 5)
    linear = fastkd.LinearLogits(hidden, weight)
    for form, dense in ((linear, linear.dense()), (fastkd.top_k(T, CLASSES, temperature=4.0), T)):
        got = value_and_gradient(fastkd.distill_loss, S, form, P, **WEIGHTS)
        torch.testing.assert_close(got, value_and_gradient(in_torch, S, dense, P, **WEIGHTS))


def test_module_and_compiled() -> None:
    module = fastkd.DistillLoss(**WEIGHTS)
    expected = value_and_gradient(in_torch, S, T, P, **WEIGHTS)
    torch.testing.assert_close(value_and_gradient(module, S, T, P), expected)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(value_and_gradient(compiled, S, T, P), expected)


def test_a_wrong_row_that_cannot_be_read_back_is_nan() -> None:
    """As on a GPU: compiled code does not read values."""
    target = P.clone()
    target[1] *= 2
    compiled = torch.compile(fastkd.distill_loss, fullgraph=True, backend="aot_eager")
    losses, _ = compiled(S, T, target, reduction="none", **WEIGHTS)
    assert losses.isnan().tolist() == [False, True, False, False, False, False]


BAD = P.clone()
BAD[3, 0] = -0.1
LINEAR = fastkd.LinearLogits(torch.randn(ROWS, 5), torch.randn(CLASSES, 5))


@pytest.mark.parametrize(
    ("target", "options", "kind", "message"),
    [
        (2 * P, {}, ValueError, "row 0 of target sums to 2; expected 1, or weight=0 for a row to ignore"),
        (P * (1 + 2 * SUM_TOLERANCE), {}, ValueError, "row 0 of target sums to 1.04"),
        (BAD, {}, ValueError, "row 3 of target has -0.1; expected probabilities"),
        (P * torch.nan, {}, ValueError, "row 0 of target sums to nan"),
        (P[:, :-1], {}, ValueError, r"shape \[6, 36\]; expected int64 class indices \[6\], or .* \[6, 37\]"),
        (
            Y.float(),
            {},
            ValueError,
            r"dtype torch.float32 and shape \[6\]; expected int64 class indices \[6\]",
        ),
        (P.to("meta"), {}, ValueError, "target is on meta and student_logits on cpu"),
        (P.clone().requires_grad_(), {}, ValueError, "target requires grad"),
        (P.to_sparse(), {}, TypeError, "target has layout torch.sparse_coo"),
        (F.one_hot(Y, CLASSES), {}, ValueError, r"target has shape \[6, 37\]; expected \[6\]"),
        (P.int(), {}, TypeError, "target has dtype torch.int32; expected int64 class indices$"),
        (P, {"ignore_index": 3}, ValueError, "ignore_index is 3, but target holds probabilities"),
        (P, {"tckd_weight": 1.0}, ValueError, "tckd_weight is 1.0, but target holds probabilities"),
        (P, {"nckd_weight": 2.0}, ValueError, "nckd_weight is 2.0, but target holds probabilities"),
        (P, {"reduction": "mean"}, ValueError, "weaker by the number of classes"),
        (P, {"weight": W[:2]}, ValueError, r"weight has shape \[2\]"),
        (
            P,
            {"student_logits": LINEAR},
            TypeError,
            "target holds probabilities .* as LinearLogits, student_logits, never",
        ),
    ],
)
def test_refused(target: Tensor, options: dict[str, Any], kind: type[Exception], message: str) -> None:
    arguments = {"student_logits": S, "teacher_logits": T, "target": target, **WEIGHTS, **options}
    with pytest.raises(kind, match=message):
        fastkd.distill_loss(**arguments)


@pytest.mark.parametrize("loss", [fastkd.dkd_loss, fastkd.dckd_loss, fastkd.nkd_loss])
def test_losses_of_one_label_refuse_probabilities(loss: Any) -> None:
    with pytest.raises(TypeError, match="expected int64 class indices: only distill_loss takes probab"):
        loss(S, T, P)
    with pytest.raises(TypeError, match="only distill_loss takes probabilities"):
        fastkd.kd_loss(S, T, target=P)


def test_a_linear_student_mixes_two_losses_instead() -> None:
    """What the refusal says to do."""
    kd, _ = fastkd.distill_loss(LINEAR, T, Y, ce_weight=0.3 * 0.3, kd_weight=0.7)
    other, _ = fastkd.distill_loss(LINEAR, T, Y.flip(0), ce_weight=0.7 * 0.3)
    expected, _ = fastkd.distill_loss(LINEAR.dense(), T, P, **WEIGHTS)
    torch.testing.assert_close(kd + other, expected)


@pytest.mark.parametrize("backend", ["eager", "native"])
def test_probabilities_of_float64_leave_the_loss_in_float32(backend: str) -> None:
    with fastkd.use_backend(backend):
        loss, terms = fastkd.distill_loss(S, T, P.double(), ce_weight=1.0, kd_weight=1.0)
    assert {loss.dtype, *(term.dtype for term in terms.values())} == {torch.float32}
