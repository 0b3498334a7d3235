"""Options on a schedule under torch.compile: no recompilation per value, and the results of eager."""

import pytest
import torch

import fastkd
from fastkd import losses
from tests.cases import make_logits

VALUES = [0.3 + 0.1 * step for step in range(20)]
assert 1.0 in VALUES
# For options whose range differs, or whose values must not reach 1, which selects other code.
RANGES = {
    "temperature": lambda value: 2 + value,
    "temperature, standardized": lambda value: 2 + value,
    "temperature, ce": lambda value: 3 * value,
    "label_smoothing": lambda value: value / 3,
    "beta, jsd": lambda value: value / 3,
    "skew": lambda value: value / 3,
}

# Losses as functions of one varying option.
SCHEDULED = {
    "kd_weight": lambda s, t, y, w: fastkd.distill_loss(s, t, y, ce_weight=1.0, kd_weight=w)[0],
    "ce_weight": lambda s, t, y, w: fastkd.distill_loss(s, t, y, ce_weight=w, nckd_weight=2.0)[0],
    "label_smoothing": lambda s, t, y, w: fastkd.distill_loss(s, t, y, ce_weight=1.0, label_smoothing=w)[0],
    "alpha": lambda s, t, y, w: fastkd.dkd_loss(s, t, y, alpha=w),
    "beta, dckd": lambda s, t, y, w: fastkd.dckd_loss(s, t, y, beta=w),
    "temperature": lambda s, t, y, w: fastkd.kd_loss(s, t, temperature=w),
    "temperature, standardized": lambda s, t, y, w: fastkd.kd_loss(s, t, temperature=w, standardize=True),
    "temperature, ce": lambda s, t, y, w: fastkd.distill_loss(
        s, t, y, ce_weight=0.5, kd_weight=0.5, temperature=w
    )[0],
    "gamma, nkd": lambda s, t, y, w: fastkd.nkd_loss(s, t, y, gamma=w, temperature=2.0),
    "gamma, ttm": lambda s, t, y, w: fastkd.ttm_loss(s, t, gamma=w, weighted=True),
    "temperature, reverse kl": lambda s, t, y, w: fastkd.reverse_kl_loss(s, t, temperature=w),
    "beta, jsd": lambda s, t, y, w: fastkd.jsd_loss(s, t, beta=w),
    "skew": lambda s, t, y, w: fastkd.skew_kl_loss(s, t, skew=w),
    "temperature, binary kl": lambda s, t, y, w: fastkd.binary_kl_loss(s, t, temperature=w),
    "temperature, binary kl norm": lambda s, t, y, w: fastkd.binary_kl_norm_loss(s, t, temperature=w),
}


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def compilations() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


# The two fused backends are traced alike, and so are options that are each one number of a formula.
TRACED = [
    *((name, "native") for name in SCHEDULED),
    *((name, "triton") for name in ("temperature, ce", "beta, jsd", "temperature, binary kl")),
    *((name, "eager") for name in ("temperature, ce", "gamma, nkd", "beta, jsd", "temperature, binary kl")),
]


@pytest.mark.parametrize(("name", "backend"), TRACED)
def test_a_value_is_not_compiled_in(name, backend):
    if backend == "eager" and torch.__version__ < "2.14":
        pytest.skip("this torch compiles some numbers of plain torch's operators in")
    device = "cuda" if torch.cuda.is_available() and backend == "triton" else "cpu"
    loss = SCHEDULED[name]
    student, teacher, target = make_logits(6, 21, torch.float32, device)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    with fastkd.use_backend(backend):
        for value in map(RANGES.get(name, float), VALUES):
            got, gradient = value_and_gradient(compiled, student, teacher, target, value)
            want, expected = value_and_gradient(loss, student, teacher, target, value)
            torch.testing.assert_close((got, gradient), (want, expected), rtol=1e-4, atol=1e-6)
    assert compilations() <= 2


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_inductor_takes_a_weight_at_run_time(backend):
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("compiled for a GPU elsewhere")
    student, teacher, target = make_logits(6, 21)
    weighted = SCHEDULED["kd_weight"]
    compiled = torch.compile(weighted, fullgraph=True)
    with fastkd.use_backend(backend):
        for value in VALUES:
            torch.testing.assert_close(
                value_and_gradient(compiled, student, teacher, target, value),
                value_and_gradient(weighted, student, teacher, target, value),
                rtol=1e-4,
                atol=1e-6,
            )
    assert compilations() <= 2


def test_an_attribute_of_a_module_may_be_on_a_schedule(fused):
    student, teacher, target = make_logits(6, 21, torch.float32, fused)
    module = losses.DistillLoss(ce_weight=1.0, kd_weight=0.3)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for value in VALUES:
        module.kd_weight, module.temperature = value, 2.0 + value
        loss, terms = compiled(student, teacher, target)
        want, plain = fastkd.distill_loss(
            student, teacher, target, ce_weight=1.0, kd_weight=value, temperature=2.0 + value
        )
        torch.testing.assert_close((loss, terms), (want, plain), rtol=1e-4, atol=1e-6)
    assert compilations() <= 2


def test_a_module_takes_an_attribute_that_is_set(fused):
    student, teacher, _ = make_logits(6, 21, torch.float32, fused)
    module = losses.KDLoss(temperature=4.0)
    module.temperature = 2.0
    assert torch.equal(module(student, teacher), fastkd.kd_loss(student, teacher, temperature=2.0))
    module.temperature = -1.0
    with pytest.raises(ValueError, match=r"temperature is -1\.0"):
        module(student, teacher)


def test_a_term_that_begins_at_weight_0_and_passes_1(fused):
    """A warm-up: 0 selects code without the term, so there is one recompilation, not one per value."""
    student, teacher, target = make_logits(6, 21, torch.float32, fused)
    warmed = SCHEDULED["kd_weight"]
    compiled = torch.compile(warmed, fullgraph=True, backend="aot_eager")
    for value in [min(epoch / 10, 1.0) for epoch in range(20)]:
        torch.testing.assert_close(
            compiled(student, teacher, target, value), warmed(student, teacher, target, value)
        )
    assert compilations() <= 3


def value_and_gradient(loss, student, teacher, target, value):
    student = student.detach().requires_grad_()
    result = loss(student, teacher, target, value)
    (gradient,) = torch.autograd.grad(1.7 * result, student)
    return result.detach(), gradient
