"""Cancellation, overflow, NaN and infinity in float32: compared with float64, and with eager torch."""

from functools import partial

import pytest
import torch

import fastkd
from fastkd.ops.spec import Needs
from tests.cases import (
    BY_NAME,
    CASES,
    Case,
    each_case,
    each_kernel,
    error,
    exact,
    loss_and_gradient,
    make_logits,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def errors(case, student, teacher, target, grad_output):
    """Errors of the rows' losses and gradients [N] against float64: of the current backend, and of eager."""
    true_loss, true_gradient = exact(case, student, teacher, target, grad_output, reduction="none")

    def of_rows():
        loss, gradient = loss_and_gradient(case, student, teacher, target, grad_output, reduction="none")
        return (loss - true_loss).abs(), (gradient - true_gradient).norm(dim=-1)

    ours = of_rows()
    with fastkd.use_backend("eager"):
        eager = of_rows()
    return ours, eager, (true_loss.abs(), true_gradient.norm(dim=-1))


def assert_as_exact(case, student, teacher, target=None, rounding=2e-7):
    """Over the rows of a regime, the largest and the root-mean-square error are close to eager's or smaller.

    The factors allow for the order of sums in a result that cancels: four lanes here, sixteen in torch. Eager
    may be exact by chance, so a rounding of the result is allowed too.
    """
    rows = len(student)
    grad_output = torch.rand(rows, device=student.device) + 0.5
    if target is None:
        target = torch.randint(0, student.shape[1], (rows,), device=student.device)
    ours, eager, truth = errors(case, student, teacher, target, grad_output)
    for what, mine, theirs, size in zip(("loss", "gradient"), ours, eager, truth, strict=True):
        assert mine.isfinite().all(), what
        assert mine.max() <= 4 * theirs.max() + rounding * size.max(), what
        assert mine.norm() <= 3 * theirs.norm() + rounding * size.norm(), what


REGIMES = {
    "spread 0.1": lambda s, t: (0.1 * s, 0.1 * t),
    "spread 30": lambda s, t: (30 * s, 30 * t),
    "near 1e-1": lambda s, t: (3 * s, 3 * s + 1e-1 * t),
    "near 1e-2": lambda s, t: (3 * s, 3 * s + 1e-2 * t),
    "near 1e-4": lambda s, t: (3 * s, 3 * s + 1e-4 * t),
    "offset 1000": lambda s, t: (3 * s + 1000, 3 * t),
    "near, offset 1000": lambda s, t: (3 * s + 1000, 3 * s + 3e-2 * t),
    "both at -1e4": lambda s, t: (3 * s - 1e4, 3 * t - 1e4),
    "logits of 100": lambda s, t: (100 * s, 100 * t),
    "confident": lambda s, t: (confident(s), confident(t)),
}


def confident(logits):
    return torch.cat([3 * logits[:, :1] + 30, 3 * logits[:, 1:]], 1)


@each_case
@pytest.mark.parametrize(
    ("regime", "classes"),
    [
        *((regime, 10) for regime in REGIMES),
        *((regime, 1000) for regime in ("near 1e-2", "near, offset 1000", "logits of 100", "confident")),
    ],
)
def test_as_exact_as_eager(fused, case, regime, classes):
    rows = 24
    student, teacher = REGIMES[regime](torch.randn(rows, classes), torch.randn(rows, classes))
    student, teacher = student.to(fused), teacher.to(fused)
    if regime != "confident":
        return assert_as_exact(case, student, teacher)
    # What is not the sure class comes from exponents near 8, of which GPU kernels round the product by 1 / T.
    target = torch.zeros(rows, dtype=torch.int64, device=fused)
    return assert_as_exact(case, student, teacher, target, rounding=5e-7)


@each_kernel
def test_a_common_offset_of_long_rows(fused, case):
    """Rows of several tiles or parts, whose merge cancels the offset between the models."""
    rows = 4
    student = torch.randn(rows, 20_001, device=fused)
    teacher = student + 0.03 * torch.randn(rows, 20_001, device=fused)
    assert_as_exact(case, student + 1000, teacher)


@pytest.mark.parametrize("name", ["kd", "reverse-kl", "jsd", "dkd"])
def test_a_common_offset_of_a_row_shared_by_threads(name):
    threads = torch.get_num_threads()
    student = torch.randn(1, 150_001)
    teacher = student + 0.03 * torch.randn(1, 150_001)
    try:
        torch.set_num_threads(3)
        with fastkd.use_backend("native"):
            assert_as_exact(BY_NAME[name], student + 1000, teacher)
    finally:
        torch.set_num_threads(threads)


@each_case
def test_the_gradient_at_equal_logits_is_0_whatever_the_offset(fused, case):
    if not case.vanishes:
        pytest.skip("its gradient does not vanish there")
    student, _, target = make_logits(3, 9001, device=fused)
    logits = student + torch.tensor([[0.0], [1000.0], [-1e4]], device=fused)
    _, gradient = loss_and_gradient(case, logits, logits.clone(), target)
    assert gradient.count_nonzero() == 0


each_mixture = pytest.mark.parametrize("name", ["jsd", "skew", "skew, reverse"])
# 1 less the last loses three digits in float32.
each_share = pytest.mark.parametrize("share", [1e-6, 1e-3, 0.5, 0.9, 0.9999])


@each_share
@each_mixture
def test_a_mixture_of_any_shares(fused, name, share):
    assert_mixture_is_as_exact(name, share, fused)


def assert_mixture_is_as_exact(name, share, device="cpu"):
    def loss(student, teacher, target, **more):
        if name == "jsd":
            return fastkd.jsd_loss(student, teacher, beta=share, **more)
        return fastkd.skew_kl_loss(student, teacher, skew=share, reverse="reverse" in name, **more)

    student, teacher = 3 * torch.randn(12, 50, device=device), 3 * torch.randn(12, 50, device=device)
    assert_as_exact(Case(name, loss, family="mixture"), student, teacher)


MIXTURES = [case for case in CASES if case.family == "mixture"]


@pytest.mark.parametrize("case", MIXTURES, ids=lambda case: case.name)
def test_a_small_divergence_keeps_its_digits(fused, case):
    assert_small_divergence_is_exact(case, fused)


def assert_small_divergence_is_exact(case, device="cpu"):
    """Eager torch has none here, but for the total variation distance."""
    student, teacher = 3 * torch.randn(24, 100, device=device), torch.randn(24, 100, device=device)
    (ours, _), _, (size, _) = errors(
        case, student, student + 1e-3 * teacher, None, torch.ones(24, device=device)
    )
    assert ours.norm() < 2e-3 * size.norm()


def test_close_logits_differ_exactly():
    with fastkd.use_backend("native"):
        assert_close_logits_differ_exactly()


def assert_close_logits_differ_exactly():
    """Eager torch subtracts rounded logarithms; the gradient of reverse KL shows it most."""
    student, teacher = 3 * torch.randn(24, 300), torch.randn(24, 300)
    (_, ours), (_, eager), _ = errors(
        BY_NAME["reverse-kl"], student, student + 1e-5 * teacher, None, torch.ones(24)
    )
    assert ours.norm() < 0.1 * eager.norm()


@pytest.mark.parametrize("name", ["tvd", "skew-kl", "skew-kl-0.7"])
def test_a_student_sure_of_what_the_teacher_denies(fused, name):
    assert_gradient_of_denied_class_is_exact(name, fused)


def assert_gradient_of_denied_class_is_exact(name, device="cpu"):
    """Eager torch loses the gradient of that class, a difference of two numbers near 1."""
    student, teacher = (confident(torch.randn(24, 10)).to(device) for _ in range(2))
    _, gradient = loss_and_gradient(BY_NAME[name], student, teacher.roll(1, -1), None, reduction="none")
    _, true_gradient = exact(BY_NAME[name], student, teacher.roll(1, -1), None, reduction="none")
    assert error(gradient, true_gradient) < 1e-5


# ---- standardised logits ----------------------------------------------------------------------------

STANDARDIZED = [case for case in CASES if case.needs & Needs.STANDARDIZED]


@pytest.mark.parametrize("classes", [10, 1000, 9001])
@pytest.mark.parametrize("temperature", [4.0, 0.02, 1e-3])
def test_constant_rows_standardised(fused, classes, temperature):
    """A constant row is a uniform distribution: the loss is finite."""
    student, teacher, _ = make_logits(4, classes, device=fused)
    student[0], teacher[1] = 7.3, 7.3
    student[2] = teacher[2] = 1e4
    for s, t in ((student, teacher), (teacher, student)):
        loss = fastkd.kd_loss(s, t, temperature=temperature, standardize=True, reduction="none")
        with fastkd.use_backend("eager"):
            true_loss = fastkd.kd_loss(
                s.double(), t.double(), temperature=temperature, standardize=True, reduction="none"
            )
        torch.testing.assert_close(loss.double(), true_loss, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", STANDARDIZED, ids=lambda case: case.name)
@pytest.mark.parametrize("mean", [1e2, 1e4])
def test_a_mean_far_above_the_spread(fused, case, mean):
    student, teacher, target = make_logits(16, 1000, device=fused, spread=1.0)
    assert_as_exact(case, student + mean, teacher - mean, target)
    assert_as_exact(case, student + mean, teacher, target)


@pytest.mark.parametrize("case", STANDARDIZED, ids=lambda case: case.name)
@pytest.mark.parametrize("classes", [1000, 9001])
def test_the_mean_of_standardised_rows_is_exact(fused, case, classes):
    assert_standardised_gradient_is_exact(case, classes, fused)


def assert_standardised_gradient_is_exact(case, classes, device="cpu"):
    """Far from 0, eager torch loses three digits of the gradient with the mean; the kernels' means do not."""
    student, teacher, target = make_logits(4, classes, device=device, spread=1.0)
    (_, ours), (_, eager), (_, size) = errors(
        case, student + 1e4, teacher + 1e4, target, torch.ones(4, device=device)
    )
    assert ours.norm() <= 1e-5 * size.norm()
    assert eager.norm() > 1e-5 * size.norm()  # otherwise the rows are no test of it


# ---- NaN and infinity -------------------------------------------------------------------------------


@each_kernel
@pytest.mark.parametrize(
    ("dtype", "classes"),
    [(torch.float32, 5), (torch.float32, 9001), (torch.bfloat16, 1000), (torch.float16, 1000)],
    ids=str,
)
def test_nan_in_is_nan_out_in_that_row_alone(fused, case, dtype, classes):
    places = [0, classes // 2, classes - 1]
    student, teacher, target = make_logits(8, classes, dtype, fused)
    target[:] = classes // 2  # one of the positions is the label
    for row, place in enumerate(places):
        student[row, place] = torch.nan
        teacher[row + 3, place] = torch.nan
    loss, gradient = loss_and_gradient(case, student, teacher, target, reduction="none")
    clean = loss_and_gradient(case, student[6:], teacher[6:], target[6:], reduction="none")
    assert torch.equal(loss[6:], clean[0])
    assert torch.equal(gradient[6:], clean[1])
    bad = 6 if case.reads_teacher else 3
    assert loss[:bad].isnan().all()
    if case.family == "pointwise":
        assert torch.equal(gradient.isnan(), student.isnan() | teacher.isnan())
    else:
        assert gradient[:bad].isnan().all()


@each_case
def test_nan_in_is_nan_out_in_plain_torch(case):
    student, teacher, target = make_logits(3, 9)
    target[:] = 0
    student[0, 4], teacher[1, 4] = torch.nan, torch.nan
    with fastkd.use_backend("eager"):
        loss, gradient = loss_and_gradient(case, student, teacher, target, reduction="none")
    bad = torch.tensor([True, case.reads_teacher, False])
    assert torch.equal(loss.isnan(), bad)
    assert torch.equal(gradient.isnan().any(1), bad)
    if case.family != "pointwise":
        rest = gradient[:, 1:] if case.name == "nckd" else gradient  # which the label's logit has no part in
        assert torch.equal(rest.isnan().all(1), bad)


@each_kernel
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["native", "triton", "eager"])
def test_ignored_rows_may_hold_anything(case, dtype, backend):
    if dtype == torch.float64:
        backend = "auto"
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    student, teacher, target = make_logits(5, 40, dtype, device)
    weight = torch.tensor([1.0, 0.0, 2.0, 1.0, 1.0], device=device)
    if case.ignores_rows:
        target[3] = -100
    with fastkd.use_backend(backend):
        expected = loss_and_gradient(case, student, teacher, target, weight=weight)
        for value in (torch.nan, torch.inf, -torch.inf):
            for logits in (student, teacher):
                logits[1] = value
                if case.ignores_rows:
                    logits[3] = value
            got = loss_and_gradient(case, student, teacher, target, weight=weight)
            assert torch.equal(got[0], expected[0])
            assert torch.equal(got[1], expected[1])
            assert got[1][1].count_nonzero() == 0


@each_kernel
def test_an_infinite_logit_gives_no_finite_loss(fused, case):
    if case.family == "pointwise":
        pytest.skip("a probability of 1 is defined there")
    for which in range(2 if case.reads_teacher else 1):
        for place in (200, 5):
            pair = list(make_logits(3, 300, device=fused))
            pair[2][:] = 5  # the label is in no sum, which would make a NaN of its logit
            pair[which][1, place] = torch.inf
            loss = case.loss(*pair, reduction="none")
            assert not loss[1].isfinite()
            assert loss[[0, 2]].isfinite().all()


# ---- extreme temperatures ---------------------------------------------------------------------------

AT_TEMPERATURE = {
    "kd": lambda s, t, y, **more: fastkd.kd_loss(s, t, **more),
    "dkd": fastkd.dkd_loss,
    "dckd": fastkd.dckd_loss,
    "reverse-kl": lambda s, t, y, **more: fastkd.reverse_kl_loss(s, t, **more),
    "binary-kl": lambda s, t, y, **more: fastkd.binary_kl_loss(s, t, **more),
    "binary-kl-norm": lambda s, t, y, **more: fastkd.binary_kl_norm_loss(s, t, **more),
}

# Losses with sums at T = 1 beside those at a large temperature.
ALSO_AT_1 = {
    "ce-kd": lambda s, t, y, **more: fastkd.distill_loss(
        s, t, y, ce_weight=0.5, kd_weight=0.5, temperature=1000.0, **more
    )[0],
    "nkd": partial(fastkd.nkd_loss, temperature=1000.0),
    "wttm": lambda s, t, y, **more: fastkd.ttm_loss(s, t, gamma=1e-3, weighted=True, **more),
}


@pytest.mark.parametrize("name", AT_TEMPERATURE)
@pytest.mark.parametrize("temperature", [1e-6, 1e-3, 1e3, 1e6])
def test_extreme_temperatures(fused, name, temperature):
    loss = partial(AT_TEMPERATURE[name], temperature=temperature)
    student, teacher, target = make_logits(4, 30, device=fused)
    assert_as_exact(Case(name, loss), student, teacher, target)


@pytest.mark.parametrize("name", ALSO_AT_1)
def test_sums_at_1_beside_a_large_temperature(fused, name):
    """The base of a row's sums may stay some temperatures below a logit, but at T = 1 that would overflow."""
    assert_sums_at_1_are_as_exact(name, fused)


def assert_sums_at_1_are_as_exact(name, device="cpu"):
    """Logits far apart in one model alone, as the base of either may move that of both."""
    for spread in ((100.0, 1.0), (1.0, 100.0)):
        student, teacher, target = make_logits(6, 3000, device=device, spread=1.0)
        assert_as_exact(Case(name, ALSO_AT_1[name]), spread[0] * student, spread[1] * teacher, target)


FINITE_WHERE_BASES_RISE = ["kd-t1", "dkd", "nkd", "wttm", "jsd"]


@pytest.mark.parametrize("name", FINITE_WHERE_BASES_RISE)
@pytest.mark.parametrize("classes", [40, 9001])
def test_a_base_that_rises_further_than_a_sum_may(fused, name, classes):
    assert_finite_where_bases_rise(name, classes, fused)


def assert_finite_where_bases_rise(name, classes, device="cpu"):
    """A teacher's sums become 0, times a step of the student's base that overflows: 0, and not NaN."""
    student, teacher = torch.zeros(2, classes, device=device), torch.zeros(2, classes, device=device)
    low = classes // 2
    student[:, :low], student[:, low:], teacher[:, :low] = -1e38, 1e38, -4000.0
    target = torch.full((2,), classes - 1, device=device)
    loss, gradient = loss_and_gradient(BY_NAME[name], student, teacher, target, reduction="none")
    masked = student.masked_fill(student < 0, -torch.inf).clamp_max(0)  # in float64 too 1e38 has no digits
    true_loss, _ = exact(BY_NAME[name], masked, teacher, target, reduction="none")
    assert gradient.isfinite().all()
    torch.testing.assert_close(loss.double(), true_loss, rtol=1e-5, atol=1e-5)
