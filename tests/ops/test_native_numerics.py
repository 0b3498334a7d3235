"""Numerics of the native kernels: offsets, constant rows, NaN, and errors compared with eager torch.

Everything runs on the CPU kernels of each instruction set and on the emulated CUDA kernels.
"""

import os
import subprocess
import sys

import pytest
import torch

import fastkd
from fastkd.ops import native
from tests.cases import BY_NAME, CASES, exact, loss_and_gradient, make_logits
from tests.conftest import LOWER_INSTRUCTION_SETS
from tests.cuda_emulation import Emulation
from tests.ops.test_native_build import ROOT

CHECKS = []


def check(function):
    """Register a check, which runs in this process and in one per lower instruction set."""
    CHECKS.append(function)
    return function


def errors(case, student, teacher, target):
    """Each row's error of loss and gradient against float64, for the native backend and for eager."""
    true_loss, true_gradient = exact(case, student, teacher, target, reduction="none")
    found = []
    for backend in ("native", "eager"):
        with fastkd.use_backend(backend):
            loss, gradient = loss_and_gradient(case, student, teacher, target, reduction="none")
        found.append(((loss.double() - true_loss).abs(), (gradient.double() - true_gradient).norm(dim=1)))
    return *found, true_loss.abs(), true_gradient.norm(dim=1)


def rms(values):
    return values.square().mean().sqrt().item()


def assert_no_worse_than_eager(case, student, teacher, target):
    """The error's root mean square over the rows is within three times eager's (two with AVX-512), or within
    the rounding of the result, or of the terms that it is a difference of: those of logits about 1 apart.

    A single row may exceed it, since eager's error there may be 0 by chance.
    """
    ours, eager, *size = errors(case, student, teacher, target)
    unit = loss_and_gradient(case, *APART, reduction="none")
    for kind in (0, 1):
        allowed = max(3 * rms(eager[kind]), 4e-7 * rms(size[kind]), 2e-7 * unit[kind].norm().item())
        assert rms(ours[kind]) <= allowed, (case.name, ("loss", "gradient")[kind])


# Logits that differ by 2: a loss of about 1 / T^2 times its weights.
APART = (torch.tensor([[1.0, -1.0, 0.0]]), torch.tensor([[-1.0, 1.0, 0.0]]), torch.tensor([0]))


@check
def a_common_offset_costs_no_accuracy(classes):
    """s = t + 0.03 randn + 1000: with sums of e^v (v - u), single rows had errors of up to 74 %."""
    for name in ("kd", "kd-t1", "lskd", "dkd", "tckd", "ce-kd-t1", "nkd", "wttm", "reverse-kl", "jsd"):
        teacher = torch.randn(8, classes)
        for offset in (1e3, -1e4):
            student = teacher + 0.03 * torch.randn_like(teacher) + offset
            target = torch.randint(0, classes, (8,))
            assert_no_worse_than_eager(BY_NAME[name], student, teacher, target)
            assert_no_worse_than_eager(BY_NAME[name], student - offset, teacher + offset, target)


@check
def standardisation_does_not_depend_on_the_first_logits(classes):
    """Mean and deviation are summed relative to the mean of the first logits, from which these are far."""
    for name in ("lskd", "ls-dkd", "ce-lskd"):
        student, teacher, target = make_logits(8, classes)
        for first in (5, 16, 40):
            moved = [logits.clone() for logits in (student, teacher)]
            for logits in moved:
                logits[:, : min(first, classes // 2)] += 300
            assert_no_worse_than_eager(BY_NAME[name], *moved, target)


@check
def losses_are_no_worse_than_eager(classes):
    for case in CASES:
        for spread in (0.1, 3.0, 30.0):
            student, teacher = (spread * torch.randn(12, classes) for _ in range(2))
            target = torch.randint(0, classes, (12,))
            if spread < 30 or case.name not in ("reverse-kl", "jsd", "jsd-0.1"):  # gradients of 1e-20 there
                assert_no_worse_than_eager(case, student, teacher, target)
        for distance in (1e-1, 1e-3):
            student = 2 * torch.randn(24, classes)
            teacher = student + distance * torch.randn_like(student)
            assert_no_worse_than_eager(case, student, teacher, torch.randint(0, classes, (24,)))


@check
def sums_of_equal_addends_do_not_round_one_way(classes):
    """Logits of two values: each addition of the same number to a sum rounds in the same direction."""
    for case in CASES:
        student, teacher = (1e4 * torch.randn(8, classes).sign() for _ in range(2))
        assert_no_worse_than_eager(case, student, teacher, torch.randint(0, classes, (8,)))


@check
def a_constant_row_is_uniform_when_standardised(classes):
    """The rounding error of the mean exceeds 1e-7, the divisor of a constant row."""
    for name in ("lskd", "ls-dkd", "ce-lskd"):
        for constant in (7.3, 0.1, -1234.5):
            for student, teacher in (
                (torch.full((2, classes), constant), torch.randn(2, classes)),
                (torch.randn(2, classes), torch.full((2, classes), constant)),
            ):
                target = torch.tensor([0, classes - 1])
                loss, gradient = loss_and_gradient(BY_NAME[name], student, teacher, target, reduction="none")
                true_loss, _ = exact(BY_NAME[name], student, teacher, target, reduction="none")
                torch.testing.assert_close(loss.double(), true_loss, rtol=1e-5, atol=1e-5)
                assert torch.isfinite(gradient).all()
    for temperature in (1e-6, 0.003, 0.02):
        student = torch.full((2, classes), 7.3).requires_grad_()
        loss = fastkd.kd_loss(
            student, torch.full((2, classes), -3.1), temperature=temperature, standardize=True
        )
        loss.backward()
        assert abs(loss.item()) < 1e-12
        assert student.grad.count_nonzero() == 0


@check
def a_standardised_row_far_from_zero(classes):
    for name in ("lskd", "ls-dkd", "ce-lskd"):
        student, teacher = (torch.randn(8, classes) + 1e4 for _ in range(2))
        assert_no_worse_than_eager(BY_NAME[name], student, teacher, torch.randint(0, classes, (8,)))


@check
def nan_in_is_nan_out_in_that_row_alone(classes):
    target = torch.tensor([1, classes - 1, 0, 2])
    for case in CASES:
        student, teacher = torch.randn(4, classes), torch.randn(4, classes)
        clean = loss_and_gradient(case, student, teacher, target, reduction="none")
        for place in (0, 5, classes // 2, classes - 1):
            for poisoned in ("student", "teacher"):
                if not case.reads_teacher and poisoned == "teacher":
                    continue
                s, t = student.clone(), teacher.clone()
                (s if poisoned == "student" else t)[1, place] = torch.nan
                loss, gradient = loss_and_gradient(case, s, t, target, reduction="none")
                where = (case.name, poisoned, place)
                assert torch.isnan(loss[1]), where
                hit = gradient[1, place] if case.family == "pointwise" else gradient[1]
                assert torch.isnan(hit).all(), where
                others = [0, 2, 3]
                assert torch.equal(loss[others], clean[0][others]), where
                assert torch.equal(gradient[others], clean[1][others]), where


@check
def a_nan_of_any_bits_stays_one(classes):
    """Of 32 ones, as of memory that is all ones: rounded to bfloat16 like a number, they carry over to 0."""
    for dtype in (torch.bfloat16, torch.float16):
        student, teacher = torch.randn(3, classes).to(dtype), torch.randn(3, classes)
        teacher.view(torch.int32)[1, 2] = -1
        for name in ("kd", "jsd", "binary-kl"):
            _, gradient = loss_and_gradient(BY_NAME[name], student, teacher, None, reduction="none")
            assert gradient[1, 2].isnan(), (name, dtype)


@check
def an_unread_teacher_may_be_nan(classes):
    student, target = torch.randn(3, classes), torch.tensor([0, 1, classes - 1])
    teacher = torch.full((3, classes), torch.nan)
    loss, gradient = loss_and_gradient(BY_NAME["ce"], student, teacher, target)
    clean = loss_and_gradient(BY_NAME["ce"], student, torch.zeros(3, classes), target)
    assert torch.equal(loss, clean[0])
    assert torch.equal(gradient, clean[1])


@check
def infinite_logits_give_no_finite_loss(classes):
    target = torch.tensor([0, 1, 2])
    for case in CASES:
        if case.family == "pointwise":
            continue
        for place in (1, 7, classes - 1):
            student, teacher = torch.randn(3, classes), torch.randn(3, classes)
            student[1, place] = torch.inf
            # Also at the label, where a cross-entropy of 0 would hide it.
            loss = case.loss(student, teacher, target, reduction="none")
            assert not torch.isfinite(loss[1]), case.name
            assert torch.isfinite(loss[[0, 2]]).all()


@check
def rows_of_weight_zero_may_hold_anything(classes):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for case in CASES:
            student, teacher = torch.randn(3, classes).to(dtype), torch.randn(3, classes).to(dtype)
            student[1], teacher[1, ::2] = torch.nan, torch.inf
            weight, target = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0, 1, 2])
            loss, gradient = loss_and_gradient(
                case, student, teacher, target, reduction="none", weight=weight
            )
            assert loss[1] == 0, case.name
            assert gradient[1].count_nonzero() == 0, case.name
            assert torch.isfinite(gradient).all()
            assert torch.isfinite(loss).all()


@pytest.mark.parametrize("function", CHECKS, ids=lambda function: function.__name__)
@pytest.mark.parametrize("kernels", ["cpu", "cuda emulation"])
def test_here(kernels, function, request, monkeypatch):
    if kernels != "cpu":
        emulation = Emulation(request.getfixturevalue("emulated_library"))
        monkeypatch.setattr(native, "row_loss", emulation.row_loss)
        monkeypatch.setattr(native, "scale_rows_", emulation.scale_rows_)
    with fastkd.use_backend("native"):
        for classes in (10, 1037) if kernels == "cpu" else (10, 300):
            function(classes)


@pytest.mark.parametrize("instruction_set", LOWER_INSTRUCTION_SETS)
def test_every_lower_instruction_set(instruction_set):
    code = """
import torch, fastkd
from tests.ops.test_native_numerics import CHECKS
fastkd.set_backend("native")
for function in CHECKS:
    for classes in (10, 1037):
        torch.manual_seed(0)
        function(classes)
"""
    environment = {**os.environ, "FASTKD_ISA": instruction_set}
    if instruction_set == "portable":  # beside eager torch's sums in 4 lanes: those in 16 are more exact
        environment["ATEN_CPU_CAPABILITY"] = "default"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stderr
