"""The losses under test, each as a function of the same arguments, and how results are compared."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import fastkd


@dataclass(frozen=True)
class Case:
    name: str
    loss: Callable[..., Tensor]  # (student, teacher, target, reduction=...) -> loss
    uses_label: bool = False
    ignores_rows: bool = True
    vanishes: bool = True  # no gradient at equal logits


def _distill(**options):
    return lambda s, t, y, **more: fastkd.distill_loss(s, t, y, **options, **more)[0]


CASES = [
    Case("kd", lambda s, t, y, **more: fastkd.kd_loss(s, t, target=y, **more)),
    Case("kd-t1", lambda s, t, y, **more: fastkd.kd_loss(s, t, temperature=1.0, target=y, **more)),
    Case(
        "lskd",
        lambda s, t, y, **more: fastkd.kd_loss(s, t, temperature=2.0, standardize=True, target=y, **more),
    ),
    Case("dkd", lambda s, t, y, **more: fastkd.dkd_loss(s, t, y, **more), True),
    Case("ls-dkd", lambda s, t, y, **more: fastkd.dkd_loss(s, t, y, standardize=True, **more), True),
    Case("tckd", lambda s, t, y, **more: fastkd.dkd_loss(s, t, y, beta=0.0, **more), True),
    Case("ce-kd", _distill(ce_weight=0.1, kd_weight=0.9), True, vanishes=False),
    Case(
        "ce-kd-t1",
        _distill(ce_weight=0.5, kd_weight=0.5, temperature=1.0, label_smoothing=0.1),
        True,
        vanishes=False,
    ),
    Case(
        "ce-dkd",
        _distill(ce_weight=1.0, tckd_weight=1.0, nckd_weight=8.0, label_smoothing=0.1),
        True,
        vanishes=False,
    ),
    Case(
        "ce-lskd",
        _distill(ce_weight=0.1, kd_weight=9.0, temperature=2.0, standardize=True),
        True,
        vanishes=False,
    ),
    Case("ce", _distill(ce_weight=1.0), True, vanishes=False),
    Case("dckd", lambda s, t, y, **more: fastkd.dckd_loss(s, t, y, **more), True),
    Case(
        "ce-dckd",
        _distill(ce_weight=1.0, tckd_weight=1.0, nckd_weight=2.0, fix_acquired=True),
        True,
        vanishes=False,
    ),
    Case("nkd", lambda s, t, y, **more: fastkd.nkd_loss(s, t, y, **more), True, vanishes=False),
    Case(
        "nkd-t3",
        lambda s, t, y, **more: fastkd.nkd_loss(s, t, y, gamma=3.5, temperature=3.0, **more),
        True,
        vanishes=False,
    ),
    Case(
        "ttm",
        lambda s, t, y, **more: fastkd.ttm_loss(s, t, gamma=0.25, **more),
        ignores_rows=False,
        vanishes=False,
    ),
    Case(
        "wttm",
        lambda s, t, y, **more: fastkd.ttm_loss(s, t, gamma=0.25, weighted=True, **more),
        ignores_rows=False,
        vanishes=False,
    ),
    Case(
        "reverse-kl",
        lambda s, t, y, **more: fastkd.reverse_kl_loss(s, t, temperature=2.0, **more),
        ignores_rows=False,
    ),
    Case("jsd", lambda s, t, y, **more: fastkd.jsd_loss(s, t, **more), ignores_rows=False),
    Case(
        "jsd-0.1",
        lambda s, t, y, **more: fastkd.jsd_loss(s, t, beta=0.1, temperature=2.0, **more),
        ignores_rows=False,
    ),
    Case("binary-kl", lambda s, t, y, **more: fastkd.binary_kl_loss(s, t, **more), ignores_rows=False),
    Case(
        "binary-kl-norm", lambda s, t, y, **more: fastkd.binary_kl_norm_loss(s, t, **more), ignores_rows=False
    ),
]
BY_NAME = {case.name: case for case in CASES}

# Relative to the norm of the reference. float32 is rounding of the sums, the half types are the rounding of
# the gradient itself (Triton's interpreter truncates to bfloat16, a whole unit in the last place).
LOSS_ERROR = 1e-5
GRADIENT_ERROR = {torch.float32: 1e-5, torch.bfloat16: 2**-6.5, torch.float16: 2e-3}


def make_logits(rows: int, classes: int, dtype=torch.float32, device="cpu", spread: float = 3.0):
    """Random student and teacher logits and labels."""
    student, teacher = ((spread * torch.randn(rows, classes)).to(dtype).to(device) for _ in range(2))
    return student, teacher, torch.randint(0, classes, (rows,), device=device)


def loss_and_gradient(case: Case, student, teacher, target, upstream=None, **options):
    """The loss and the student's gradient under a (random) upstream gradient."""
    student = student.detach().requires_grad_()
    loss = case.loss(student, teacher, target, **options)
    loss.backward(torch.ones_like(loss) if upstream is None else upstream)
    return loss.detach(), student.grad


def exact(case: Case, student, teacher, target, upstream=None, **options):
    """The same from the reference in float64, on the very logits that were given."""
    upstream = None if upstream is None else upstream.double()
    with fastkd.use_backend("eager"):
        return loss_and_gradient(case, student.double(), teacher.double(), target, upstream, **options)


def error(value: Tensor, reference: Tensor, floor: float = 0.0) -> float:
    """Norm of the difference relative to the reference's norm, or to ``floor`` where that is larger."""
    difference = (value.double() - reference).norm().item()
    assert torch.isfinite(value).all(), "not finite"
    scale = max(reference.norm().item(), floor)
    return difference / scale if scale else difference


def assert_matches(case: Case, student, teacher, target, upstream=None, floor: float = 1e-2, **options):
    loss, gradient = loss_and_gradient(case, student, teacher, target, upstream, **options)
    true_loss, true_gradient = exact(case, student, teacher, target, upstream, **options)
    assert gradient.dtype == student.dtype
    assert gradient.shape == student.shape
    assert error(loss, true_loss, floor) < LOSS_ERROR
    assert error(gradient, true_gradient, floor) < GRADIENT_ERROR[student.dtype]
