"""``LinearLogits`` against logits stored in float64: values and all gradients of every loss."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastkd
from fastkd import LinearLogits
from tests.cases import BY_NAME, CASES, KERNELS
from tests.losses.linear_cases import NUMBERS, Layers, errors

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Each case with the next of the layer's numbers, and all of these with kernels that differ.
WITH_NUMBERS = [(case, name) for case, name in zip(CASES, itertools.cycle(NUMBERS))]
WITH_NUMBERS += [
    (BY_NAME[case], name)
    for case, name in itertools.product(("kd", "lskd"), NUMBERS)
    if (BY_NAME[case], name) not in WITH_NUMBERS
]
# Rounding of sums in float32. Half precision is compared with stored logits of the same dtype.
SINGLE = 2e-5
FLOOR = {torch.bfloat16: 2**-9, torch.float16: 2**-12}


def no_worse(ours, stored, floor):
    assert all(one <= 1.5 * other + floor for one, other in zip(ours, stored, strict=True)), (ours, stored)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(
    ("case", "numbers"), [pytest.param(*one, id=f"{one[0].name}-{one[1]}") for one in WITH_NUMBERS]
)
def test_matches_stored_logits(each_backend, case, numbers, dtype):
    """11 rows in chunks of 4, one row ignored by its label and one by its weight."""
    layers = Layers.random(dtype=dtype, device=each_backend, **NUMBERS[numbers])
    weight = torch.rand(11, device=each_backend) + 0.5
    weight[7] = 0
    layers.target[2] = -100
    if case.uses_label or not case.ignores_rows:
        weight[2] = 0
        layers.target[2] = 0
    grad_output = torch.randn(()).item() + 2
    options = {"weight": weight, "grad_output": grad_output}
    truth = layers.exact(case, **options)
    ours = errors(layers.loss_and_gradients(case, **options), truth)
    if dtype == torch.float32:
        assert max(ours) < SINGLE
        return
    stored = errors(layers.loss_and_gradients(case, stored=True, **options), truth)
    no_worse(ours, stored, FLOOR[dtype])


@pytest.mark.parametrize("name", [name for name in KERNELS if BY_NAME[name].vanishes])
def test_near_equal_logits_are_no_worse_than_stored(name):
    case = BY_NAME[name]
    layers = Layers.random(rows=32, classes=1000)
    layers.teacher = [layers.student[0] + 1e-4 * torch.randn_like(layers.student[0]), *layers.student[1:]]
    truth = layers.exact(case, grad_output=1e3)
    ours = errors(layers.loss_and_gradients(case, grad_output=1e3), truth, floor=0)
    stored = errors(layers.loss_and_gradients(case, grad_output=1e3, stored=True), truth, floor=0)
    no_worse(ours, stored, 1e-6)


@pytest.mark.parametrize("name", ["kd", "dkd", "jsd", "binary-kl"])
def test_equal_layers_have_no_gradient(fused, name):
    layers = Layers.random(device=fused)
    layers.teacher = layers.student
    value, *gradients = layers.loss_and_gradients(BY_NAME[name])
    assert abs(value.item()) < 1e-6
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("chunk_rows", [None, 1, 3, 11, 100])
def test_any_chunk(fused, chunk_rows):
    layers = Layers.random(device=fused)
    truth = layers.exact(BY_NAME["ce-kd"])
    assert max(errors(layers.loss_and_gradients(BY_NAME["ce-kd"], chunk_rows=chunk_rows), truth)) < SINGLE


@pytest.mark.parametrize("options", [{}, {"center_teacher": True}], ids=["as-it-is", "centered"])
@pytest.mark.parametrize("which", ["student", "teacher"])
def test_one_form_beside_a_tensor(fused, which, options):
    layers = Layers.random(device=fused)
    hidden = layers.student[0].requires_grad_()
    forms = LinearLogits(*layers.student, chunk_rows=4), LinearLogits(*layers.teacher, chunk_rows=3)
    stored = [form.dense() for form in forms]
    mixed = (forms[0], stored[1]) if which == "student" else (stored[0], forms[1])
    values = [fastkd.binary_kl_loss(*pair, **options) for pair in (mixed, stored)]
    gradients = [torch.autograd.grad(value, hidden, retain_graph=True)[0] for value in values]
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", KERNELS)
def test_no_reduction(fused, name):
    """Values of each row, and a gradient if the student is a tensor."""
    case, layers = BY_NAME[name], Layers.random(device=fused)
    forms = LinearLogits(*layers.student, chunk_rows=4), LinearLogits(*layers.teacher, chunk_rows=4)
    stored = [form.dense() for form in forms]
    weight = torch.tensor([1.0, 0.0, *torch.rand(9)], device=fused)
    options = {"reduction": "none", "weight": weight}
    torch.testing.assert_close(
        case.loss(*forms, layers.target, **options), case.loss(*stored, layers.target, **options)
    )
    student, grad_output = stored[0].requires_grad_(), torch.randn(11, device=fused)
    gradients = [
        torch.autograd.grad(case.loss(student, teacher, layers.target, **options), student, grad_output)[0]
        for teacher in (forms[1], stored[1])
    ]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


def test_no_reduction_with_a_gradient_names_the_weight(fused):
    layers = Layers.random(device=fused)
    hidden = layers.student[0].requires_grad_()
    with pytest.raises(ValueError, match="weight="):
        fastkd.kd_loss(
            LinearLogits(hidden, *layers.student[1:]), LinearLogits(*layers.teacher), reduction="none"
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_a_stored_student_of_a_linear_teacher(fused, dtype):
    """float16: the loss scale reaches the gradient before it is rounded, as with a stored teacher."""
    layers = Layers.random(classes=4099, dtype=dtype, device=fused)
    teacher = LinearLogits(*layers.teacher, chunk_rows=4)
    student = LinearLogits(*layers.student).dense().detach().requires_grad_()
    weight = torch.tensor([0.0, *torch.rand(10)], device=fused)

    def gradient(student, teacher, scale, reduction="batchmean"):
        loss = fastkd.kd_loss(student, teacher, weight=weight, reduction=reduction)
        found = torch.autograd.grad(loss.sum() * scale, student, retain_graph=True)[0]
        again = torch.autograd.grad(loss.sum() * scale, student)[0]
        assert torch.equal(found, again)
        return found

    with fastkd.use_backend("eager"):
        truth = gradient(student.detach().double().requires_grad_(), teacher.dense().double(), 65536.0)
    ours, stored = (
        (gradient(student, one, 65536.0).double() - truth).norm() for one in (teacher, teacher.dense())
    )
    assert ours <= 1.1 * stored + 1e-5 * truth.norm()
    by_row = gradient(student, teacher, 65536.0 / 11, "none").double()
    torch.testing.assert_close(by_row, gradient(student, teacher, 65536.0).double(), atol=1e-2, rtol=2e-2)


@pytest.mark.parametrize("name", KERNELS)
def test_float16_neither_underflows_nor_overflows(fused, name):
    """Small row weights, as 1/N of a large batch: a row's gradient is stored without them.

    One student is confident in a class, where the gradient is largest, and its teacher nearly uniform.
    """
    layers = Layers.random(rows=6, classes=1027, dtype=torch.float16, device=fused)
    layers.student[0][0] *= 8
    layers.teacher[0][0] /= 64
    weight = torch.full((6,), 1e-4, device=fused)
    options = {"weight": weight, "grad_output": 65536.0, "chunk_rows": 4}
    truth = layers.exact(BY_NAME[name], **options)
    ours, stored = (
        errors(layers.loss_and_gradients(BY_NAME[name], stored=stored, **options), truth)
        for stored in (False, True)
    )
    no_worse(ours, stored, 2e-3)


def test_paddings_of_other_lengths(fused):
    """A vocabulary of 33 classes, padded to 40 for the student alone."""
    layers = Layers.random(classes=40, device=fused, num_classes=33)
    teacher = LinearLogits(layers.teacher[0], *(tensor[:33] for tensor in layers.teacher[1:]), chunk_rows=4)
    truth = layers.exact(BY_NAME["ce-kd"])
    ours = layers.loss_and_gradients(
        lambda student, _, target: BY_NAME["ce-kd"].loss(student, teacher, target)
    )
    assert max(errors(ours, truth)) < SINGLE
    assert not ours[2][33:].any()


def test_lists_of_pairs(fused):
    layers = [Layers.random(device=fused) for _ in range(2)]
    hidden = [one.student[0].requires_grad_() for one in layers]
    students = [LinearLogits(*one.student, chunk_rows=4) for one in layers]
    teachers = [LinearLogits(*one.teacher) for one in layers]
    stored = [[form.dense() for form in forms] for forms in (students, teachers)]
    target = layers[0].target
    for reduction in ("sum", "batchmean"):
        found = [
            fastkd.distill_loss(*pair, target, ce_weight=0.5, kd_weight=0.5, reduction=reduction)
            for pair in ((students, teachers), stored)
        ]
        torch.testing.assert_close(*(value for value, _ in found))
        torch.testing.assert_close(*(terms["ce"] for _, terms in found))
        factor = torch.tensor([2.0, -0.5], device=fused)
        gradients = [torch.autograd.grad(value, hidden, factor, retain_graph=True) for value, _ in found]
        torch.testing.assert_close(*gradients)


def test_terms(fused):
    layers = Layers.random(device=fused)
    forms = LinearLogits(*layers.student, chunk_rows=4), LinearLogits(*layers.teacher)
    stored = [form.dense() for form in forms]
    for reduction in ("sum", "none"):
        options = {"ce_weight": 0.3, "tckd_weight": 1.0, "nckd_weight": 2.0, "reduction": reduction}
        ours, theirs = (fastkd.distill_loss(*pair, layers.target, **options)[1] for pair in (forms, stored))
        assert set(ours) == {"ce", "tckd", "nckd"}
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=["bfloat16", "float16"])
def test_autocast_as_linear_has_it(fused, dtype):
    """Also backward inside of autocast; float32 parameters get float32 gradients."""
    layers = Layers.random(device=fused)
    with torch.autocast(fused, dtype=dtype):
        results = [layers.loss_and_gradients(BY_NAME["ce-kd"], stored=stored) for stored in (False, True)]
    truth = layers.exact(BY_NAME["ce-kd"])
    no_worse(*(errors(one, truth) for one in results), FLOOR[dtype])


def test_modules_take_forms(fused):
    layers = Layers.random(device=fused)
    forms = LinearLogits(*layers.student), LinearLogits(*layers.teacher)
    stored = [form.dense() for form in forms]
    for module in (fastkd.KDLoss(), fastkd.JSDLoss(beta=0.3)):
        torch.testing.assert_close(module(*forms), module(*stored))
    module = fastkd.DistillLoss(ce_weight=0.5, kd_weight=0.5)
    torch.testing.assert_close(module(*forms, layers.target)[0], module(*stored, layers.target)[0])


def test_the_form_says_what_its_logits_are():
    layer = nn.Linear(5, 9)
    hidden = torch.randn(2, 3, 5)
    form = LinearLogits(hidden, layer.weight, layer.bias, num_classes=7, scale=2.0)
    assert form.shape == (2, 3, 7)
    assert form.requires_grad
    assert not form.detach().requires_grad
    torch.testing.assert_close(form.dense(), 2 * F.linear(hidden, layer.weight, layer.bias)[..., :7])


def test_a_module_that_owns_the_head(fused):
    head, teacher_head = nn.Linear(12, 33).to(fused), nn.Linear(20, 33, bias=False).to(fused)
    layers = Layers.random(device=fused)
    hidden, teacher_hidden = layers.student[0], layers.teacher[0]
    loss = fastkd.DistillLoss(ce_weight=0.5, kd_weight=0.5)
    module = fastkd.LinearDistillLoss(head, loss, teacher_head=teacher_head, softcap=9.0, chunk_rows=4)
    assert set(module.state_dict()) == {"head.weight", "head.bias", "teacher_head.weight"}
    value, terms = module(hidden, teacher_hidden, layers.target)
    assert set(terms) == {"ce", "kd"}
    logits = 9 * torch.tanh(head(hidden) / 9)
    expected, _ = loss(logits, teacher_head(teacher_hidden).detach(), layers.target)
    torch.testing.assert_close(value, expected)
    gradients = [torch.autograd.grad(one, list(head.parameters())) for one in (value, expected)]
    torch.testing.assert_close(*gradients)
    weight = torch.rand(11, device=fused)
    module = fastkd.LinearDistillLoss(head, fastkd.KDLoss())
    torch.testing.assert_close(
        module(hidden, logits.detach(), weight=weight),
        fastkd.kd_loss(head(hidden), logits.detach(), weight=weight),
    )


def test_a_module_that_knows_the_teachers_head(fused):
    head, teacher_head = nn.Linear(12, 16).to(fused), nn.Linear(20, 16).to(fused)
    layers = Layers.random(device=fused)
    hidden, other = layers.student[0], layers.teacher[0]
    padded = fastkd.LinearDistillLoss(head, fastkd.KDLoss(), teacher_head=teacher_head, num_classes=12)
    expected = fastkd.kd_loss(head(hidden)[:, :12], teacher_head(other)[:, :12].detach())
    torch.testing.assert_close(padded(hidden, other), expected)
    capped = fastkd.LinearDistillLoss(
        head, fastkd.KDLoss(), teacher_head=teacher_head, softcap=2.0, teacher_form={"softcap": 1.0}
    )
    expected = fastkd.kd_loss(2 * torch.tanh(head(hidden) / 2), torch.tanh(teacher_head(other)).detach())
    torch.testing.assert_close(capped(hidden, other), expected)


def test_bad_modules():
    for options, message in (
        ({"teacher_head": nn.Linear(3, 5)}, "head has 4 classes and teacher_head 5"),
        ({"teacher_form": {"scale": 2.0}}, "there is no teacher_head"),
        ({"teacher_head": nn.Linear(3, 4), "teacher_form": {"scale": "2"}}, r"teacher_form\.scale"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            fastkd.LinearDistillLoss(nn.Linear(3, 4), fastkd.KDLoss(), **options)
    for arguments, message in (
        ((nn.Conv2d(3, 3, 1), fastkd.KDLoss()), "head is a Conv2d"),
        ((nn.Linear(3, 4), fastkd.kd_loss), "loss is a function"),
    ):
        with pytest.raises(TypeError, match=message):
            fastkd.LinearDistillLoss(*arguments)
    with pytest.raises(TypeError, match="chunks"):
        fastkd.LinearDistillLoss(nn.Linear(3, 4), fastkd.KDLoss(), chunks=3)
    with pytest.raises(ValueError, match=r"num_classes is 5"):
        fastkd.LinearDistillLoss(nn.Linear(3, 4), fastkd.KDLoss(), num_classes=5)
