"""``LinearLogits``: rows that are not read, strides, autograd's modes, transforms, memory."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fastkd
from fastkd import BackendUnavailable, LinearLogits
from fastkd.ops import chunks
from tests.cases import BY_NAME
from tests.losses.linear_cases import Layers, errors

CE_KD = BY_NAME["ce-kd"]


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def kd(*tensors, teacher, **options):
    return fastkd.kd_loss(LinearLogits(*tensors, chunk_rows=4), teacher, **options)


@pytest.fixture
def layers(fused):
    return Layers.random(device=fused)


@pytest.mark.parametrize("reduction", ["sum", "batchmean"])
@pytest.mark.parametrize("trace", [False, True], ids=["eager", "compiled"])
def test_rows_that_are_not_read_may_hold_anything(fused, trace, reduction):
    """In hidden states and in stored logits of the teacher, with a softcap; and cost no matmul."""
    layers = Layers.random(device=fused, softcap=20.0)
    weight = torch.rand(11, device=fused) + 0.5
    weight[[0, 6]] = 0
    layers.target[3] = -100
    options = {"weight": weight, "reduction": reduction}
    truth = layers.exact(CE_KD, **options)
    for model in (layers.student, layers.teacher):
        model[0][[0, 3, 6]] = torch.nan
    loss = compiled(CE_KD.loss) if trace else CE_KD.loss
    assert max(errors(layers.loss_and_gradients(loss, **options), truth)) < 2e-5
    with fastkd.use_backend("eager"):
        assert max(errors(layers.loss_and_gradients(CE_KD, **options), truth)) < 2e-5
    stored = LinearLogits(*layers.teacher).dense()
    hidden = layers.student[0].clone().requires_grad_()
    value = fastkd.kd_loss(
        LinearLogits(hidden, *layers.student[1:]), stored, weight=weight, target=layers.target
    )
    assert torch.isfinite(torch.autograd.grad(value, hidden)[0]).all()


def test_rows_not_read_of_a_captured_graph(monkeypatch, layers):
    """Their number is not known there: they are computed, with hidden states of 0."""
    weight = torch.tensor([0.0, *torch.rand(10)], device=layers.target.device)
    truth = layers.exact(CE_KD, weight=weight)
    layers.student[0][0] = torch.nan
    monkeypatch.setattr(chunks, "_kept_rows", lambda weight: None)
    assert max(errors(layers.loss_and_gradients(CE_KD, weight=weight), truth)) < 2e-5


def test_rows_without_weight_cost_no_matmul(monkeypatch, layers):
    rows = []
    logits = chunks._Layer.logits
    monkeypatch.setattr(
        chunks._Layer, "logits", lambda self, part: rows.append(len(out := logits(self, part))) or out
    )
    layers.target[2:9] = -100
    layers.loss_and_gradients(CE_KD, chunk_rows=None)
    assert rows == [4, 4]
    rows.clear()
    layers.loss_and_gradients(BY_NAME["ce"])  # reads no teacher
    assert sum(rows) == 4


def test_rows_of_float16_that_are_not_read_of_a_captured_graph(monkeypatch, fused):
    """What the row kernel makes of them is multiplied by 0 afterwards, which NaN would survive."""
    layers = Layers.random(dtype=torch.float16, device=fused)
    weight = torch.tensor([0.0, *torch.rand(10)], device=fused)
    for model in (layers.student, layers.teacher):
        model[0][0] = torch.nan
    monkeypatch.setattr(chunks, "_kept_rows", lambda weight: None)
    value, *gradients = layers.loss_and_gradients(BY_NAME["kd"], weight=weight)
    assert all(torch.isfinite(found).all() for found in (value, *gradients))
    assert not gradients[0][0].any()


def test_constant_logits_of_float16_standardized(fused):
    """Their deviation is 0, by which the gradient is scaled while it is stored."""
    hidden = torch.randn(4, 8, device=fused).half()
    hidden[1] = 0
    hidden.requires_grad_()
    weight, teacher = (torch.randn(33, 8, device=fused).half() for _ in range(2))
    with_constant = fastkd.kd_loss(
        LinearLogits(hidden, weight), LinearLogits(hidden.detach(), teacher), standardize=True
    )
    (gradient,) = torch.autograd.grad(with_constant, hidden)
    assert torch.isfinite(gradient).all()
    assert gradient[0].any()


@pytest.mark.parametrize(
    ("chosen", "rows", "classes", "chunk"),
    [
        (100, 250, 33, 84),  # of about equal size
        (0, 10_000, 1_000_000, 223),  # 80 MiB hold 20 rows, too few for a matmul
        (0, 10_000, 10_000, 2000),
        (0, 100, 10_000, 100),
        (0, 0, 33, 1),
    ],
)
def test_chunks(chosen, rows, classes, chunk):
    assert chunks.chunk_rows_of(chosen, rows, classes, 4, "cpu") == chunk


def test_parts_of_a_chunk():
    """No indices where all rows count, which would copy them; and what is raised to float32 is bounded."""
    assert chunks._kept_rows(torch.ones(3)) is None
    assert chunks._kept_rows(torch.tensor([1.0, 0.0, -1.0])).tolist() == [0, 2]
    for rows, width in ((4096, 8), (8, 4096)):
        blocks = chunks._blocks(torch.empty(rows, 1200), width)
        assert [block.stop - block.start for block in blocks] == [512, 512, 176]
        assert blocks[0].start == 0


@pytest.mark.parametrize("leading", [(0,), (3, 0)])
def test_no_rows(layers, leading):
    leaves = [torch.randn(*leading, 12), layers.student[1], layers.student[2]]
    leaves = [leaf.to(layers.target.device).requires_grad_() for leaf in leaves]
    teacher = LinearLogits(torch.randn(*leading, 20).to(leaves[0]), *layers.teacher[1:])
    value = kd(*leaves, teacher=teacher)
    value.backward()
    assert value == 0
    assert leaves[0].grad.shape == leaves[0].shape
    assert not leaves[1].grad.any()
    assert not leaves[2].grad.any()


def test_all_rows_ignored(layers):
    layers.target.fill_(-100)
    for model in (layers.student, layers.teacher):
        model[0].fill_(torch.nan)
    value, *gradients = layers.loss_and_gradients(CE_KD)
    assert value == 0
    assert not any(gradient.any() for gradient in gradients)


def test_strides(layers):
    """Leading dimensions that are no rows, weights stored as [H, C], expanded and with gaps."""
    teacher = LinearLogits(*layers.teacher)
    hidden, weight, bias = layers.student
    truth = layers.exact(BY_NAME["kd"], grad_output=1.0)

    def check(view_hidden, view_weight, view_bias=lambda x: x, teacher=teacher):
        leaves = [view_hidden(hidden), view_weight(weight), view_bias(bias)]
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        value = kd(*leaves, teacher=teacher)
        gradients = torch.autograd.grad(value, leaves)
        assert (
            max(
                errors(
                    [value, *(g.reshape(t.shape) for g, t in zip(gradients, truth[1:], strict=True))], truth
                )
            )
            < 2e-5
        )

    check(lambda x: x, lambda x: x.t().contiguous().t())
    check(lambda x: x.t().contiguous().t(), lambda x: x.repeat_interleave(2, 1)[:, ::2])
    check(lambda x: x.repeat(2, 1)[:11], lambda x: x, lambda x: x.repeat_interleave(3)[::3])
    three = LinearLogits(layers.teacher[0][None, :, None], *layers.teacher[1:])
    check(lambda x: x[None, :, None], lambda x: x, teacher=three)
    check(lambda x: x, lambda x: x, teacher=teacher.dense().t().contiguous().t())


def test_stored_logits_of_two_strides(layers):
    """[:, :-1] of [B, T, C] is read in place."""
    big = torch.randn(3, 5, 33, device=layers.target.device)
    hidden = torch.randn(3, 4, 12, device=layers.target.device)
    weight = layers.student[1]
    student = big.clone().requires_grad_()
    row_weight = torch.rand(3, 4, device=hidden.device).round(decimals=1)
    row_weight[0, 0] = 0
    form = LinearLogits(hidden, weight, chunk_rows=5)
    for options in ({}, {"weight": row_weight}):
        torch.testing.assert_close(
            fastkd.kd_loss(form, big[:, :-1], **options), fastkd.kd_loss(form.dense(), big[:, :-1], **options)
        )
        gradients = [
            torch.autograd.grad(fastkd.kd_loss(student[:, :-1], teacher, **options), student)[0]
            for teacher in (form, form.dense())
        ]
        torch.testing.assert_close(*gradients)


class _Made(TorchDispatchMode):
    """Notes the operators whose result is a new tensor of this shape."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.operators = shape, []

    def __torch_dispatch__(self, function, types, given=(), named=None):
        result = function(*given, **(named or {}))
        if isinstance(result, torch.Tensor) and result.shape == self.shape:
            known = [*given, *(named or {}).values()]
            if not any(result is other for other in known):
                self.operators.append(function)
        return result


@pytest.mark.skipif(
    torch.__version__ < "2.12", reason="addmm with out_dtype fails on tensors that are not real in torch 2.11"
)
def test_products_on_a_gpu_are_summed_where_they_stay():
    """With tensors that are not real; bfloat16 operands, float32 sums."""
    with FakeTensorMode():
        half, wide = ({"device": "cuda", "dtype": dtype} for dtype in (torch.bfloat16, torch.float32))
        gradient, hidden, weight = (torch.empty(*size, **half) for size in ((6, 50), (6, 7), (50, 7)))
        to_weight, to_hidden = torch.empty(50, 7, **wide), torch.empty(6, 7, **wide)
        with _Made((50, 7)) as made:
            chunks._accumulate(gradient, hidden, 0.5, to_weight)
        assert made.operators == []
        with _Made((6, 7)) as made:
            chunks._multiply(gradient, weight, to_hidden)
        assert made.operators == []


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_what_needs_no_gradient_gets_none(monkeypatch, layers, frozen):
    products = []
    for name in ("_multiply", "_accumulate"):
        whole = getattr(chunks, name)
        monkeypatch.setattr(chunks, name, lambda *given, f=whole, n=name: products.append(n) or f(*given))
    leaves = [leaf.requires_grad_(index != frozen) for index, leaf in enumerate(layers.student)]
    value = fastkd.kd_loss(LinearLogits(*leaves), LinearLogits(*layers.teacher))
    assert products.count("_multiply") == (frozen != 0)
    assert products.count("_accumulate") == 2 - (frozen != 0)
    value.backward()
    assert [leaf.grad is None for leaf in leaves] == [index == frozen for index in range(3)]


def test_a_tied_weight_adds_up(layers):
    """The embedding and the head are one parameter, and a second head shares it."""
    tokens = torch.randint(0, 33, (11,), device=layers.target.device)
    weight = layers.student[1].clone().requires_grad_()
    teacher = LinearLogits(*layers.teacher)

    def gradient(form):
        hidden = F.embedding(tokens, weight)
        student = LinearLogits(hidden.tanh(), weight, chunk_rows=4)
        shared = LinearLogits(hidden.detach(), weight)
        forms = [(student, teacher), (shared, teacher), (student, shared.detach())]
        return torch.autograd.grad(
            sum(fastkd.kd_loss(*(form(one) for one in pair)) for pair in forms), weight
        )[0]

    torch.testing.assert_close(gradient(lambda one: one), gradient(lambda one: one.dense()))


def test_autograd_modes(layers):
    leaves = [leaf.requires_grad_() for leaf in layers.student]
    teacher = LinearLogits(*layers.teacher)
    value = kd(*leaves, teacher=teacher)
    first = torch.autograd.grad(value, leaves, torch.tensor(3.0).to(value), retain_graph=True)
    again = torch.autograd.grad(value, leaves, torch.tensor(3.0).to(value), retain_graph=True)
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(value, leaves, create_graph=True)
    value = kd(*leaves, teacher=teacher)
    batch = torch.autograd.grad(
        value, leaves, torch.tensor([3.0, 0.0]).to(value), is_grads_batched=True, retain_graph=True
    )
    for one, other in zip(first, batch, strict=True):
        torch.testing.assert_close(one, other[0])
        assert not other[1].any()
    torch.autograd.grad(value, leaves)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(value, leaves)
    with torch.inference_mode():
        constant = LinearLogits(*(tensor.clone() for tensor in layers.teacher))
    torch.testing.assert_close(torch.autograd.grad(kd(*leaves, teacher=constant) * 3, leaves), first)


def test_a_float16_student_of_an_inference_teacher(layers):
    student = torch.randn(11, 33, device=layers.target.device).half().requires_grad_()
    with torch.inference_mode():
        teacher = LinearLogits(*(tensor.half() for tensor in layers.teacher))
        stored = teacher.dense()
    gradients = [
        torch.autograd.grad(fastkd.kd_loss(student, one) * 9, student)[0] for one in (teacher, stored)
    ]
    torch.testing.assert_close(*gradients, atol=1e-3, rtol=1e-2)


def test_transforms_compute_in_plain_torch(layers):
    teacher = LinearLogits(*(tensor.double() for tensor in layers.teacher))
    hidden, weight, bias = (tensor.double() for tensor in layers.student)

    def loss(hidden):
        return fastkd.kd_loss(LinearLogits(hidden, weight, bias), teacher)

    name = fastkd.get_backend()
    with fastkd.use_backend("auto"):
        torch.testing.assert_close(torch.func.grad(loss)(hidden), torch.func.jacrev(loss)(hidden))
        tangent = torch.func.jvp(loss, (hidden,), (torch.ones_like(hidden),))[1]
        torch.testing.assert_close(tangent, torch.func.grad(loss)(hidden).sum())
    with fastkd.use_backend(name), pytest.raises(BackendUnavailable, match=r"torch\.func"):
        torch.func.grad(lambda x: kd(x, *layers.student[1:], teacher=LinearLogits(*layers.teacher)))(
            layers.student[0]
        )


def test_second_derivatives_in_plain_torch():
    layers = Layers.random(dtype=torch.float64)
    teacher = LinearLogits(*layers.teacher)
    leaves = [leaf.requires_grad_() for leaf in layers.student]
    with fastkd.use_backend("eager"):
        assert torch.autograd.gradgradcheck(lambda *leaves: kd(*leaves, teacher=teacher), leaves)


@pytest.mark.parametrize("device", ["meta", "fake"])
def test_tensors_without_numbers(device):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with fastkd.use_backend("auto"), FakeTensorMode() if device == "fake" else torch.device("meta"):
        leaves = [torch.randn(*size, requires_grad=True) for size in ((11, 12), (33, 12), (33,))]
        value = kd(*leaves, teacher=LinearLogits(torch.randn(11, 20), torch.randn(33, 20)))
        value.backward()
    assert value.shape == ()
    assert [leaf.grad.shape for leaf in leaves] == [leaf.shape for leaf in leaves]


def test_peak_memory():
    """Above inputs and gradients of a step: three chunks; stored logits are three [N, C] and more."""
    rows, classes, width = 512, 4096, 16
    leaves = [torch.randn(rows, width), nn.Linear(width, classes).weight.detach()]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    teacher = LinearLogits(torch.randn(rows, width), torch.randn(classes, width))

    def peak(form):
        def step():
            for leaf in leaves:
                leaf.grad = None
            loss = fastkd.kd_loss(form(LinearLogits(*leaves, chunk_rows=32)), form(teacher))
            (loss * 3).backward()

        step()
        return clock.extra_memory(step)

    from fastkd.bench.protocol import make_clock

    clock = make_clock("cpu")
    chunk, logits, gradients = 4 * 32 * classes, 4 * rows * classes, 4 * width * (rows + classes)
    assert peak(lambda form: form) < 3 * chunk + gradients + 2**16
    # A step frees the gradients of the one before.
    assert peak(lambda form: form.dense()) > 3 * logits - gradients


def test_a_weight_freed_before_backward_is_an_error_and_not_read():
    """In float16 the rows are recomputed there, and FSDP may have freed the teacher's weight."""
    student = torch.randn(6, 20, dtype=torch.float16, requires_grad=True)
    hidden, weight = (torch.randn(n, 8, dtype=torch.float16) for n in (6, 20))
    with fastkd.use_backend("native"):
        loss = fastkd.kd_loss(student, LinearLogits(hidden, weight))
        weight.untyped_storage().resize_(0)
        with pytest.raises(ValueError, match="its storage is empty"):
            loss.backward()
