"""What the Triton launcher computes: NaN, infinity and accuracy."""

import math

import pytest
import torch

pytest.importorskip("triton")

from fastkd import reference
from fastkd.ops.spec import CASES, Needs
from tests.cases import KERNELS
from tests.ops.triton_calls import (
    DEVICE,
    LOSSES,
    PATHS,
    POINTWISE,
    assert_close,
    each_kernel,
    each_loss,
    kernel,
    labels,
    logits,
    reference_in,
    run,
)

# ---- NaN and infinity ----------------------------------------------------------------------------------


# Classes of student and teacher that are spoilt, a row for each: first, label, and last, in a tile that is
# not full. A row that programs share takes the interpreter a second.
EACH_PLACE = ((0, 3, -1), (0, 3, -1))
FEW_PLACES = ((3, -1), (0,))


def spoilt(name, rows, classes, value, places=EACH_PLACE):
    """Logits with ``value`` in rows of its own; the places (row, class); and the logits without it."""
    student, teacher, target = logits(rows, classes), logits(rows, classes), labels(rows, classes)
    target[:] = 3
    pair, spoilt_places = [student.clone(), teacher.clone()], []
    for which, of_model in enumerate(places[: 1 if name in ("ce", "ce-smoothed") else 2]):
        for place in of_model:
            spoilt_places.append((len(spoilt_places), place % classes))
            pair[which][spoilt_places[-1]] = value
    return pair, spoilt_places, (student, teacher, target)


@each_kernel
@pytest.mark.parametrize(("rows", "classes"), [(8, 10), (7, 700)])
def test_a_nan_is_a_nan_in_that_row_alone(name, rows, classes):
    pair, places, (student, teacher, target) = spoilt(name, rows, classes, math.nan)
    clean = kernel(name, student, teacher, target)
    values, gradient = kernel(name, *pair, target)
    for row, place in places:
        assert values[row].isnan()
        bad = gradient[row].isnan()
        assert bad.nonzero().flatten().tolist() == [place] if name in POINTWISE else bad.all()
    assert torch.equal(values[len(places) :], clean[0][len(places) :])
    assert torch.equal(gradient[len(places) :], clean[1][len(places) :])


@pytest.mark.parametrize("name", [name for name in KERNELS if name not in POINTWISE])
@pytest.mark.parametrize(("rows", "classes", "places"), [(6, 10, EACH_PLACE), (3, 9000, FEW_PLACES)])
def test_an_infinite_logit_is_not_hidden(name, rows, classes, places):
    pair, places, (_, _, target) = spoilt(name, rows, classes, math.inf, places)
    values, _ = kernel(name, *pair, target)
    for row, _ in places:
        assert not values[row].isfinite()


@pytest.mark.parametrize("name", [name for name in KERNELS if name not in POINTWISE])
def test_sums_of_earlier_tiles_vanish_before_a_huge_logit(name):
    """Their share is 0, whatever they come to relative to a maximum of 3e38."""
    if CASES[name][0].needs(CASES[name][1].options) & (Needs.STANDARDIZED | Needs.LOG_RATIO):
        pytest.skip("a variance or a gradient that overflows")
    student, teacher, target = logits(2, 9000), logits(2, 9000), torch.tensor([0, 8998], device=DEVICE)
    student[:, 8999], teacher[:, 8999] = 1e38, 3e38
    found = kernel(name, student, teacher, target)
    assert found[0].isfinite().all()
    assert found[1].isfinite().all()


# ---- accuracy ------------------------------------------------------------------------------------------


def regimes(rows, classes):
    """Names, students, teachers."""
    yield "random", logits(rows, classes), logits(rows, classes)
    yield "small", logits(rows, classes, spread=0.1), logits(rows, classes, spread=0.1)
    yield "offset", logits(rows, classes), logits(rows, classes) + 1000
    yield "at 10,000", logits(rows, classes) + 1e4, logits(rows, classes) + 1e4
    for apart in (1e-1, 1e-2, 1e-3):
        student = logits(rows, classes)
        yield f"{apart} apart", student, student + apart * torch.randn_like(student)
    student = logits(rows, classes)
    yield "offset and near", student, student + 0.03 * torch.randn_like(student) + 1000
    index = torch.arange(rows, device=DEVICE)
    student, teacher = logits(rows, classes), logits(rows, classes)
    student[index, index % classes] += 20
    teacher[index, index % classes] += 20
    yield "confident", student, teacher
    yield "confident and near", student, student + 1e-2 * torch.randn_like(student)


def mean_square(error):
    return error.square().mean().sqrt()


@each_loss
@pytest.mark.parametrize("classes", [10, 100])
def test_no_worse_than_eager(name, classes):
    """The error's root mean square over the rows of a regime is close to eager's or better.

    A single row's error is a few roundings of float32, and eager's may be 0 by chance, so it has a looser
    bound: twice eager's largest error, plus the rounding of the largest number that the loss adds up.
    """
    rows = 12
    target = torch.arange(rows, device=DEVICE) % classes
    for regime, student, teacher in regimes(rows, classes):
        if name in POINTWISE and "offset" in regime:
            continue  # these losses depend on the offset; rounding errors of their large sums are alike
        values, gradient = kernel(name, student, teacher, target)
        true_values, true_gradient = reference_in(torch.float64, name, student, teacher, target)
        eager_values, eager_gradient = reference_in(torch.float32, name, student, teacher, target)
        options = LOSSES[name][1]
        unit = 1e-7 * max(1.0, options[0] ** 2) * max(1.0, 1.0, *options[1:5])
        error, eager = values - true_values, eager_values - true_values
        assert mean_square(error) <= 1.5 * mean_square(eager) + 4e-7 * mean_square(true_values) + unit, regime
        assert (error.abs() <= 2 * eager.abs().max() + 1e-6 * true_values.abs() + 5 * unit).all(), regime
        error, eager = gradient - true_gradient, eager_gradient - true_gradient
        floor = 1e-6 * mean_square(true_gradient)
        # numpy's sums in the interpreter have more roundings than the tree sums of torch or a GPU.
        assert mean_square(error) <= 3 * mean_square(eager) + floor, regime


@pytest.mark.parametrize(
    ("name", "loss_error"),
    # Of eager 2e-3 to 2e-2 with DKD.
    [("kd-t1", 2e-3), ("reverse-kl", 2e-3), ("jsd", 2e-3), ("dkd", 4e-3), ("nkd", 2e-3)],
)
def test_a_common_offset_has_no_effect(name, loss_error):
    """32,000 classes, near equality, the teacher 1000 above the student."""
    student = 3 * torch.randn(2, 32_000, device=DEVICE)
    teacher = student + 0.03 * torch.randn_like(student) + 1000
    target = labels(2, 32_000)
    assert_close(
        kernel(name, student, teacher, target),
        reference_in(torch.float64, name, student, teacher, target),
        loss_error,
        1e-4,
    )


def test_log_odds_of_a_confident_label_near_equality(monkeypatch):
    """Their difference is not that of two rounded numbers near 15; the label has no other gradient."""
    loss, options, labelled = LOSSES["dkd"]
    monkeypatch.setitem(LOSSES, "dkd", (loss, (1.0, *options[1:]), labelled))
    target = torch.arange(100, device=DEVICE) % 10
    student = logits(100, 10).scatter_(1, target[:, None], 16.0)
    teacher = student + 1e-4 * torch.randn_like(student)
    found, true = (
        gradient.gather(1, target[:, None])
        for _, gradient in (
            kernel("dkd", student, teacher, target),
            reference_in(torch.float64, "dkd", student, teacher, target),
        )
    )
    assert (found - true).norm() <= 5e-4 * true.norm()


def test_tvd_of_classes_whose_probabilities_are_equal():
    """They have no slope, others have."""
    student = torch.tensor([[0.0, 0.0, -1.0, -2.0]], device=DEVICE)
    teacher = student[:, [0, 1, 3, 2]]
    found = kernel("tvd", student, teacher, None)
    assert_close(found, reference_in(torch.float64, "tvd", student, teacher, None))


@pytest.mark.parametrize("name", ["lskd", "ls-dkd", "ce-lskd"])
@pytest.mark.parametrize(("rows", "classes"), [(6, 10), (2, 9000)])
def test_a_constant_row_has_no_deviation(name, rows, classes):
    """In the student, the teacher or both."""
    target = labels(rows, classes)
    constant = torch.full((rows, classes), 7.3, device=DEVICE)
    student = logits(rows, classes)
    found = kernel(name, student, constant, target)
    assert_close(found, reference_in(torch.float64, name, student, constant, target))
    rows_of_both, gradient = kernel(name, constant, constant, target)
    if name != "ce-lskd":
        assert (rows_of_both == 0).all()
        assert (gradient == 0).all()
    assert rows_of_both.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize(("rows", "classes"), [(6, 10), (2, 9000)])
@pytest.mark.parametrize("name", ["lskd", "ls-dkd"])
def test_a_deviation_of_the_size_of_epsilon(name, rows, classes):
    """The epsilon added to it is 1e-7."""
    student, teacher = logits(rows, classes, spread=1e-7), logits(rows, classes)
    target = labels(rows, classes)
    found = kernel(name, student, teacher, target)
    assert_close(found, reference_in(torch.float64, name, student, teacher, target))


def test_a_constant_student_of_lskd_at_temperature_4():
    rows = torch.empty(1, device=DEVICE)
    student, teacher = torch.full((1, 10), 7.3, device=DEVICE), logits(1, 10)
    options = (4.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
    run([student], [teacher], None, None, 1.0, "softmax", options, rows, None)
    true, _ = reference.softmax_rows(student.double(), teacher.double(), None, *options)
    torch.testing.assert_close(rows.double(), true, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["lskd", "ls-dkd"])
@pytest.mark.parametrize("temperature", [1e-2, 1e-6])
def test_constant_rows_at_a_small_temperature_are_finite(name, temperature, monkeypatch):
    loss, options, labelled = LOSSES[name]
    monkeypatch.setitem(LOSSES, name, (loss, (temperature, *options[1:]), labelled))
    constant = torch.full((2, 10), 7.3, device=DEVICE)
    for student, teacher in ((constant, logits(2, 10)), (logits(2, 10), constant), (constant, constant)):
        rows, gradient = kernel(name, student, teacher, labels(2, 10))
        assert rows.isfinite().all()
        assert gradient.isfinite().all()


@each_kernel
@pytest.mark.parametrize(("rows", "classes"), PATHS)
def test_equal_logits_have_no_gradient(name, rows, classes):
    if not CASES[name][1].vanishes:
        pytest.skip("has a gradient at equal logits")
    student = logits(rows, classes)
    values, gradient = kernel(name, student, student.clone(), labels(rows, classes))
    assert (gradient == 0).all()
    assert (values == 0).all()
