"""Methods on float64 networks against formulas in plain torch, to 1e-12: nothing is rounded to float32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastkd.distill import FitNets, Method, find_method
from fastkd.distill.precision import dtype_of_parts
from fastkd.reference import at_least_float32
from fastkd.train.evaluation import evaluate

from .models import METHODS, Net, batch, pair

TOLERANCE = {"rtol": 1e-11, "atol": 1e-13}


def build(name: str, **options: object) -> tuple[Method, Tensor, Tensor]:
    """A method on float64 networks in eval mode, with a batch."""
    student, teacher = (model.double() for model in pair())
    images, target = batch()
    images = images.double()
    options = {**METHODS[name], "example": images[:2], **options}
    return find_method(name)(student, teacher, **options).eval(), images, target


def kl(s: Tensor, t: Tensor, temperature: float) -> Tensor:
    s, t = (s / temperature).log_softmax(1), (t / temperature).log_softmax(1)
    return temperature**2 * F.kl_div(s, t, log_target=True, reduction="batchmean")


def standard(z: Tensor) -> Tensor:
    return (z - z.mean(1, keepdim=True)) / (z.std(1, keepdim=True) + 1e-7)


def decoupled(s: Tensor, t: Tensor, y: Tensor, gated: bool) -> tuple[Tensor, Tensor]:
    """TCKD and NCKD at T 4, by probabilities."""
    p, q, label = (t / 4).softmax(1), (s / 4).softmax(1), F.one_hot(y, s.shape[1]).bool()
    p_y, q_y = p[label], q[label]
    target = p_y * (p_y / q_y).log() + (1 - p_y) * ((1 - p_y) / (1 - q_y)).log()
    others = [(x / 4)[~label].view(len(x), -1).log_softmax(1) for x in (t, s)]
    others_kl = (others[0].exp() * (others[0] - others[1])).sum(1)
    return 16 * (target * (p_y > q_y if gated else 1)).mean(), 16 * others_kl.mean()


def bernoulli(s: Tensor, t: Tensor) -> Tensor:
    q, p = (s / 2).sigmoid(), (t / 2).sigmoid()
    return 4 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(1).mean()


def log_cosh(s: Tensor, t: Tensor) -> Tensor:
    return 4 * ((s - t) / 4).cosh().log().sum(1).mean()


def nkd(s: Tensor, t: Tensor, y: Tensor, gamma: float = 1.5, temperature: float = 2.0) -> Tensor:
    label = F.one_hot(y, s.shape[1]).bool()
    target = -t.softmax(1)[label] * s.log_softmax(1)[label]
    p, q = ((x / temperature)[~label].view(len(x), -1).log_softmax(1) for x in (t, s))
    return (target - gamma * temperature**2 * (p.exp() * q).sum(1)).mean()


def relations(s: Tensor, t: Tensor, distance: float, angle: float) -> Tensor:
    def distances(x: Tensor) -> Tensor:
        apart = (x[:, None] - x[None, :]).square().sum(2)
        apart = torch.where(apart > 0, apart, 1.0).sqrt() * (apart > 0)
        return apart / (apart.sum() / (len(x) * (len(x) - 1)))

    def angles(x: Tensor) -> Tensor:
        to = F.normalize(x[None, :] - x[:, None], dim=2)
        return torch.einsum("ijd,ikd->ijk", to, to)

    huber = F.smooth_l1_loss
    return distance * huber(distances(s), distances(t)) + angle * huber(angles(s), angles(t))


def hint(method: Method, s: Tensor, t: Tensor) -> Tensor:
    return F.mse_loss(method.hint.projection(s), t)


def mhkd(method: Method, images: Tensor, s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    loss = F.cross_entropy(s, y) + kl(s, t, 4.0)
    heads = zip(method.student_heads, method.teacher_heads, strict=True)
    for index, (of_student, of_teacher) in enumerate(heads):
        a = of_student(method.student.features[: index + 1](images))
        b = of_teacher(method.teacher.features[: index + 1](images))
        loss = loss + F.cross_entropy(b, y) + 0.9 * kl(a, b.detach(), 4.0) + 0.1 * F.cross_entropy(a, y)
    return loss


Formula = Callable[[Method, Tensor, Tensor, Tensor, Tensor], Tensor]


def with_ce(distillation: Callable[[Tensor, Tensor], Tensor], ce: float = 1.0) -> Formula:
    return lambda m, x, s, t, y: ce * F.cross_entropy(s, y) + distillation(s, t)


def decoupled_formula(gated: bool) -> Formula:
    def formula(method: Method, images: Tensor, s: Tensor, t: Tensor, y: Tensor) -> Tensor:
        tckd, nckd = decoupled(s, t, y, gated)
        loss = F.cross_entropy(s, y) + tckd + 8 * nckd
        if gated:  # METHODS gives DCKD a hint and relations
            maps = method.student.features(images), method.teacher.features(images)
            loss = loss + 2 * hint(method, *maps)
            loss = loss + relations(*(features.mean((2, 3)) for features in maps), 3.0, 4.0)
        return loss

    return formula


def rkd(method: Method, images: Tensor, s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    pooled = (model.features(images).mean((2, 3)) for model in (method.student, method.teacher))
    return F.cross_entropy(s, y) + relations(*pooled, 25.0, 50.0)


def fitnets(method: Method, images: Tensor, s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    maps = (model.features[0](images) for model in (method.student, method.teacher))
    return F.cross_entropy(s, y) + hint(method, *maps)


def centred(t: Tensor) -> Tensor:
    return t - t.mean(1, keepdim=True)


def auxiliary(method: Method, images: Tensor) -> Tensor:
    logits: Tensor = method.head(method.student.features(images).mean((2, 3)))
    return logits


FORMULAS: dict[str, Formula] = {
    "cross_entropy": lambda m, x, s, t, y: F.cross_entropy(s, y, label_smoothing=0.1),
    "kd": with_ce(lambda s, t: 0.9 * kl(s, t, 4.0) / 4, 0.1),  # the first of four epochs of warm-up
    "lskd": with_ce(lambda s, t: 9 * kl(standard(s), standard(t), 2.0), 0.1),
    "dkd": decoupled_formula(gated=False),
    "dckd": decoupled_formula(gated=True),
    "nkd": lambda m, x, s, t, y: F.cross_entropy(s, y) + nkd(s, t, y),
    "binary_kl": with_ce(lambda s, t: bernoulli(s, centred(t))),
    "binary_kl_norm": with_ce(lambda s, t: 0.5 * log_cosh(s, centred(t))),
    "fitnets": fitnets,
    "rkd": rkd,
    "dhkd": lambda m, x, s, t, y: F.cross_entropy(s, y) + log_cosh(auxiliary(m, x), centred(t)),
    "mhkd": mhkd,
}


def gradient_of_formula(method: Method, formula: Formula, images: Tensor, target: Tensor) -> list[Tensor]:
    method.zero_grad()
    with torch.no_grad():
        teacher_logits = method.teacher(images)
    formula(method, images, method.student(images), teacher_logits, target).backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in method.parameters()]


@pytest.mark.parametrize("name", METHODS)
def test_gradients(name: str) -> None:
    method, images, target = build(name, **({"align": "none"} if name == "dhkd" else {}))
    terms = method((images, target))
    assert {value.dtype for value in terms.values()} == {torch.float64}
    loss = method.backward(terms)
    found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in method.parameters()]
    with torch.no_grad():
        value = FORMULAS[name](method, images, method.student(images), method.teacher(images), target)
    torch.testing.assert_close(loss, value, **TOLERANCE)
    expected = gradient_of_formula(method, FORMULAS[name], images, target)
    assert all(gradient.dtype == torch.float64 for gradient in found)
    for gradient, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, **TOLERANCE)


@pytest.mark.parametrize("scope", ["all", "shared"])
def test_alignment(scope: str) -> None:
    method, images, _ = build("dhkd", align=scope, head="linear")
    with torch.no_grad():
        method.teacher.fc.weight *= 30
        target = method.teacher(images).argmin(1)  # unlikely labels: the losses conflict
    method.head.load_state_dict(method.student.fc.state_dict())
    g0, g1 = (
        gradient_of_formula(method, formula, images, target)
        for formula in (
            lambda m, x, s, t, y: F.cross_entropy(s, y),
            lambda m, x, s, t, y: log_cosh(auxiliary(m, x), centred(t)),
        )
    )
    names = [name for name, _ in method.named_parameters()]
    inside = [scope == "all" or name.startswith("student.features") for name in names]

    def dot(a: list[Tensor], b: list[Tensor]) -> Tensor:
        return sum((x * y).sum() for x, y, taken in zip(a, b, inside, strict=True) if taken)

    c = dot(g1, g0) / dot(g0, g0)
    assert c < -0.01
    method.zero_grad()
    method.backward(method((images, target)))
    method.finish_gradients()
    for a, b, taken, parameter in zip(g0, g1, inside, method.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, (1 - c if taken else 1) * a + b, **TOLERANCE)


def test_soft_targets_and_validation() -> None:
    method, images, target = build("cross_entropy")
    soft = F.one_hot(target, 7).float() * 0.7 + 0.3 / 7  # float32, as mixing yields them
    method.backward(method((images, soft)))
    assert method.student.fc.weight.grad.dtype == torch.float64
    _, loss = evaluate(method.student, [(images, target)], device="cpu")
    expected = F.cross_entropy(method.student(images), target).item()
    assert abs(loss - expected) < 1e-14


def test_at_least_float32() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert at_least_float32(torch.ones(1, dtype=dtype)).dtype == torch.float32
    assert at_least_float32(torch.ones(1, dtype=torch.float64)).dtype == torch.float64
    assert dtype_of_parts(nn.Identity()) == dtype_of_parts(Net(2).bfloat16()) == torch.float32
    assert dtype_of_parts(Net(2).double()) == torch.float64


def test_a_teacher_in_another_format() -> None:
    """The student's dtype decides, for a float64 teacher of a float32 student and the reverse."""

    class Converted(Net):
        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = super().forward(images.to(self.fc.weight.dtype))
            return logits

    for dtypes in ((torch.float32, torch.float64), (torch.float64, torch.float32)):
        student, teacher = (Converted(width).to(dtype) for width, dtype in zip((4, 6), dtypes, strict=True))
        images, target = batch()
        method = FitNets(student, teacher, hint_layer="features.1", example=images[:2])
        terms = method((images, target))
        method.backward(terms)
        assert {value.dtype for value in terms.values()} == {dtypes[0]}
