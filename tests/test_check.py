"""``fastkd check`` passes with the kernels as they are and fails with a wrong one."""

import os
import subprocess
import sys

import pytest
import torch

import fastkd
from fastkd import check, losses
from fastkd.ops import native

NATIVE = [("native", "cpu"), ("eager", "cpu")]


def test_every_loss_is_checked():
    checked = {name.split(",")[0].removesuffix(" of top_k") for name in check.LOSSES}
    assert checked == {name for name in losses.__all__ if name.endswith("_loss")}


def test_green_as_a_user_runs_it():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "fastkd.check"], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith("not checked: triton on cpu") for line in lines)
    assert sum(line.startswith("pass") for line in lines) >= 2 * len(check.LOSSES)
    assert "0 failed" in lines[-1]


def test_green_on_each_fused_backend(fused):
    name = fastkd.get_backend()
    (verdict,) = [v for v in check.check(["binary_kl_norm_loss"]) if v.where == (name, fused)]
    assert str(verdict).startswith("pass"), verdict


def broken(change):
    """Return a launcher of the native backend whose results ``change(rows, gradient)`` modifies."""
    launch = native.row_loss

    def row_loss(students, teachers, call, outputs):
        launch(students, teachers, call, outputs)
        rows, gradient = outputs.rows, outputs.gradient
        change(rows, rows.new_empty(1, 2) if gradient is None else gradient)

    return row_loss


def scale_one_row(rows, gradient):
    gradient[-1].mul_(1.001)


def forget_one_column(rows, gradient):
    gradient[:, gradient.shape[1] // 2] = 0


# And what is said of each.
BREAKAGES = {
    # Plain torch may err so much.
    "gradient scaled by 1.0001": (
        lambda rows, gradient: gradient.mul_(1.0001),
        "gradient error 1.0e-04 > 5e-05 at float32 4 x 10, random",
    ),
    "gradient scaled by 1.001": (lambda rows, gradient: gradient.mul_(1.001), "gradient error 1.0e-03"),
    "one row's gradient scaled": (scale_one_row, "gradient error"),
    "a class not written": (forget_one_column, "gradient error"),
    "loss off by 1e-3": (lambda rows, gradient: rows.mul_(1.001), "loss error 1.0e-03"),
    "a NaN": (lambda rows, gradient: gradient[0, :1].fill_(torch.nan), "gradient error inf"),
    "not 0 at equal logits": (
        lambda rows, gradient: gradient.add_(1e-9),
        "gradient not exactly 0 at float32",
    ),
}


@pytest.fixture
def eager_alone(monkeypatch):
    monkeypatch.setattr(check, "here", lambda: ([("eager", "cpu")], {}))


def test_eager_passes_with_scale_offset_and_strides(eager_alone):
    for verdict in check.check():
        assert not verdict.failures, verdict


def wrong_losses():
    """Return versions of kd_loss with a fault that only one of the conditions of training reveals."""

    def scaled_after_rounding(student, teacher, target, **options):
        class Rounded(torch.autograd.Function):
            @staticmethod
            def forward(ctx, logits):
                with torch.enable_grad():
                    leaf = logits.detach().float().requires_grad_()
                    loss = fastkd.kd_loss(leaf, teacher.float(), **options)
                    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
                ctx.save_for_backward(gradient.to(logits.dtype))
                return loss.detach()

            @staticmethod
            def backward(ctx, grad_output):
                (gradient,) = ctx.saved_tensors
                return gradient * grad_output[:, None].to(gradient.dtype)

        return (
            Rounded.apply(student)
            if student.dtype == torch.float16
            else fastkd.kd_loss(student, teacher, **options)
        )

    def offset_seen(student, teacher, target, **options):
        loss = fastkd.kd_loss(student, teacher, **options)
        return loss * (1 + 1e-6 * (teacher - student).mean(-1).detach().abs())

    def offset_breaks(student, teacher, target, **options):
        loss = fastkd.kd_loss(student, teacher, **options)
        return torch.where((teacher - student).mean(-1) > 500, torch.nan, loss)

    def strides_ignored(student, teacher, target, *, weight=None, **options):
        if weight is not None:
            weight = weight.as_strided(weight.shape, (1,)).clone()
        return fastkd.kd_loss(student, teacher, weight=weight, **options)

    return {
        "loss scale": scaled_after_rounding,
        "of the gradient lost as 0": scaled_after_rounding,
        "logits 1000 higher": offset_seen,
        "loss off by nan": offset_breaks,
        "row weights": strides_ignored,
    }


@pytest.mark.parametrize("condition", wrong_losses())
def test_red_on_a_fault_that_only_training_reveals(condition, monkeypatch):
    """Eager has the same bounds; a faulty copy of a loss replaces a faulty kernel."""
    fault = wrong_losses()[condition]

    def loss(student, teacher, target, **options):
        faulty = fault if fastkd.get_backend() == "native" else lambda s, t, y, **o: fastkd.kd_loss(s, t, **o)
        with fastkd.use_backend("eager"):
            return faulty(student, teacher, target, **options)

    monkeypatch.setattr(check, "here", lambda: (NATIVE, {}))
    monkeypatch.setitem(check.LOSSES, "kd_loss", loss)
    native_verdict, eager_verdict = check.check(["kd_loss"])
    assert not eager_verdict.failures
    assert any(condition in failure for failure in native_verdict.failures), native_verdict.failures


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_red_on_a_broken_kernel(breakage, monkeypatch, capsys):
    change, failure = BREAKAGES[breakage]
    monkeypatch.setattr(native, "row_loss", broken(change))
    monkeypatch.setattr(check, "here", lambda: (NATIVE, {}))
    assert check.main(["--losses", "reverse_kl_loss"]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("FAIL  reverse_kl_loss")
    assert f"; {failure}" in said[0]
    assert said[1].startswith("pass  reverse_kl_loss")  # the eager backend is sound
    assert "1 passed, 1 failed" in said[-1]


def test_red_on_a_kernel_that_does_not_run(monkeypatch):
    def row_loss(*_, **__):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(native, "row_loss", row_loss)
    monkeypatch.setattr(check, "here", lambda: (NATIVE, {}))
    native_verdict, eager_verdict = check.check(["kd_loss"])
    assert str(native_verdict).startswith("FAIL")
    assert "no kernel image" in str(native_verdict)
    assert not eager_verdict.failures


def test_the_current_backend_is_restored(monkeypatch):
    monkeypatch.setattr(check, "here", lambda: (NATIVE, {}))
    with fastkd.use_backend("eager"):
        list(check.check(["binary_kl_norm_loss"]))
        assert fastkd.get_backend() == "eager"
