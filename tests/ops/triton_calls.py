"""Calls of the Triton launcher for its tests, and their truth: ``fastkd.reference`` in float64."""

import math

import pytest
import torch

from fastkd.ops.call import Call, Outputs
from fastkd.ops.spec import CASES
from fastkd.ops.spec import LOSSES as SPEC
from fastkd.ops.triton import launch
from tests.cases import KERNELS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# By case name: loss, options, whether it takes a label.
LOSSES = {
    name: (loss.name, tuple(map(float, case.options)), case.labelled) for name, (loss, case) in CASES.items()
}
SOFTMAX = {name for name, loss in SPEC.items() if loss.family == "softmax"}
POINTWISE = tuple(name for name, (loss, _) in CASES.items() if loss.family == "pointwise")
each_loss = pytest.mark.parametrize("name", LOSSES)
each_kernel = pytest.mark.parametrize("name", KERNELS)
# (rows, classes): several rows per program; one tile; split over programs (one launch per phase).
PATHS = [(6, 10), (3, 700), (2, 9000)]


def run(students, teachers, target, weight, scale, loss, options, rows, gradient, dynamic=None, marks=None):
    call = Call(
        target, weight, 1 / scale, loss, options, dynamic, "triton", False, False, gradient is not None,
        marks=marks,
    )  # fmt: skip
    launch.row_loss(students, teachers, call, Outputs(rows, None, gradient))


def kernel(name, student, teacher, target, weight=None, scale=1.0, dynamic=False, marks=None):
    """Losses [N] and gradient [N, C] from the kernels."""
    loss, options, labelled = LOSSES[name]
    classes = student.shape[-1]
    count = student.numel() // classes
    values = None
    if dynamic:
        values = torch.tensor(options, device=DEVICE)
        options = tuple(value if value in (0.0, 1.0) else math.nan for value in options)
    rows = torch.full((count,), math.nan, device=DEVICE)
    gradient = torch.full((count, classes), math.nan, device=DEVICE, dtype=student.dtype)
    label = target if labelled else None
    run([student], [teacher], label, weight, scale, loss, options, rows, gradient, values, marks)
    return rows, gradient


def reference_in(dtype, name, student, teacher, target):
    """Losses and gradient of the reference in ``dtype``."""
    loss, options, _ = LOSSES[name]
    classes = student.shape[-1]
    student = student.reshape(-1, classes).to(dtype).requires_grad_()
    teacher = teacher.reshape(-1, classes).to(dtype)
    rows, _ = SPEC[loss].rows(student, teacher, target, *options)
    (gradient,) = torch.autograd.grad(rows.sum(), student)
    return rows.detach().double(), gradient.double()


def logits(*shape, spread=3.0):
    return spread * torch.randn(*shape, device=DEVICE)


def labels(rows, classes):
    return torch.randint(0, classes, (rows,), device=DEVICE)


def assert_close(found, expected, loss_error=1e-5, gradient_error=1e-5):
    (rows, gradient), (true_rows, true_gradient) = found, expected
    assert (rows - true_rows).norm() <= loss_error * true_rows.norm()
    assert (gradient - true_gradient).norm() <= gradient_error * true_gradient.norm()
