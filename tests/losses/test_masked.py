"""Logits of -inf: classes masked in both models, and rows of which one class, or none, is left."""

import pytest
import torch

import fastkd
from tests.cases import BY_NAME, CASES, KERNELS, error, exact, loss_and_gradient, make_logits

# Standardised rows and label smoothing average over all classes: undefined with masked ones.
MASKED = [case for case in CASES if not case.averages_classes]
each_masked_case = pytest.mark.parametrize("case", MASKED, ids=lambda case: case.name)


@each_masked_case
@pytest.mark.parametrize(("classes", "unmasked"), [(40, 30), (4500, 3000)])
def test_classes_masked_in_both_models_add_nothing(fused, case, classes, unmasked):
    student, teacher, target = make_logits(4, classes, torch.float32, fused)
    target %= unmasked
    masked_student, masked_teacher = student.clone(), teacher.clone()
    masked_student[:, unmasked:] = masked_teacher[:, unmasked:] = -torch.inf
    loss, gradient = loss_and_gradient(case, masked_student, masked_teacher, target, reduction="none")
    fewer = (student[:, :unmasked], teacher[:, :unmasked], target)
    true_loss, true_gradient = exact(case, *fewer, reduction="none")
    assert error(loss, true_loss) < 1e-5
    assert error(gradient[:, :unmasked], true_gradient) < 1e-5
    assert gradient[:, unmasked:].count_nonzero() == 0

    first = [logits.flip(-1) for logits in (masked_student, masked_teacher)]  # masked from the row's first on
    loss, gradient = loss_and_gradient(case, *first, classes - 1 - target, reduction="none")
    assert error(loss, true_loss) < 1e-5
    assert error(gradient.flip(-1)[:, :unmasked], true_gradient) < 1e-5
    assert gradient[:, : classes - unmasked].count_nonzero() == 0


def rows_of_one_class(classes):
    """Rows in which the student, the teacher or both have no logit but the label's."""
    student, teacher, target = make_logits(3, classes)
    for model, rows in ((student, (0, 2)), (teacher, (1, 2))):
        for row in rows:
            kept = model[row, target[row]].item()
            model[row] = -torch.inf
            model[row, target[row]] = kept
    return student, teacher, target


def rows_of_no_class(classes):
    """Rows in which the student, the teacher or both have no logit at all: uniform, as all are equal."""
    student, teacher, target = make_logits(3, classes)
    student[0::2] = teacher[1:] = -torch.inf
    return student, teacher, target


def assert_masked_rows_match(case, device, student, teacher, target):
    """Not the gradient of masked logits: the eager one is 0, as torch's clamp has it."""
    student, teacher, target = (tensor.to(device) for tensor in (student, teacher, target))
    grad_output = torch.rand(len(student), device=device) + 0.5
    loss, gradient = loss_and_gradient(case, student, teacher, target, grad_output, reduction="none")
    true_loss, true_gradient = exact(case, student, teacher, target, grad_output, reduction="none")
    assert torch.isfinite(gradient).all()
    for row, kept in enumerate(student.isfinite()):
        assert error(loss[row], true_loss[row], 1e-2) < 1e-3
        assert error(gradient[row, kept], true_gradient[row, kept], 1e-2) < 1e-3


# Rows of one tile or block, of several blocks on the CPU, and of several tiles of Triton's.
@each_masked_case
@pytest.mark.parametrize("classes", [10, 2100])
def test_one_class_is_left(each_backend, case, classes):
    assert_masked_rows_match(case, each_backend, *rows_of_one_class(classes))


@pytest.mark.parametrize("name", [name for name in KERNELS if BY_NAME[name] in MASKED])
def test_one_class_is_left_of_a_long_row(fused, name):
    assert_masked_rows_match(BY_NAME[name], fused, *rows_of_one_class(9001))


@each_masked_case
@pytest.mark.parametrize("classes", [10, 1203])
def test_one_class_is_left_on_cuda(emulated, case, classes):
    assert_masked_rows_match(case, "cpu", *rows_of_one_class(classes))


# With a label the odds of a class of such a row are those of rounding.
each_case_without_label = pytest.mark.parametrize(
    "case", [case for case in MASKED if not case.uses_label], ids=lambda case: case.name
)


@each_case_without_label
@pytest.mark.parametrize("classes", [10, 2100])
def test_no_class_is_left(each_backend, case, classes):
    assert_masked_rows_match(case, each_backend, *rows_of_no_class(classes))


@each_case_without_label
def test_no_class_is_left_on_cuda(emulated, case):
    assert_masked_rows_match(case, "cpu", *rows_of_no_class(1203))


def test_a_teacher_that_is_sure_costs_what_the_label_alone_does(each_backend):
    """KD from log(one_hot(label)) is the cross-entropy, whether or not the loss knows the label."""
    student, _, target = make_logits(4, 100, torch.float32, each_backend)
    teacher = torch.nn.functional.one_hot(target, 100).float().log()
    expected = torch.nn.functional.cross_entropy(student, target, reduction="none")
    alone = fastkd.kd_loss(student, teacher, temperature=1.0, reduction="none")
    torch.testing.assert_close(alone, expected)
    decoupled = fastkd.dkd_loss(student, teacher, target, temperature=1.0, beta=0.0, reduction="none")
    torch.testing.assert_close(decoupled, expected)
