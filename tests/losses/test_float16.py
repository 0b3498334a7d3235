"""float16: the loss scale is applied before the gradient is rounded, for every loss and backend."""

import pytest
import torch

import fastkd
from tests.cases import BY_NAME, each_kernel, error, exact, make_logits

SCALE = 65536.0


def scaled_gradient(case, student, teacher, target, grad_output, **options):
    student = student.detach().requires_grad_()
    loss = case.loss(
        student.float() if options.pop("widened", False) else student, teacher, target, **options
    )
    loss.backward(grad_output)
    return student.grad


def flushed(gradient, true_gradient):
    """The fraction of elements that are 0 although their true value is not."""
    return ((gradient == 0) & (true_gradient != 0)).double().mean().item()


@each_kernel
def test_no_more_underflows_than_with_eager_on_float32_logits(fused, case):
    rows, classes = 3, 8193  # past a tile
    student, teacher, target = make_logits(rows, classes, torch.float16, fused, spread=2.0)
    grad_output = torch.tensor(SCALE / 64, device=fused)  # of a batch 64 times as large
    _, truth = exact(case, student, teacher, target, grad_output.double())
    ours = scaled_gradient(case, student, teacher, target, grad_output)
    with fastkd.use_backend("eager"):
        eager = scaled_gradient(case, student, teacher, target, grad_output, widened=True)
    assert ours.dtype == torch.float16
    assert flushed(ours, truth) <= flushed(eager, truth) + 1e-4
    assert error(ours, truth) <= 1.5 * error(eager, truth) + 1e-6


def test_the_share_that_was_lost(fused):
    """If rounded before the loss scale, nearly half of a million small values are 0."""
    rows, classes = (64, 131072) if fastkd.get_backend() == "native" else (1, 131072)
    student = (2 * torch.randn(rows, classes, device=fused)).half().requires_grad_()
    teacher = (2 * torch.randn(rows, classes, device=fused)).half()
    (fastkd.kd_loss(student, teacher, temperature=1.0) * SCALE * (rows / 64)).backward()
    assert (student.grad == 0).double().mean() < 1e-3
    of_a_batch_of_64 = student.grad.double() / SCALE
    assert (of_a_batch_of_64.half() == 0).double().mean() > 0.4


@pytest.mark.parametrize("name", ["kd", "ce-kd", "dkd", "lskd", "jsd", "binary-kl-norm"])
def test_pairs_have_their_own_grad_output(fused, name):
    case = BY_NAME[name]
    drawn = [make_logits(4, 33, torch.float16, fused) for _ in range(3)]
    target = drawn[0][2]
    students = [student.requires_grad_() for student, _, _ in drawn]
    teachers = [teacher for _, teacher, _ in drawn]
    weight = torch.tensor([0.5, 2.0, 0.0, 1.0], device=fused)
    for reduction, shape in (("batchmean", (3,)), ("none", (3, 4))):
        grad_output = torch.randn(shape, device=fused) * 1000
        losses = case.loss(students, teachers, target, reduction=reduction, weight=weight)
        gradients = torch.autograd.grad(losses, students, grad_output, retain_graph=True)
        again = torch.autograd.grad(losses, students, grad_output)
        for pair, student in enumerate(students):
            given = (student.detach(), teachers[pair], target, grad_output[pair].double())
            _, truth = exact(case, *given, reduction=reduction, weight=weight)
            assert error(gradients[pair], truth) < 2e-3
            assert torch.equal(gradients[pair], again[pair])


def test_compiled_and_retained(fused):
    torch._dynamo.reset()
    student, teacher, target = make_logits(4, 33, torch.float16, fused)
    student.requires_grad_()
    case = BY_NAME["ce-kd"]
    compiled = torch.compile(lambda s, t, y: case.loss(s, t, y) * SCALE, fullgraph=True, backend="aot_eager")
    (ours,) = torch.autograd.grad(compiled(student, teacher, target), student)
    _, truth = exact(case, student.detach(), teacher, target)
    assert error(ours, SCALE * truth) < 2e-3


def test_a_student_changed_before_backward_is_an_error(fused):
    """The gradient is computed from the logits in backward, as eager's is."""
    student, teacher, _ = make_logits(4, 33, torch.float16, fused)
    hidden = student.requires_grad_() * 1
    loss = fastkd.kd_loss(hidden, teacher)
    with torch.no_grad():
        hidden += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_weight_gradient_under_autocast_and_a_scaler(fused):
    """Of a last layer, compared with the same step in float64."""
    if fused == "cpu" and fastkd.get_backend() == "triton":
        rows, classes = 32, 4096
    else:
        rows, classes = 256, 21841
    hidden = torch.randn(rows, 64, device=fused)
    layer = torch.nn.Linear(64, classes, device=fused)
    teacher = 3 * torch.randn(rows, classes, device=fused)

    def weight_gradient(autocast, backend):
        layer.zero_grad()
        with torch.autocast(fused, dtype=torch.float16, enabled=autocast), fastkd.use_backend(backend):
            logits = layer(hidden)
            loss = fastkd.kd_loss(logits.float() if backend == "eager" else logits, teacher)
        (loss * SCALE).backward()
        return layer.weight.grad.double() / SCALE

    truth = weight_gradient(False, fastkd.get_backend())
    ours, eager = weight_gradient(True, fastkd.get_backend()), weight_gradient(True, "eager")
    assert error(ours, truth) <= 1.2 * error(eager, truth)


@pytest.mark.parametrize("gamma", [-1.0, -4.0, 1.5])
def test_nkd_of_any_sign_behind_a_layer(fused, gamma):
    """The bound by which a chunk's gradient is scaled is not 0 or below."""
    hidden, head = torch.randn(6, 4, device=fused).half(), torch.randn(10, 4, device=fused).half()
    teacher, target = torch.randn(6, 10, device=fused).half(), torch.randint(0, 10, (6,), device=fused)

    def gradient(dtype):
        inputs = hidden.detach().to(dtype).clone().requires_grad_()
        form = fastkd.LinearLogits(inputs, head.to(dtype))
        fastkd.nkd_loss(form, teacher.to(dtype), target, gamma=gamma).backward()
        return inputs.grad

    torch.testing.assert_close(gradient(torch.float16).float(), gradient(torch.float32), rtol=1e-2, atol=1e-3)
