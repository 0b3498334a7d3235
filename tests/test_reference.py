"""The reference: compared with the definitions, and twice differentiable."""

import pytest
import torch
import torch.nn.functional as F

import fastkd
from fastkd import reference
from tests.cases import CASES, make_logits


@pytest.fixture(autouse=True)
def _eager():
    with fastkd.use_backend("eager"):
        yield


def double_logits(rows=5, classes=23):
    student, teacher, target = make_logits(rows, classes)
    return student.double().requires_grad_(), teacher.double(), target


def test_kd_is_torchs_kl():
    student, teacher, _ = double_logits()
    for temperature in (1.0, 2.0, 4.0):
        expected = temperature**2 * F.kl_div(
            F.log_softmax(student / temperature, 1),
            F.softmax(teacher / temperature, 1),
            reduction="batchmean",
        )
        torch.testing.assert_close(fastkd.kd_loss(student, teacher, temperature=temperature), expected)


def test_dkd_is_its_definition():
    """TCKD and NCKD from probabilities, as in the paper, and KD = TCKD + (1 - p_y) NCKD."""
    student, teacher, target = double_logits()
    square = 16.0
    q, p = (student / 4).softmax(1), (teacher / 4).softmax(1)
    label = F.one_hot(target, 23).bool()
    q_y, p_y = q[label], p[label]
    tckd = p_y * (p_y / q_y).log() + (1 - p_y) * ((1 - p_y) / (1 - q_y)).log()
    q_hat, p_hat = q / (1 - q_y)[:, None], p / (1 - p_y)[:, None]
    nckd = (p_hat * (p_hat / q_hat).log()).masked_fill(label, 0).sum(1)
    options = {"reduction": "none"}
    torch.testing.assert_close(
        fastkd.dkd_loss(student, teacher, target, **options), square * (tckd + 8 * nckd)
    )
    torch.testing.assert_close(
        fastkd.kd_loss(student, teacher, **options), square * (tckd + (1 - p_y) * nckd)
    )


def test_standardised_kd_is_kd_of_standardised_logits():
    student, teacher, _ = double_logits()
    z_s, z_t = ((z - z.mean(1, keepdim=True)) / (z.std(1, keepdim=True) + 1e-7) for z in (student, teacher))
    expected = fastkd.kd_loss(z_s, z_t, temperature=2.0)
    torch.testing.assert_close(fastkd.kd_loss(student, teacher, temperature=2.0, standardize=True), expected)


def test_cross_entropy_is_torchs():
    student, teacher, target = double_logits()
    target[2] = -100
    for smoothing in (0.0, 0.1):
        loss, _ = fastkd.distill_loss(student, teacher, target, ce_weight=1.0, label_smoothing=smoothing)
        torch.testing.assert_close(loss, F.cross_entropy(student, target, label_smoothing=smoothing))


def test_binary_kl_is_a_sum_of_bernoulli_kls():
    student, teacher, _ = double_logits()
    u, p = student / 2, (teacher / 2).sigmoid()
    cross = F.binary_cross_entropy_with_logits(u, p, reduction="none").sum(1)
    entropy = F.binary_cross_entropy(p, p, reduction="none").sum(1)
    torch.testing.assert_close(
        fastkd.binary_kl_loss(student, teacher, reduction="none"), 4 * (cross - entropy)
    )


def test_binary_kl_norm_is_its_definition():
    student, teacher, _ = double_logits()
    q = ((student - teacher) / 2).sigmoid()
    expected = 4 * (0.5 * (0.5 / q).log() + 0.5 * (0.5 / (1 - q)).log()).sum(1)
    torch.testing.assert_close(fastkd.binary_kl_norm_loss(student, teacher, reduction="none"), expected)


def test_log_cosh_of_small_arguments():
    x = torch.tensor([1e-12, 1e-6, 1e-3, 0.04, 0.06, 1.0, 50.0], dtype=torch.float64)
    expected = torch.where(
        x < 1e-2,
        x**2 / 2 - x**4 / 12,
        x + torch.log1p(torch.exp(-2 * x)) - torch.log(torch.tensor(2.0).double()),
    )
    torch.testing.assert_close(reference.log_cosh(x), expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(reference.log_cosh(x.float()).double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradcheck(case):
    student, teacher, target = double_logits(3, 5)

    def loss(logits):
        return case.loss(logits, teacher, target, reduction="none")

    assert torch.autograd.gradcheck(loss, (student,))
    assert torch.autograd.gradgradcheck(loss, (student,))
