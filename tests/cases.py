"""The losses under test, with a common signature, and the comparison of results."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd.losses.cases import call_of, takes_target
from fastkd.ops import spec
from fastkd.ops.spec import Needs


@dataclass(frozen=True)
class Case:
    name: str
    loss: Callable[..., Tensor]  # (student, teacher, target, reduction=...) -> loss
    uses_label: bool = False
    ignores_rows: bool = True
    vanishes: bool = True  # no gradient at equal logits
    family: str = "softmax"
    needs: Needs = Needs.DISTILLS

    @property
    def reads_teacher(self) -> bool:
        return bool(self.needs & Needs.DISTILLS)

    @property
    def averages_classes(self) -> bool:
        """Whether it averages over all classes, and so is undefined with masked ones."""
        return bool(self.needs & (Needs.STANDARDIZED | Needs.LABEL_SMOOTHING))


def _from_spec(loss: spec.Loss, case: spec.Case) -> Case:
    return Case(
        case.name,
        call_of(case, ignores_rows=True),
        uses_label=case.labelled,
        ignores_rows=takes_target(case),
        vanishes=case.vanishes,
        family=loss.family,
        needs=loss.needs(case.options),
    )


CASES = [_from_spec(loss, case) for loss, case in spec.CASES.values()]
BY_NAME = {case.name: case for case in CASES}
# Cases whose kernels differ, for tests of what no formula decides: layouts, tiles, rows that are not read.
KERNELS = [*spec.distinct_cases(), "dckd", "wttm"]

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
each_kernel = pytest.mark.parametrize("case", [BY_NAME[name] for name in KERNELS], ids=lambda case: case.name)

# Relative to the norm of the reference. float32: rounding of the sums; half types: rounding of the gradient
# itself (Triton's interpreter truncates to bfloat16: an error of up to one unit in the last place).
LOSS_ERROR = 1e-5
GRADIENT_ERROR = {torch.float32: 1e-5, torch.bfloat16: 2**-6.5, torch.float16: 2e-3}


def make_logits(rows: int, classes: int, dtype=torch.float32, device="cpu", spread: float = 3.0):
    """Random student and teacher logits and labels."""
    student, teacher = ((spread * torch.randn(rows, classes)).to(dtype).to(device) for _ in range(2))
    return student, teacher, torch.randint(0, classes, (rows,), device=device)


def loss_and_gradient(case: Case, student, teacher, target, grad_output=None, **options):
    """Return the loss and the student's gradient under a (random) grad_output."""
    student = student.detach().requires_grad_()
    loss = case.loss(student, teacher, target, **options)
    loss.backward(torch.ones_like(loss) if grad_output is None else grad_output)
    return loss.detach(), student.grad


def exact(case: Case, student, teacher, target, grad_output=None, **options):
    """Return loss and gradient of the float64 reference for the same logits."""
    grad_output = None if grad_output is None else grad_output.double()
    with fastkd.use_backend("eager"):
        return loss_and_gradient(case, student.double(), teacher.double(), target, grad_output, **options)


def error(value: Tensor, reference: Tensor, floor: float = 0.0) -> float:
    """Return the norm of the difference relative to the reference's norm, or to ``floor`` if larger."""
    difference = (value.double() - reference).norm().item()
    assert torch.isfinite(value).all(), "not finite"
    scale = max(reference.norm().item(), floor)
    return difference / scale if scale else difference


def assert_matches(case: Case, student, teacher, target, grad_output=None, floor: float = 1e-2, **options):
    loss, gradient = loss_and_gradient(case, student, teacher, target, grad_output, **options)
    true_loss, true_gradient = exact(case, student, teacher, target, grad_output, **options)
    assert gradient.dtype == student.dtype
    assert gradient.shape == student.shape
    assert error(loss, true_loss, floor) < LOSS_ERROR
    assert error(gradient, true_gradient, floor) < GRADIENT_ERROR[student.dtype]


def assert_saturated_logits_stay_finite(case: Case, dtype: torch.dtype, device="cpu"):
    student, teacher, target = make_logits(4, 33, dtype, device)
    for size in (100.0, 3e4, torch.finfo(dtype).max):
        if size > 1e18 and case.needs & (Needs.STANDARDIZED | Needs.LOG_RATIO):
            continue  # the variance of such rows overflows; the gradient of reverse KL grows with the logits
        large_student, large_teacher = student.sign() * size, teacher.sign() * size
        _, gradient = loss_and_gradient(case, large_student, large_teacher, target, reduction="none")
        assert torch.isfinite(gradient).all()
        if not case.needs & Needs.STANDARDIZED and size < 1e5:
            assert_matches(case, large_student, large_teacher, target, reduction="none")


def assert_near_equal_gradient_is_no_worse_than_eager(case: Case, rows: int, factor: float, device="cpu"):
    student, _, target = make_logits(rows, 1000, torch.float32, device)
    teacher = student + 1e-3 * torch.randn_like(student)
    _, gradient = loss_and_gradient(case, student, teacher, target)
    _, true_gradient = exact(case, student, teacher, target)
    with fastkd.use_backend("eager"):
        _, eager_gradient = loss_and_gradient(case, student, teacher, target)
    assert error(gradient, true_gradient) <= factor * error(eager_gradient, true_gradient) + 1e-7
