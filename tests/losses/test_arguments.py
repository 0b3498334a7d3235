"""Bad input: an error that names the argument, its value and what is expected, before anything runs."""

import os
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastkd
from fastkd.ops import native
from fastkd.ops.backend import get_backend
from fastkd.ops.triton import runtime
from tests.cases import make_logits

S, T, Y = make_logits(4, 6)
INT = torch.zeros(4, 6, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: fastkd.kd_loss(S, T.to("meta")), ValueError, "on cpu and teacher_logits on meta"),
        (lambda: fastkd.kd_loss(INT, T), TypeError, "student_logits has dtype torch.int64"),
        (lambda: fastkd.kd_loss(S, T.tolist()), TypeError, "teacher_logits is a list"),
        (lambda: fastkd.kd_loss([S], [T, T]), ValueError, "1 tensors and teacher_logits 2"),
        (lambda: fastkd.kd_loss([S, S[:3]], [T, T[:3]]), ValueError, r"student_logits\[1\] is .* \[3, 6\]"),
        (lambda: fastkd.kd_loss([S, S], [T, T.half()]), ValueError, r"teacher_logits\[1\] is torch.float16"),
        (lambda: fastkd.kd_loss([S, INT], [T, T]), TypeError, r"student_logits\[1\] has dtype torch.int64"),
        (lambda: fastkd.kd_loss(S.tolist(), T.tolist()), TypeError, r"student_logits\[0\] is a list"),
        (lambda: fastkd.kd_loss(S, T, temperature=torch.tensor(4.0)), TypeError, "temperature is a tensor"),
        (lambda: fastkd.kd_loss(S, T, temperature="4"), TypeError, "temperature is '4'"),
        (lambda: fastkd.kd_loss(S, T, reduction="avg"), ValueError, "reduction is 'avg'"),
        (lambda: fastkd.kd_loss(S, T, target=Y[:3]), ValueError, r"target has shape \[3\]; expected \[4\]"),
        (lambda: fastkd.dkd_loss(S, T, None), TypeError, "target is None"),
        (lambda: fastkd.dkd_loss(S, T, Y.int()), TypeError, "target has dtype torch.int32"),
        (lambda: fastkd.dkd_loss(S, T, Y.to("meta")), ValueError, "target is on meta"),
        (lambda: fastkd.dkd_loss(S, T, Y + 6), ValueError, r"target has the label \d+; expected 0 to 5"),
        (lambda: fastkd.dkd_loss(S, T, Y - 7), ValueError, "target has the label -"),
        (lambda: fastkd.dkd_loss(S, T, Y, alpha=float("nan")), ValueError, "alpha is nan"),
        (lambda: fastkd.kd_loss(S, T, weight=[1.0] * 4), TypeError, "weight is a list"),
        (
            lambda: fastkd.kd_loss(S, T, weight=torch.ones(3)),
            ValueError,
            r"weight has shape \[3\]; expected \[4\]",
        ),
        (lambda: fastkd.kd_loss(S, T, weight=Y), TypeError, "weight has dtype torch.int64"),
        (
            lambda: fastkd.kd_loss(S, T, weight=torch.ones(4, requires_grad=True)),
            ValueError,
            "weight requires grad",
        ),
        (lambda: fastkd.nkd_loss(S, T, Y, gamma="1"), TypeError, "gamma is '1'"),
        (lambda: fastkd.set_backend("cuda"), ValueError, "backend is 'cuda'"),
        (lambda: fastkd.KDLoss(temperature=0), ValueError, "temperature is 0"),
        (lambda: fastkd.DKDLoss(beta=float("inf")), ValueError, "beta is inf"),
        (lambda: fastkd.BinaryKLNormLoss(reduction="mean"), ValueError, "weaker by the number of classes"),
    ],
)
def test_message_names_what_is_wrong(call, kind, message):
    """Beside the lines of docs/bad-inputs.md, which are tried on every backend."""
    with pytest.raises(kind, match=message):
        call()


def test_backend_asked_for_by_name_never_falls_back():
    with fastkd.use_backend("native"), pytest.raises(fastkd.BackendUnavailable, match=r"not torch\.float64"):
        fastkd.kd_loss(S.double(), T.double())
    with fastkd.use_backend("native"), pytest.raises(fastkd.BackendUnavailable, match="meta"):
        fastkd.kd_loss(S.to("meta"), T.to("meta"))


def test_integers_of_numpy():
    target = torch.tensor([0, -1, 2, 3])
    ours = fastkd.dkd_loss(S, T, target, ignore_index=np.int64(-1))
    torch.testing.assert_close(ours, fastkd.dkd_loss(S, T, target, ignore_index=-1))
    assert torch.equal(fastkd.top_k(T, np.int32(3)).indices, fastkd.top_k(T, 3).indices)
    with pytest.raises(TypeError, match="expected an integer"):
        fastkd.dkd_loss(S, T, Y, ignore_index=np.True_)


def test_float64_goes_to_the_reference():
    assert fastkd.kd_loss(S.double(), T.double()).dtype == torch.float64


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=300,
    )


def test_environment_chooses_the_backend():
    code = "import fastkd; print(fastkd.get_backend())"
    assert run_python(code, FASTKD_BACKEND="eager").stdout.strip() == "eager"
    refused = run_python(code, FASTKD_BACKEND="fast")
    assert refused.returncode != 0
    assert "FASTKD_BACKEND is 'fast'; expected one of auto" in refused.stderr


def test_triton_on_the_cpu_without_its_interpreter_names_the_variable():
    code = (
        "import triton, torch, fastkd; fastkd.set_backend('triton'); "
        "fastkd.kd_loss(torch.randn(2, 3), torch.randn(2, 3))"
    )
    refused = run_python(code, TRITON_INTERPRET="0", CUDA_VISIBLE_DEVICES="")
    assert "BackendUnavailable" in refused.stderr
    assert "TRITON_INTERPRET=1" in refused.stderr


@pytest.mark.parametrize(
    ("triton", "numpy", "runs"),
    [
        ("3.6.0", "2.3.5", True), ("3.6.0", "2.4.0", False), ("3.6.0+rocm7", "2.5.2", False),
        ("3.7.1", "2.5.2", True), ("4.0.0", "3.0.0", True), ("3.6.0", "", True), ("", "2.5.2", True),
    ],
)  # fmt: skip
def test_numpy_that_the_interpreter_of_this_triton_cannot_take(triton, numpy, runs):
    reason = runtime.numpy_too_new(triton, numpy)
    assert runs == (reason is None)
    assert runs or f"Triton {triton} needs NumPy < 2.4, not {numpy}" in reason


def test_missing_native_backend_warns_once_and_falls_back():
    code = """
import torch, warnings
from fastkd.ops import native
native.library_path = lambda: None
import fastkd
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        assert torch.isfinite(fastkd.kd_loss(torch.randn(2, 3), torch.randn(2, 3)))
ours = [str(w.message) for w in caught if "fastkd" in str(w.message)]
assert len(ours) == 1, ours
print(ours[0])
from fastkd import doctor
print(doctor.report())
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert "eager backend on cpu, because native is not available" in done.stdout
    assert "native  no: its extension is not built" in done.stdout


def test_doctor_names_what_runs():
    from fastkd import doctor

    report = doctor.report()
    for expected in (fastkd.__version__, torch.__version__.split("+")[0], "native  runs", "auto takes"):
        assert expected in report


@given(
    rows=st.integers(0, 5),
    classes=st.integers(2, 70),
    scale=st.floats(1e-4, 1e4),
    temperature=st.floats(0.05, 50),
    seed=st.integers(0, 2**31),
)
def test_native_kd_over_wide_inputs(rows, classes, scale, temperature, seed):
    """Loss never negative beyond rounding, gradient finite, rows of the gradient summing to 0."""
    generator = torch.Generator().manual_seed(seed)
    student = (scale * torch.randn(rows, classes, generator=generator)).requires_grad_()
    teacher = scale * torch.randn(rows, classes, generator=generator)
    with fastkd.use_backend("native"):
        loss = fastkd.kd_loss(student, teacher, temperature=temperature, reduction="none")
    loss.sum().backward()
    size = temperature * max(scale, temperature)
    assert (loss >= -1e-5 * size).all()
    assert torch.isfinite(student.grad).all()
    assert (student.grad.sum(1).abs() <= 1e-4 * temperature).all()


LABELS = st.one_of(st.integers(-2, 6), st.sampled_from([-100, 2**31, 2**62, -(2**63)]))


@given(labels=st.lists(LABELS, max_size=9), ignore_index=st.sampled_from([-100, 2, 7]), spread=st.booleans())
def test_label_check(labels, ignore_index, spread):
    """For any labels, dense in memory or not; True if none is ignored."""
    target = torch.tensor(labels, dtype=torch.int64)
    target = target.repeat_interleave(2)[::2] if spread else target
    if all(0 <= label < 6 or label == ignore_index for label in labels):
        assert fastkd.check_labels(target, 6, ignore_index) == (ignore_index not in labels)
    else:
        with pytest.raises(ValueError, match="target has the label"):
            fastkd.check_labels(target, 6, ignore_index)


def test_label_check_of_another_dtype():
    labels = torch.tensor([0, 5, 3], dtype=torch.int32)
    assert not native.labels_all_valid(labels, 6, -100)  # must not be read as int64
    assert fastkd.check_labels(labels, 6)
    with pytest.raises(ValueError, match="target has the label 5"):
        fastkd.check_labels(labels, 5)


@pytest.mark.parametrize("target", [[0, 1], torch.rand(3), torch.rand(3, 6), torch.ones(3, dtype=torch.bool)])
def test_label_check_of_what_are_no_labels(target):
    with pytest.raises(TypeError, match=r"expected (an )?int64"):
        fastkd.check_labels(target, 6)


def test_rows_of_weight_0_may_have_any_label(each_backend):
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 6, device=each_backend), torch.randn(4, 6, device=each_backend)
    target = torch.tensor([0, 1, 2, 3], device=each_backend)
    weight = torch.tensor([1.0, 2.0, 1.0, 0.0], device=each_backend)
    expected = fastkd.dkd_loss(student, teacher, target, weight=weight)
    for label in (99, -1, 2**40):
        target[3] = label
        assert torch.equal(fastkd.dkd_loss(student, teacher, target, weight=weight), expected)
        assert fastkd.check_labels(target, 6, weight=weight)
        with pytest.raises(ValueError, match=f"target has the label {label}"):
            fastkd.check_labels(target, 6)


@pytest.mark.parametrize("number", [np.int8(20), np.float16(300), np.uint8(16), Fraction(3, 2)], ids=repr)
def test_numbers_of_other_types(each_backend, number):
    """Their squares do not fit into their own types."""
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 6, device=each_backend), torch.randn(4, 6, device=each_backend)
    target = torch.tensor([0, 1, 2, 3], device=each_backend)
    for call in (
        lambda t: fastkd.kd_loss(student, teacher, temperature=t),
        lambda t: fastkd.jsd_loss(student, teacher, beta=0.0, temperature=t),
        lambda t: fastkd.skew_kl_loss(student, teacher, skew=0.0, temperature=t),
        lambda t: fastkd.dkd_loss(student, teacher, target, alpha=t, beta=t, temperature=4.0),
    ):
        assert torch.equal(call(number), call(float(number)))


def test_constants_made_in_inference_mode(each_backend):
    torch.manual_seed(0)
    student = torch.randn(4, 6, device=each_backend, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(4, 6, device=each_backend)

    def losses(constants):
        soft, target, weight, known = constants
        for logits in (student, student.float()) if get_backend() == "eager" else (student.float(),):
            yield fastkd.distill_loss(logits, teacher, soft, ce_weight=0.1, kd_weight=0.9, weight=weight)[0]
            yield fastkd.dkd_loss(logits, teacher.to(logits.dtype), target, weight=weight)
            yield fastkd.kd_loss(logits, known, temperature=4.0)

    def constants():
        soft, weight = teacher.softmax(-1), torch.ones(4, device=each_backend)
        return soft, teacher.argmax(-1), weight, fastkd.top_k(teacher, 3, temperature=4.0)

    with torch.inference_mode():
        inferred = constants()
    for loss, expected in zip(losses(inferred), losses(constants()), strict=True):
        assert torch.equal(loss, expected)
        (gradient,) = torch.autograd.grad(loss, student)
        assert torch.equal(gradient, torch.autograd.grad(expected, student)[0])


def test_probabilities_and_a_list_of_mixed_forms():
    layer = fastkd.LinearLogits(torch.randn(4, 3), torch.randn(6, 3))
    teacher = torch.randn(4, 6)
    with pytest.raises(TypeError, match="as many numbers as LinearLogits"):
        fastkd.distill_loss([teacher, layer], [teacher, teacher], teacher.softmax(-1), ce_weight=0.1)
