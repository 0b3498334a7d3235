"""``TopKLogits`` at the edges of float32, and what only a part of a row shows."""

import math

import pytest
import torch

import fastkd
from fastkd.losses.cases import call_of
from fastkd.ops import spec
from tests.cases import error
from tests.losses.test_top_k import CLASSES, DEFINED, ROWS, compare, gradient_of, logits, made


def gradients_of_the_rest(name, student, form, target):
    """The gradient where nothing is known, of the current backend and of eager in float64."""
    gradients = []
    for dtype, backend in ((torch.float32, fastkd.get_backend()), (torch.float64, "eager")):
        given = form.of([t.to(dtype) if t.is_floating_point() else t for t in form.tensors.values()])
        leaf = student.to(dtype).requires_grad_()
        with fastkd.use_backend(backend):
            value = call_of(DEFINED[name][1])(leaf, given, target)
        gradient = gradient_of(value, leaf, torch.ones_like(value))[1]
        gradients.append(gradient.scatter(1, form.indices, 0.0).scatter(1, target[:, None], 0.0))
    return gradients


@pytest.mark.parametrize("name", ["ce-kd", "ce-kd-t1", "ce-kd-smoothed"])
@pytest.mark.parametrize("known", [False, True])
def test_a_label_far_above_the_other_classes(fused, name, known):
    """Relative to its logit, all other exponentials are 0; relative to theirs, its own overflows."""
    student, teacher, target = logits(device=fused)
    form = made(name, teacher, 4, target if known else None)
    compare(name, student.scatter_add(1, target[:, None], torch.full_like(student, 300.0)), form, target)
    # Of this one the definition is not finite: it takes a logarithm of the rest's probability, which is 0.
    student = student.scatter_add(1, target[:, None], torch.full_like(student, 4000.0)).requires_grad_()
    value = call_of(DEFINED[name][1])(student, form, target)
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()


def test_a_small_rest_keeps_its_gradient(fused):
    """As 0 less the gradients of the known classes it would be a rounding error of those."""
    student, teacher, target = logits(classes=200, device=fused)
    form = made("jsd", teacher, 4, None)
    student.scatter_add_(1, form.indices, torch.full((ROWS, 4), 25.0, device=fused))
    ours, exact = gradients_of_the_rest("jsd", student, form, target)
    assert error(ours, exact) < 1e-4


def test_sums_at_1_beside_a_large_temperature(fused, monkeypatch):
    """A base may stay some temperatures below a logit, but at T = 1 that would overflow."""
    options = {"ce_weight": 0.5, "kd_weight": 0.01, "temperature": 100.0}
    case = spec.Case("hot", "distill_loss", options, spec.SoftmaxOptions(**options), labelled=True)
    monkeypatch.setitem(DEFINED, "hot", (spec.LOSSES["softmax"], case))
    student, teacher, target = logits(classes=2500, rows=3, device=fused)
    compare("hot", 30 * student, made("hot", teacher, 40, target), target)


@pytest.mark.parametrize("name", ["kd", "reverse-kl", "jsd", "tvd"])
def test_a_student_without_unmasked_classes(fused, name):
    """Its K + 1 classes are equal then."""
    case = DEFINED[name][1]
    student, teacher, _ = logits(device=fused)
    student[0] = -math.inf
    for k in (4, CLASSES - 1):
        form = made(name, teacher, k, None)
        ours = call_of(case)(student, form, None, reduction="none")
        with fastkd.use_backend("eager"):
            exact = call_of(case)(student.double(), form, None, reduction="none")
        assert error(ours, exact) < 1e-5


def test_rows_too_long_to_cache():
    """On the CPU: exponentials that exceed 32 MiB are recomputed."""
    student, teacher, target = logits(classes=4_200_001, rows=1)
    teacher[:, :5] += 60.0  # for half of its probability: else nothing is left of the rest's gradient
    form = made("ce-kd", teacher, 5, target)
    with fastkd.use_backend("native"):
        compare("ce-kd", student.clone(), form, target)
        assert error(*gradients_of_the_rest("ce-kd", student, form, target)) < 1e-4


def test_terms_are_weighted_too(fused):
    student, teacher, target = logits(device=fused)
    form = fastkd.top_k(teacher, 5, target, temperature=4.0)
    weight = torch.rand(ROWS, device=fused)
    factors = {"ce": 0.3, "kd": 0.9, "tckd": 1.1}
    named = {f"{name}_weight": factor for name, factor in factors.items()}
    loss, terms = fastkd.distill_loss(student, form, target, **named, weight=weight, reduction="none")
    torch.testing.assert_close(sum(factors[name] * terms[name] for name in factors), loss)


def test_one_known_class_of_a_strided_tensor(fused):
    """Every stride of a dimension of size 1 is contiguous to torch."""
    student, teacher, _ = logits(device=fused)
    form = fastkd.top_k(teacher, 4, temperature=4.0)
    every_fifth = [tensor[:, ::5] for tensor in (form.log_probs, form.indices)]
    ours, expected = (
        fastkd.kd_loss(student, fastkd.TopKLogits(*tensors, num_classes=CLASSES, temperature=4.0))
        for tensors in (every_fifth, [tensor.clone() for tensor in every_fifth])
    )
    assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    ("indices", "log_probs", "why"),
    [
        ((0, CLASSES), (-1.0, -2.0), f"has the index {CLASSES}"),
        ((-1, 3), (-1.0, -2.0), "has the index -1"),
        ((3, 3), (-1.0, -2.0), "has the index 3 twice"),
        ((0, 3), (1e-6, -20.0), "expected at most 0"),  # whose probabilities sum to nearly 1
        ((0, 3), (-0.5, -0.5), "sum to 1.21"),
    ],
)
@pytest.mark.parametrize("backend", ["native", "eager"])
def test_what_no_teacher_has_is_an_error_of_the_loss(backend, indices, log_probs, why):
    """Found by a pass over the known classes, before a kernel reads memory by them."""
    form = fastkd.TopKLogits(
        torch.tensor([(-1.0, -2.0), log_probs]), torch.tensor([(0, 1), indices]), num_classes=CLASSES,
        temperature=4.0,
    )  # fmt: skip
    with fastkd.use_backend(backend), pytest.raises(ValueError, match=f"row 1 .*{why}"):
        fastkd.kd_loss(torch.randn(2, CLASSES), form)
