"""The torch operator: schema and shapes, autograd, torch.compile, autocast."""

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastkd
from fastkd.ops import backend, native, operators, spec
from fastkd.ops.call import Call
from tests.cases import BY_NAME, each_kernel, exact, loss_and_gradient, make_logits

# Per loss, the case with the most options set.
OPTIONS = {
    loss.name: max((case.options for case in loss.cases), key=lambda options: sum(map(bool, options)))
    for loss in spec.LOSSES.values()
}


@pytest.mark.parametrize("reduced", [True, False])
@pytest.mark.parametrize("loss", OPTIONS)
def test_opcheck(fused, loss, reduced):
    student, teacher, target = make_logits(4, 11, torch.float32, fused)
    weights = torch.rand(4, device=fused)
    call = Call(target, weights, 2, loss, OPTIONS[loss], None, fastkd.get_backend(), reduced, True, True)
    pairs = ([student.requires_grad_(), (student.detach() + 1).requires_grad_()], [teacher, teacher - 1])
    for inputs in (pairs, (pairs[0][:1], pairs[1][:1])):
        torch.library.opcheck(torch.ops.fastkd.row_loss.default, (*inputs, *call.operands))


def test_fake_shapes_are_the_real_ones(fused):
    student, teacher, target = make_logits(5, 9, torch.bfloat16, fused)
    for loss, options in OPTIONS.items():
        for reduced, terms in ((False, False), (False, True), (True, False), (True, True)):
            call = Call(target, None, 1, loss, options, None, fastkd.get_backend(), reduced, terms, True)
            for pairs in (1, 2):
                inputs = ([student] * pairs, [teacher] * pairs)
                meta_inputs = [[logits.to("meta") for logits in one] for one in inputs]
                real = torch.ops.fastkd.row_loss(*inputs, *call.operands)
                meta = torch.ops.fastkd.row_loss(*meta_inputs, target.to("meta"), *call.operands[1:])
                assert [(x.shape, x.dtype) for x in real] == [(x.shape, x.dtype) for x in meta]


@each_kernel
def test_backward_twice_over_a_retained_graph(fused, case):
    student, teacher, target = make_logits(4, 33, torch.float32, fused)
    student.requires_grad_()
    loss = case.loss(student, teacher, target)
    expected = exact(case, student.detach(), teacher, target)[1].float()
    rounding = 5e-7 * max(1.0, expected.abs().max().item())  # of terms that may cancel
    for factor in (0.0, 2.5, 1.0):
        (gradient,) = torch.autograd.grad(loss * factor, student, retain_graph=True)
        torch.testing.assert_close(gradient, factor * expected, rtol=1e-4, atol=rounding)
    loss.backward()
    torch.testing.assert_close(student.grad, expected, rtol=1e-4, atol=rounding)


def test_a_graph_that_is_not_retained_gives_its_gradient_once(fused):
    student, teacher, _ = make_logits(4, 33, torch.float32, fused)
    student.requires_grad_()
    loss = fastkd.kd_loss(student, teacher)
    loss.backward(torch.tensor(2.0, device=fused))
    first = student.grad.clone()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    assert torch.equal(student.grad, first)


def test_sums_over_the_rows_of_each_pair():
    """Of what a launcher has not summed, as on a GPU."""
    values = torch.arange(6.0)
    assert torch.equal(operators._sum_rows(values, 1), torch.tensor(15.0))
    assert torch.equal(operators._sum_rows(values, 2), torch.tensor([3.0, 12.0]))
    assert torch.equal(operators._sum_rows(torch.stack([values, -values]), 2)[1], torch.tensor([-3.0, -12.0]))


def test_a_frozen_student_among_others(fused):
    (first, teacher, _), (frozen, _, _) = (make_logits(4, 33, torch.float32, fused) for _ in range(2))
    first.requires_grad_()
    loss = fastkd.kd_loss([first, frozen], [teacher, teacher])
    (found,) = torch.autograd.grad(loss.sum(), first)
    (alone,) = torch.autograd.grad(fastkd.kd_loss(first, teacher), first)
    torch.testing.assert_close(found, alone)


@pytest.mark.parametrize("pairs", [1, 2])
def test_no_rows(fused, pairs):
    students = [torch.empty(0, 33, device=fused, requires_grad=True) for _ in range(pairs)]
    teachers = [torch.empty(0, 33, device=fused)] * pairs
    loss = fastkd.kd_loss(students[0], teachers[0]) if pairs == 1 else fastkd.kd_loss(students, teachers)
    assert loss.shape == (() if pairs == 1 else (pairs,))
    assert not loss.any()
    assert [g.shape for g in torch.autograd.grad(2 * loss.sum(), students)] == [(0, 33)] * pairs


def test_a_factor_near_1_is_a_factor(fused):
    """Scaling is spared for 1 alone."""
    student, teacher, _ = make_logits(4, 33, torch.float32, fused)
    student.requires_grad_()
    layer = [torch.randn(size, 8, device=fused) for size in (4, 33)]
    layer[0].requires_grad_()
    for leaf, logits in ((student, student), (layer[0], fastkd.LinearLogits(*layer))):
        one, other = (
            torch.autograd.grad(fastkd.kd_loss(logits, teacher) * factor, leaf)[0] for factor in (1.0, 1.001)
        )
        torch.testing.assert_close(other, 1.001 * one, rtol=1e-5, atol=1e-9)
        assert not torch.equal(other, one)


def test_gradient_of_a_shared_loss_is_not_overwritten(fused):
    """Two uses of a loss with different factors add up, without scaling each other's gradient."""
    student, teacher, target = make_logits(3, 20, torch.float32, fused)
    student.requires_grad_()
    hidden = student * 1.0
    hidden.retain_grad()
    loss = fastkd.dkd_loss(hidden, teacher, target)
    (3 * loss + loss.detach() * hidden.sum()).backward()
    expected = 3 * exact(BY_NAME["dkd"], student.detach(), teacher, target)[1].float() + loss.detach()
    torch.testing.assert_close(student.grad, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(hidden.grad, expected, rtol=1e-4, atol=1e-6)


@each_kernel
def test_second_derivatives_are_rejected(fused, case):
    student, teacher, target = make_logits(3, 8, torch.float32, fused)
    loss = case.loss(student.requires_grad_(), teacher, target)
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(loss, student, create_graph=True)


@pytest.mark.parametrize("form", ["dense", "LinearLogits"])
@pytest.mark.parametrize("how", ["is_grads_batched", "vectorize", "a dispatch mode"])
def test_second_derivatives_are_rejected_wherever_they_are_asked_for(fused, form, how):
    student, teacher, _ = make_logits(3, 8, torch.float32, fused)
    head = torch.randn(8, 8, device=fused)
    student.requires_grad_()

    def loss(s):
        logits = fastkd.LinearLogits(s, head) if form == "LinearLogits" else s
        return fastkd.kd_loss(logits, teacher) + s.square().sum()

    def differentiate():
        if how == "is_grads_batched":
            factors = torch.ones(2, device=fused)
            torch.autograd.grad(loss(student), student, factors, create_graph=True, is_grads_batched=True)
        elif how == "vectorize":
            torch.autograd.functional.jacobian(loss, student, create_graph=True, vectorize=True)
        else:
            with FlopCounterMode(display=False):
                torch.autograd.grad(loss(student), student, create_graph=True)

    with pytest.raises(RuntimeError, match="create_graph"):
        differentiate()


def test_autocast_leaves_the_arithmetic_in_float32(fused):
    student, teacher, target = make_logits(4, 50, torch.bfloat16, fused)
    student.requires_grad_()
    with torch.autocast(fused, dtype=torch.bfloat16):
        inside = fastkd.kd_loss(student, teacher)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, fastkd.kd_loss(student, teacher))


@pytest.mark.parametrize("name", ["kd", "ce-dkd", "lskd", "binary-kl-norm"])
def test_compiles_whole_and_does_not_recompile_for_a_new_batch_size(fused, name):
    case = BY_NAME[name]
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = torch.compile(lambda s, t, y: case.loss(1.0 * s, t, y), fullgraph=True)
    for rows in (4, 7, 9, 12):
        student, teacher, target = make_logits(rows, 21, torch.float32, fused)
        expected = loss_and_gradient(case, student, teacher, target)
        student.requires_grad_()
        loss = compiled(student, teacher, target)
        loss.backward()
        torch.testing.assert_close((loss.detach(), student.grad), expected)
    assert counters["stats"]["unique_graphs"] == 2, "one graph for a fixed and one for any batch size"


def test_compiled_code_follows_a_change_of_backend(fused):
    torch._dynamo.reset()
    student, teacher, _ = make_logits(4, 21, torch.float32, fused)
    compiled = torch.compile(lambda s, t: fastkd.kd_loss(s, t), fullgraph=True)
    first = compiled(student, teacher)
    with fastkd.use_backend("eager"):
        second = compiled(student, teacher)
    torch.testing.assert_close(first, second)


def test_a_label_out_of_range_poisons_its_row_where_no_check_is_made(fused):
    """On a GPU labels are not checked on the host, so a wrong one must give NaN. Bypasses the CPU's
    checks."""
    student, teacher, target = make_logits(3, 9, torch.float32, fused)
    target[1] = 9
    call = Call(target, None, 1, "softmax", OPTIONS["softmax"], None, fastkd.get_backend(), False, True)
    rows, _ = operators.row_loss([student], [teacher], call)
    assert torch.isnan(rows[1])
    assert torch.isfinite(rows[[0, 2]]).all()


def test_compiled_code_takes_the_faster_backend_for_its_classes(monkeypatch):
    """As on a GPU where native is faster for long rows."""
    may_be_faster = torch.compiler.assume_constant_result(lambda device: True)
    monkeypatch.setattr(backend, "native_may_be_faster", may_be_faster)
    monkeypatch.setattr(backend, "_automatic", lambda device_type: "triton")
    chosen = []
    monkeypatch.setattr(operators, "launcher_of", lambda name: chosen.append(name) or native)
    compiled = torch.compile(fastkd.kd_loss, backend="eager", fullgraph=True)
    for classes, rows, expected in ((9000, 128, "native"), (9000, 127, "native"), (100, 128, "triton")):
        student, teacher, _ = make_logits(rows, classes, torch.bfloat16)
        for run, name in ((compiled, expected), (fastkd.kd_loss, expected if rows > 127 else "triton")):
            run(student, teacher)
            assert chosen.pop() == name


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@needs_cuda
@each_kernel
def test_cuda_graph_capture(case):
    student, teacher, target = make_logits(6, 1000, torch.float32, "cuda")
    student.requires_grad_()

    def step():
        student.grad = None
        loss = case.loss(student, teacher, target)
        loss.backward()
        return loss

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    with torch.no_grad():
        student.copy_(torch.randn_like(student))
    graph.replay()
    expected = loss_and_gradient(case, student.detach(), teacher, target)
    torch.testing.assert_close((loss.detach(), student.grad), expected)


@needs_cuda
def test_the_first_loss_may_be_in_the_cuda_graphs_of_compiled_code():
    """In a new process, as what the first loss allocates for good would be in the graphs' memory."""
    code = """
import torch, fastkd
fastkd.set_backend("triton")
s, t = (torch.randn(256, 1000, device="cuda") for _ in range(2))
s.requires_grad_()
loss = torch.compile(lambda s, t: fastkd.kd_loss(s, t), mode="reduce-overhead")
gradients = [torch.autograd.grad(loss(s, t), s)[0].clone() for _ in range(4)]
(expected,) = torch.autograd.grad(fastkd.kd_loss(s, t), s)
for gradient in gradients:
    torch.testing.assert_close(gradient, expected)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_cuda
def test_cuda_graphs_that_were_captured_on_one_stream_may_replay_at_once():
    pairs = [make_logits(64, 1000, torch.float32, "cuda")[:2] for _ in range(2)]
    expected = [fastkd.kd_loss(*pair) for pair in pairs]
    graphs, losses = [torch.cuda.CUDAGraph() for _ in pairs], []
    for graph, pair in zip(graphs, pairs, strict=True):
        with torch.cuda.graph(graph):
            losses.append(fastkd.kd_loss(*pair))
    streams = [torch.cuda.Stream() for _ in graphs]
    torch.cuda.synchronize()
    for _ in range(100):
        for stream, graph in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(losses, expected)


@needs_cuda
@each_kernel
def test_cuda_does_not_synchronise(case):
    student, teacher, target = make_logits(6, 1000, torch.float32, "cuda")
    target[1] = -100
    loss_and_gradient(case, student, teacher, target)  # compiles
    try:
        torch.cuda.set_sync_debug_mode("error")
        loss_and_gradient(case, student, teacher, target, torch.tensor(2.0).cuda(non_blocking=True))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
def test_cuda_kernels_are_compiled_once_for_all_batch_sizes():
    from fastkd.ops.triton import pointwise_rows, softmax_rows

    def compiled():
        device = torch.cuda.current_device()
        kernels = (softmax_rows.softmax_rows, pointwise_rows.pointwise_rows, pointwise_rows.scale_rows)
        return [len(kernel.device_caches[device][0]) for kernel in kernels]

    before = None
    for rows in (16, 1, 7, 131, 1000):
        student, teacher, target = make_logits(rows, 1000, torch.float32, "cuda")
        for name in ("dkd", "binary-kl-norm"):
            loss_and_gradient(BY_NAME[name], student, teacher, target, torch.tensor(2.0, device="cuda"))
        before = before or compiled()
        assert compiled() == before
