"""``TopKLogits``: every loss against its definition over K + 1 classes, in float64."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fastkd
from fastkd import TopKLogits
from fastkd.losses.cases import call_of
from fastkd.ops import spec
from fastkd.ops.spec import SoftmaxOptions
from tests.cases import error

DEFINED = {
    name: (loss, case)
    for name, (loss, case) in spec.CASES.items()
    if loss.undefined_at_k(case.options) is None
}
# WTTM is defined with gamma 1 only, which no case has.
WTTM = spec.Case(
    "wttm-1", "ttm_loss", {"gamma": 1.0, "weighted": True}, spec.TTMOptions(1.0, True), vanishes=False
)
DEFINED[WTTM.name] = spec.LOSSES["ttm"], WTTM
UNDEFINED = [name for name in spec.CASES if name not in DEFINED]
# Cases of every family and of every way in which a label enters.
SOME = ["kd", "dckd", "ce-kd-smoothed", "ce-dkd", "nkd", "ttm", "reverse-kl", "jsd", "skew-kl"]
ROWS, CLASSES = 6, 37
ERROR = {torch.float32: 1e-5, torch.bfloat16: 2**-6.5, torch.float16: 2e-3}


def logits(classes: int = CLASSES, rows: int = ROWS, dtype=torch.float32, device="cpu"):
    student, teacher = ((3 * torch.randn(rows, classes)).to(dtype).to(device) for _ in range(2))
    return student, teacher, torch.randint(0, classes, (rows,), device=device)


def made(name: str, teacher: Tensor, k: int, target: Tensor | None) -> TopKLogits:
    loss, case = DEFINED[name]
    return fastkd.top_k(teacher, k, target, temperature=loss.temperatures(case.options)[1])


def defined(name: str, student: Tensor, form: TopKLogits, target: Tensor, **more) -> Tensor:
    """The dense loss of probabilities of K + 1 classes, and the cross-entropy of all logits."""
    loss, case = DEFINED[name]
    indices = form.indices.long()
    students_temperature, teachers_temperature = loss.temperatures(case.options)
    q = (student / students_temperature).softmax(-1)
    rest = q.scatter(-1, indices, 0.0).sum(-1, keepdim=True)
    log_q = torch.cat([q.gather(-1, indices), rest], -1).log()
    log_p = torch.cat([form.log_probs, form.log_rest[..., None]], -1).to(log_q.dtype)
    both = students_temperature * log_q, teachers_temperature * log_p
    if indices.shape[-1] == student.shape[-1]:  # there is no rest
        both = both[0][..., :-1], both[1][..., :-1]
    options = case.options
    if isinstance(options, SoftmaxOptions) and options.ce_weight:
        kd = {"kd_weight": 0.0, **case.arguments, "ce_weight": 0.0, "label_smoothing": 0.0}
        of_teacher = options.kd_weight or options.tckd_weight
        position = (indices == target[..., None]).long().argmax(-1)
        value = fastkd.distill_loss(*both, position, **kd, **more)[0] if of_teacher else 0.0
        ce = F.cross_entropy(
            student, target, reduction="none", label_smoothing=options.label_smoothing
        ) * more.get("weight", 1.0)
        return value + options.ce_weight * (ce if more["reduction"] == "none" else ce.sum())
    position = (indices == target[..., None]).long().argmax(-1)
    return call_of(case)(*both, position, **more)


def gradient_of(value: Tensor, student: Tensor, grad_output: Tensor) -> tuple[Tensor, Tensor]:
    (gradient,) = torch.autograd.grad(value, student, grad_output.to(value.dtype))
    return value.detach(), gradient


def compare(name, student, form, target, *, dtype=torch.float32, floor=1e-2, **more):
    """The loss of one backend against the definition, with a random grad_output."""
    case = DEFINED[name][1]
    grad_output = torch.randn(student.shape[:-1], device=student.device) + 2
    if more.get("reduction", "none") != "none":
        grad_output = grad_output[0]
    more.setdefault("reduction", "none")
    student = student.requires_grad_()
    ours = gradient_of(call_of(case)(student, form, target, **more), student, grad_output)
    wide = student.detach().double().requires_grad_()
    if "weight" in more:
        more["weight"] = more["weight"].double()
    exact_form = form.of([t.double() if t.is_floating_point() else t for t in form.tensors.values()])
    with fastkd.use_backend("eager"):
        exact = gradient_of(defined(name, wide, exact_form, target, **more), wide, grad_output)
    assert ours[1].dtype == dtype
    assert error(ours[0], exact[0], floor) < 1e-5
    assert error(ours[1], exact[1], floor) < ERROR[dtype]


def interpreted(device: str) -> bool:
    """Whether Triton's interpreter runs, which takes a second for each call."""
    return fastkd.get_backend() == "triton" and device == "cpu"


def numbers_of_classes(device: str, dtype: torch.dtype) -> tuple[int, ...]:
    """K from 1 to C; fewer in the interpreter."""
    if interpreted(device):
        return (5, CLASSES) if dtype == torch.float32 else (5,)
    return (1, 5, CLASSES - 1, CLASSES)


@pytest.mark.parametrize("dtype", ERROR, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", DEFINED)
def test_matches_the_definition(fused, name, dtype):
    student, teacher, target = logits(dtype=dtype, device=fused)
    weight = torch.rand(ROWS, device=fused) + 0.5
    for k in numbers_of_classes(fused, dtype):
        form = made(name, teacher, k, target)
        compare(name, student, form, target, dtype=dtype, weight=weight)


@pytest.mark.parametrize("name", SOME)
def test_rows_longer_than_a_tile(fused, name):
    student, teacher, target = logits(classes=2500, rows=3, device=fused)
    compare(name, student, made(name, teacher, 40, target), target, reduction="sum")


@pytest.mark.parametrize("name", DEFINED)
@pytest.mark.parametrize("missing", [0, 1])
def test_all_known_is_the_dense_loss(fused, name, missing):
    """With K = C, and with K = C - 1, where the rest is one class."""
    case = DEFINED[name][1]
    if CLASSES - missing not in numbers_of_classes(fused, torch.float32):
        pytest.skip("slow in the interpreter, and no other code than with K = C")
    student, teacher, target = logits(device=fused)
    student.requires_grad_()
    grad_output = torch.randn((), device=fused)
    form = made(name, teacher, CLASSES - missing, target)
    results = [
        gradient_of(call_of(case)(student, one, target), student, grad_output) for one in (form, teacher)
    ]
    for ours, dense in zip(*results, strict=True):
        assert error(ours, dense.double(), 1e-3) < 2e-5


@pytest.mark.parametrize("name", ["kd", "reverse-kl", "jsd", "tvd", "skew-kl"])
def test_never_negative_and_at_most_the_dense_loss(name):
    """Merging classes cannot raise a divergence."""
    case = DEFINED[name][1]
    student, teacher, _ = logits(rows=200)
    student[:100] = teacher[:100] + 1e-3 * torch.randn(100, CLASSES)
    dense = call_of(case)(student, teacher, None, reduction="none")
    for k in (1, 3, 20):
        ours = call_of(case)(student, made(name, teacher, k, None), None, reduction="none")
        assert (ours >= -5e-6).all()  # T^2 times the rounding of a sum
        assert (ours <= dense + 5e-6).all()


@pytest.mark.parametrize("name", ["kd", "kd-t1", "dkd", "jsd", "tvd", "reverse-kl"])
def test_near_equal_logits_are_no_worse_than_eager(name):
    loss, case = DEFINED[name]
    student = 3 * torch.randn(32, 1000)
    teacher = student + 1e-3 * torch.randn_like(student)
    target = torch.randint(0, 1000, (32,))
    form = made(name, teacher.double(), 64, target)
    exact = gradient_of(*_leaf(call_of(case), student.double(), form, target))
    errors = {}
    form = form.of([t.float() if t.is_floating_point() else t for t in form.tensors.values()])
    for backend in ("native", "eager"):
        with fastkd.use_backend(backend):
            ours = gradient_of(*_leaf(call_of(case), student, form, target))
        errors[backend] = error(ours[1], exact[1])
    assert errors["native"] <= 1.2 * errors["eager"] + 1e-7


def _leaf(loss, student, form, target):
    student = student.requires_grad_()
    value = loss(student, form, target)
    return value, student, torch.ones_like(value)


def test_a_confident_student_keeps_the_probability_of_the_rest():
    """Where 1 - sum of the known would be 0 in float32."""
    student = torch.randn(4, 1000)
    student[:, :3] += torch.tensor([60.0, 55.0, 50.0])
    teacher = torch.randn(4, 1000)
    teacher[:, :3] += 20
    form = fastkd.top_k(teacher, 3, temperature=1.0)
    compare("kd-t1", student, form, torch.zeros(4, dtype=torch.int64), floor=0.0)


@pytest.mark.parametrize("label", [-100, CLASSES, 255])
def test_a_label_out_of_range_is_no_class(label):
    teacher = torch.randn(3, CLASSES)
    form = fastkd.top_k(teacher, 4, torch.full((3,), label))
    assert torch.equal(form.indices, fastkd.top_k(teacher, 4).indices)


@pytest.mark.parametrize("name", ["ce-kd", "ce-kd-t1", "ce-kd-smoothed", "ce-kd-t1-smoothed", "ce"])
def test_the_cross_entropy_needs_no_known_label(fused, name):
    student, teacher, target = logits(rows=12, device=fused)
    form = made(name, teacher, 4, None)
    assert (form.indices != target[:, None]).all(-1).any()
    compare(name, student, form, target)


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "probabilities"])
@pytest.mark.parametrize("standardize", [False, True])
def test_a_teacher_that_no_term_reads(fused, soft, standardize):
    """Such as that of a warm-up, whose first weight is 0: its temperature does not matter."""
    student, teacher, target = logits(device=fused)
    form = fastkd.top_k(teacher, 5, target, temperature=4.0)
    if soft:
        target = torch.nn.functional.one_hot(target, CLASSES).float()
    options = {"ce_weight": 0.3, "kd_weight": 0.0, "temperature": 4.0, "standardize": standardize}
    loss, _ = fastkd.distill_loss(student, form, target, **options)
    torch.testing.assert_close(loss, fastkd.distill_loss(student, teacher, target, **options)[0])


def test_rows_that_are_not_read_may_hold_anything(fused):
    student, teacher, target = logits(device=fused)
    form = fastkd.top_k(teacher, 5, target, temperature=4.0)
    student[1], target[1] = torch.nan, -100
    form.log_probs[1], form.indices[1], form.log_rest[1] = torch.nan, 10**6, 3.0
    student.requires_grad_()
    loss = fastkd.dkd_loss(student, form, target)
    loss.backward()
    kept = [0, *range(2, ROWS)]
    again = student.detach()[kept].requires_grad_()
    part = TopKLogits(
        form.log_probs[kept], form.indices[kept], form.log_rest[kept], num_classes=CLASSES, temperature=4.0
    )
    expected = fastkd.dkd_loss(again, part, target[kept])
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(student.grad[kept], again.grad)
    assert not student.grad[1].any()


@pytest.mark.parametrize("where", ["known", "rest", "label", "log_probs", "log_rest"])
@pytest.mark.parametrize("name", ["dkd", "ce-kd-t1", "jsd"])
def test_nan_stays_in_its_row(fused, name, where):
    student, teacher, target = logits(device=fused)
    form = made(name, teacher, 5, target)
    rest = next(index for index in range(CLASSES) if index not in form.indices[2].tolist())
    column = {"known": form.indices[2, 0], "rest": rest, "label": target[2]}.get(where)
    if column is not None:
        student[2, column] = torch.nan
    else:
        getattr(form, where)[2] = torch.nan
    student.requires_grad_()
    loss = call_of(DEFINED[name][1])(student, form, target, reduction="none")
    loss.sum().backward()
    others = [0, 1, *range(3, ROWS)]
    assert loss[2].isnan()
    assert student.grad[2].isnan().all()
    assert loss[others].isfinite().all()
    assert student.grad[others].isfinite().all()


@pytest.mark.parametrize("known", [False, True])
def test_masked_classes(fused, known):
    """-inf, as of a padded vocabulary, among the rest and among the known."""
    student, teacher, target = logits(device=fused)
    target.zero_()
    student[:, 20:], teacher[:, 20:] = -math.inf, -math.inf
    form = fastkd.top_k(teacher, 30 if known else 4, target, temperature=4.0)
    student.requires_grad_()
    results = []
    for teachers in (form, fastkd.top_k(teacher[:, :20], 20 if known else 4, target, temperature=4.0)):
        part = student if teachers is form else student[:, :20]
        results.append(gradient_of(fastkd.dkd_loss(part, teachers, target), student, torch.ones(())))
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-6, rtol=1e-5)


def test_the_order_and_type_of_indices_do_not_matter(fused):
    student, teacher, target = logits(device=fused)
    form = fastkd.top_k(teacher, 6, target, temperature=4.0)
    order = torch.randperm(6, device=fused)
    expected = fastkd.dkd_loss(student, form, target)
    for dtype in (torch.int64, torch.int32, torch.int16, torch.uint8):
        mixed = TopKLogits(
            form.log_probs[:, order], form.indices[:, order].to(dtype), form.log_rest, num_classes=CLASSES,
            temperature=4.0,
        )  # fmt: skip
        torch.testing.assert_close(fastkd.dkd_loss(student, mixed, target), expected, rtol=1e-6, atol=0)


def test_without_the_rest_it_is_what_remains_of_1(fused):
    student, teacher, _ = logits(device=fused)
    form = fastkd.top_k(teacher, 6, temperature=4.0)
    given = fastkd.kd_loss(student, form)
    alone = TopKLogits(form.log_probs, form.indices, num_classes=CLASSES, temperature=4.0)
    torch.testing.assert_close(fastkd.kd_loss(student, alone), given, rtol=1e-4, atol=0)
    # Probabilities that fill float32's 1 leave the rest what float32 cannot tell from 0.
    all_of_it, at = torch.zeros(1, 1, device=fused), torch.tensor([[3]], device=fused)
    full = TopKLogits(all_of_it, at, num_classes=CLASSES, temperature=4.0)
    value = fastkd.reverse_kl_loss(student[:1], full.of(full.tensors.values()), temperature=4.0)
    assert value < 20


def test_renormalized_is_the_kl_of_the_known(fused):
    student, teacher, _ = logits(device=fused)
    form = fastkd.top_k(teacher, 6, temperature=4.0)
    form = TopKLogits(form.log_probs, form.indices, num_classes=CLASSES, temperature=4.0, rest="renormalize")
    log_p = form.log_probs.double().log_softmax(-1)
    log_q = (student.double() / 4).log_softmax(-1).gather(1, form.indices)
    expected = 16 * (log_p.exp() * (log_p - log_q)).sum(-1)
    torch.testing.assert_close(
        fastkd.kd_loss(student, form, reduction="none").double(), expected, rtol=1e-5, atol=1e-5
    )
    with pytest.raises(ValueError, match="infinite"):
        fastkd.reverse_kl_loss(student, form, temperature=4.0)
    assert fastkd.skew_kl_loss(student, form, temperature=4.0, reverse=True).isfinite()


@pytest.mark.parametrize("name", UNDEFINED)
def test_undefined_losses_are_refused(name):
    _, case = spec.CASES[name]
    student, teacher, target = logits()
    with pytest.raises(ValueError, match=r"^teacher_logits is a TopKLogits, for which .* is not defined"):
        call_of(case)(student, fastkd.top_k(teacher, 5), target)


def test_another_temperature_is_refused():
    student, teacher, _ = logits()
    form = fastkd.top_k(teacher, 5, temperature=2.0)
    with pytest.raises(ValueError, match="at temperature 2, and the loss reads them at 4"):
        fastkd.kd_loss(student, form, temperature=4.0)
    with pytest.raises(ValueError, match="at 4"):
        fastkd.ttm_loss(student, form, gamma=0.25)
    fastkd.ttm_loss(student, form, gamma=0.5)


def test_a_rest_that_is_not_the_rest(each_backend):
    log_probs = torch.full((4, 2), 0.45, device=each_backend).log()
    indices = torch.tensor([[0, 1]] * 4, device=each_backend)
    student = torch.randn(4, 6, device=each_backend)
    for rest in (0.9, 0.01):
        log_rest = torch.full((4,), rest, device=each_backend).log()
        form = fastkd.TopKLogits(log_probs, indices, log_rest, num_classes=6, temperature=1.0)
        with pytest.raises(ValueError, match=r"sum to 0.9 and exp\(log_rest\) .*; expected 1 together"):
            fastkd.check_top_k(form)
        if student.is_cpu:
            with pytest.raises(ValueError, match="expected 1 together"):
                fastkd.kd_loss(student, form, temperature=1.0)
        else:
            assert fastkd.kd_loss(student, form, temperature=1.0).isnan()
    log_rest = torch.full((4,), 0.1, device=each_backend).log()
    form = fastkd.TopKLogits(log_probs, indices, log_rest, num_classes=6, temperature=1.0)
    fastkd.check_top_k(form)


def test_vmap_over_weights_of_unsorted_classes():
    known = fastkd.top_k(torch.randn(4, 6), 3, temperature=1.0)
    form = fastkd.TopKLogits(
        known.log_probs.flip(-1), known.indices.flip(-1), known.log_rest, num_classes=6, temperature=1.0
    )
    student, weights = torch.randn(4, 6), torch.rand(3, 4)

    def loss(weight):
        return fastkd.kd_loss(student, form, temperature=1.0, weight=weight)

    torch.testing.assert_close(torch.func.vmap(loss)(weights), torch.stack([loss(w) for w in weights]))
