"""Tensors whose values are not in their memory: each gives the right result, or an error that names it."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

import fastkd
from fastkd.ops.layout import as_rows
from tests.cases import BY_NAME, assert_matches, each_kernel, error, loss_and_gradient, make_logits

# ---- weights and labels of any stride ---------------------------------------------------------------


@each_kernel
@pytest.mark.parametrize("layout", ["every second", "expanded", "column", "half", "double"])
def test_weights_of_any_layout(fused, case, layout):
    student, teacher, target = make_logits(6, 40, torch.float32, fused)
    values = torch.tensor([0.5, 2.0, 0.0, 1.0, -1.0, 3.0], device=fused)
    weight = {
        "every second": lambda: torch.stack([values, torch.full_like(values, 1e9)], 1).flatten()[::2],
        "expanded": lambda: values[:1].expand(6),
        "column": lambda: torch.stack([values, torch.full_like(values, 1e9)], 1)[:, 0],
        "half": lambda: values.half(),
        "double": lambda: values.double(),
    }[layout]()
    for reduction in ("batchmean", "none"):
        grad_output = torch.randn(6 if reduction == "none" else (), device=fused)
        assert_matches(case, student, teacher, target, grad_output, weight=weight, reduction=reduction)


def test_weights_and_labels_of_leading_dimensions_of_any_stride(fused):
    student, teacher, target = make_logits(6, 40, torch.float32, fused)
    student, teacher = student.view(2, 3, 40), teacher.view(2, 3, 40)
    weight = torch.rand(3, 2, device=fused).t()
    target = target.view(2, 3).t().contiguous().t()
    assert_matches(BY_NAME["ce-kd"], student, teacher, target, weight=weight, reduction="sum")


def test_float64_keeps_its_weights(fused):
    student, teacher, target = make_logits(3, 12)
    weight = torch.rand(3, dtype=torch.float64)
    with fastkd.use_backend("auto"):
        values = fastkd.kd_loss(student.double(), teacher.double(), weight=weight, reduction="none")
        alone = fastkd.kd_loss(student.double(), teacher.double(), reduction="none")
    assert torch.equal(values, alone * weight)


# ---- leading dimensions without a copy --------------------------------------------------------------


@each_kernel
@pytest.mark.parametrize(
    "layout", ["[:, :-1]", "[:, 1:]", "transposed", "four dimensions", "only the student"]
)
def test_leading_dimensions_of_any_stride(fused, case, layout):
    def view(logits):
        match layout:
            case "[:, :-1]":
                return logits[:, :-1]
            case "[:, 1:]":
                return logits[:, 1:, :-3]
            case "transposed":
                return logits.transpose(0, 1)
            case "four dimensions":
                return logits.view(2, 2, 3, 37).permute(1, 2, 0, 3)
            case "only the student":
                return logits[:, :-1] if logits is student else logits[:, :-1].contiguous()

    student, teacher, _ = (
        one.view(4, 3, 37) if one.dim() == 2 else one for one in make_logits(12, 37, device=fused)
    )
    s, t = view(student), view(teacher)
    target = torch.randint(0, s.shape[-1], s.shape[:-1], device=fused)
    grad_output = torch.randn(s.shape[:-1], device=fused)
    assert_matches(case, s, t, target, grad_output, reduction="none")
    pair = case.loss([s, s.flip(0)], [t, t], target, reduction="none")
    # On a GPU the rows of two pairs may be planned otherwise than those of one.
    torch.testing.assert_close(pair[0], case.loss(s, t, target, reduction="none"), rtol=1e-5, atol=1e-5)


def test_a_shifted_sequence_is_not_copied():
    logits = torch.randn(4, 9, 50)
    for shifted in (logits[:, :-1], logits[:, 1:], logits.transpose(0, 1), logits[..., :40], logits[:1, ::2]):
        (rows,), _ = as_rows([shifted], [shifted])
        assert rows.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr()
        assert torch.equal(rows.reshape(-1, shifted.shape[-1]), shifted.reshape(-1, shifted.shape[-1]))


def test_only_what_must_be_is_copied():
    """A dimension of one row has any stride; beside a teacher of two strides the student is viewed alike."""
    memory = torch.randn(4, 3, 10, 50)
    odd, shifted, dense = memory[:, :1, :-1], memory[:, 0, :-1], torch.randn(36, 50)
    for student, teacher in ((odd, odd), (dense.view(4, 9, 50), shifted), (shifted, dense.view(4, 9, 50))):
        found = [one for (one,) in as_rows([student], [teacher])]
        for rows, logits in zip(found, (student, teacher), strict=True):
            assert rows.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr()
            assert torch.equal(rows.reshape(36, 50), logits.reshape(36, 50))
    # One model whose classes are not dense, of either.
    apart = dense.t().contiguous().t()
    for student, teacher in ((dense, apart), (apart, dense)):
        for (rows,), logits in zip(as_rows([student], [teacher]), (student, teacher), strict=True):
            assert rows.stride(-1) == 1
            assert torch.equal(rows, logits)


# ---- wrappers, lazy bits, freed storage -------------------------------------------------------------


def logits_of(kind, plain):
    """``plain`` as another kind of tensor."""
    match kind:
        case "sparse":
            return plain.to_sparse()
        case "csr":
            return plain.to_sparse_csr()
        case "nested":
            return torch.nested.nested_tensor([plain, plain])
        case "jagged":
            return torch.nested.nested_tensor([plain, plain], layout=torch.jagged)
        case "quantized":
            return torch.quantize_per_tensor(plain, 0.1, 0, torch.qint8)
        case "masked":
            return torch.masked.masked_tensor(plain, torch.ones_like(plain, dtype=torch.bool))
        case "freed":
            freed = plain.clone()
            freed.untyped_storage().resize_(0)
            return freed


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["sparse", "csr", "nested", "jagged", "quantized", "masked", "freed"])
@pytest.mark.parametrize("place", ["student", "teacher", "weight"])
def test_tensors_without_dense_memory_are_rejected_by_name(fused, kind, place):
    # Only some of these kinds exist on GPUs; "freed" is found after the backend's check of the device.
    student, teacher, target = make_logits(3, 8, device=fused if kind == "freed" else "cpu")
    given = {"student": student, "teacher": teacher, "weight": torch.rand(3, device=student.device)}
    of_two_dimensions = kind in ("csr", "nested", "jagged") and place == "weight"
    given[place] = logits_of(kind, torch.rand(3, 8) if of_two_dimensions else given[place])
    name = place if place == "weight" else f"{place}_logits"
    name += r"(\[0\])? (is a|has layout|has dtype|has shape .* storage is empty)"
    with pytest.raises((TypeError, ValueError), match=name):
        fastkd.dkd_loss(given["student"], given["teacher"], target, weight=given["weight"])
    if place != "weight" and kind != "nested":
        with pytest.raises((TypeError, ValueError), match=name):
            fastkd.kd_loss([given["student"]] * 2, [given["teacher"]] * 2)


def test_labels_without_memory_are_rejected(fused):
    student, teacher, target = make_logits(3, 8)
    freed = target.clone()
    freed.untyped_storage().resize_(0)
    for wrong in (target.to_sparse(), freed):
        with pytest.raises((TypeError, ValueError), match="target"):
            fastkd.dkd_loss(student, teacher, wrong)


@pytest.mark.parametrize("replaced", ["student", "teacher", "target", "weight", "all"])
def test_a_dtensor_is_rejected_by_name(fused, replaced):
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    init_process_group("fake", rank=0, world_size=1, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (1,))
        student, teacher, target = make_logits(3, 8)
        given = {"student": student, "teacher": teacher, "target": target, "weight": torch.rand(3)}
        for name in given if replaced == "all" else [replaced]:
            given[name] = distribute_tensor(given[name], mesh)
        with pytest.raises(TypeError, match=r"DTensor.*to_local"):
            fastkd.dkd_loss(given["student"], given["teacher"], given["target"], weight=given["weight"])
        if replaced in ("student", "teacher"):
            with pytest.raises(TypeError, match="DTensor"):
                fastkd.kd_loss([given["student"]] * 2, [given["teacher"]] * 2)
    finally:
        destroy_process_group()


class Named(torch.Tensor):
    """A subclass with its own memory, like torchvision's tv_tensors."""


@each_kernel
def test_subclasses_with_their_own_memory(fused, case):
    student, teacher, target = make_logits(3, 8, device=fused)
    expected = loss_and_gradient(case, student, teacher, target)
    parameter = torch.nn.Parameter(student)
    loss = case.loss(parameter, teacher.as_subclass(Named), target.as_subclass(Named))
    loss.backward()
    torch.testing.assert_close((loss.detach(), parameter.grad), expected)


@each_kernel
def test_a_lazy_negation_is_resolved(fused, case):
    student, teacher, target = make_logits(4, 9, device=fused)

    def lazily(plain):
        lazy = torch.complex(torch.zeros_like(plain), -plain).conj().imag
        assert lazy.is_neg()
        assert torch.equal(lazy, plain)
        return lazy

    weight = torch.rand(4, device=fused)
    expected = loss_and_gradient(case, student, teacher, target, weight=weight)
    given = (lazily(student), lazily(teacher), target)
    torch.testing.assert_close(loss_and_gradient(case, *given, weight=lazily(weight)), expected)
    several = case.loss([lazily(student)] * 2, [lazily(teacher)] * 2, target)
    torch.testing.assert_close(several[1], case.loss(student, teacher, target))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_a_lazy_negation_of_the_upstream_gradient_is_resolved(fused, reduction, dtype):
    student, teacher = (torch.randn(4, 7, device=fused, dtype=dtype) for _ in range(2))
    gradients = []
    for lazily in (False, True):
        inputs = student.clone().requires_grad_()
        loss = fastkd.kd_loss(inputs, teacher, reduction=reduction)
        upstream = torch.full_like(loss, -2.0)
        gradients += torch.autograd.grad(loss, inputs, torch._neg_view(-upstream) if lazily else upstream)
    assert torch.equal(*gradients)


@each_kernel
def test_fake_tensors(fused, case):
    with FakeTensorMode():
        student, teacher, target = make_logits(4, 9, torch.bfloat16, fused)
        student.requires_grad_()
        loss = case.loss(student, teacher, target)
        loss.backward()
    assert (loss.shape, loss.dtype) == ((), torch.float32)
    assert (student.grad.shape, student.grad.dtype) == ((4, 9), torch.bfloat16)


def test_a_dispatch_mode_sees_one_operator(fused):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    student, teacher, _ = make_logits(4, 9, device=fused)
    expected = fastkd.kd_loss(student, teacher)
    with Seen() as seen:
        loss = fastkd.kd_loss(student, teacher)
    assert torch.equal(loss, expected)
    assert "fastkd.row_loss.default" in seen.names


# ---- transforms -------------------------------------------------------------------------------------

TRANSFORMS = {
    "grad": lambda f, s, d: torch.func.grad(f)(s),
    "vjp": lambda f, s, d: torch.func.vjp(f, s)[1](torch.ones(()))[0],
    "jvp": lambda f, s, d: torch.func.jvp(f, (s,), (d,))[1],
    "jacrev": lambda f, s, d: torch.func.jacrev(f)(s),
    "jacfwd": lambda f, s, d: torch.func.jacfwd(f)(s),
    "hessian": lambda f, s, d: torch.func.hessian(f)(s),
    "linearize": lambda f, s, d: torch.func.linearize(f, s)[1](d),
    "vmap": lambda f, s, d: torch.func.vmap(f)(torch.stack([s, d])),
    "vmap of grad": lambda f, s, d: torch.func.vmap(torch.func.grad(f))(torch.stack([s, d])),
    "autograd.functional.jvp": lambda f, s, d: torch.autograd.functional.jvp(f, s, d, strict=True)[1],
    "dual numbers": lambda f, s, d: dual(f, s, d),
}


def dual(function, point, direction):
    forward_ad = torch.autograd.forward_ad
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(point, direction))).tangent


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", ["kd", "ce-dkd", "jsd", "binary-kl-norm"])
def test_a_transform_gives_its_value_or_is_rejected_by_name(transform, name):
    case = BY_NAME[name]
    student, teacher, target = make_logits(3, 6)
    direction = torch.randn(3, 6)

    def apply(precision):
        t = teacher.to(precision)
        return TRANSFORMS[transform](
            lambda s: case.loss(s, t, target), student.to(precision), direction.to(precision)
        )

    with fastkd.use_backend("eager"):
        truth = apply(torch.float64) if transform != "autograd.functional.jvp" else None
    with fastkd.use_backend("auto"):
        if (
            transform == "autograd.functional.jvp"
        ):  # two backward passes: not on a gradient that is computed once
            with pytest.raises(RuntimeError, match="create_graph"):
                apply(torch.float32)
            return
        assert error(apply(torch.float32), truth) < 1e-5
    with (
        fastkd.use_backend("native"),
        pytest.raises(fastkd.BackendUnavailable, match=r"torch\.func|forward-mode AD"),
    ):
        apply(torch.float32)


@pytest.mark.parametrize("transform", ["grad", "jvp", "jacrev", "vmap"])
def test_a_transform_that_is_compiled(transform):
    torch._dynamo.reset()
    student, teacher, _ = make_logits(3, 6)
    direction = torch.randn(3, 6)

    def apply():
        return TRANSFORMS[transform](lambda s: fastkd.kd_loss(s, teacher), student, direction)

    torch.testing.assert_close(torch.compile(apply, fullgraph=True, backend="aot_eager")(), apply())


def test_a_batch_of_grad_outputs():
    student, teacher, _ = make_logits(3, 6)
    with fastkd.use_backend("native"):
        for dtype in (torch.float32, torch.float16):
            z = student.to(dtype).requires_grad_()
            losses = fastkd.kd_loss(z, teacher, reduction="none")
            if dtype == torch.float16:
                with pytest.raises(RuntimeError, match="is_grads_batched"):
                    torch.autograd.grad(losses, z, torch.eye(3), is_grads_batched=True)
                continue
            (each,) = torch.autograd.grad(losses, z, torch.eye(3), is_grads_batched=True, retain_graph=True)
            (summed,) = torch.autograd.grad(losses.sum(), z)
            torch.testing.assert_close(each.sum(0), summed)


def test_logits_of_inference_mode(fused):
    student, teacher, target = make_logits(4, 9, device=fused)
    for dtype in (torch.float32, torch.float16):
        expected = loss_and_gradient(BY_NAME["dkd"], student.to(dtype), teacher, target)
        with torch.inference_mode():
            constants = teacher.clone(), target.clone()
        torch.testing.assert_close(loss_and_gradient(BY_NAME["dkd"], student.to(dtype), *constants), expected)


def test_a_constant_inside_a_transform_stays_fast():
    """No argument of the loss is transformed, so the fused backend runs."""
    student, teacher, _ = make_logits(3, 6)
    with fastkd.use_backend("native"):
        gradient = torch.func.grad(lambda x: x * fastkd.kd_loss(student, teacher))(torch.tensor(1.0))
        torch.testing.assert_close(gradient, fastkd.kd_loss(student, teacher))


# ---- global defaults --------------------------------------------------------------------------------


@each_kernel
def test_torchs_defaults_do_not_matter(fused, case):
    student, teacher, target = make_logits(3, 40, device=fused)
    several = ([student, student + 1], [teacher, teacher], target)
    expected = (*loss_and_gradient(case, student, teacher, target), case.loss(*several))
    try:
        for dtype in (torch.float64, torch.bfloat16):
            torch.set_default_dtype(dtype)
            got = (*loss_and_gradient(case, student, teacher, target), case.loss(*several))
            torch.testing.assert_close(got, expected, rtol=0, atol=0)
        torch.set_default_dtype(torch.float32)
        with torch.device("meta"):
            got = (*loss_and_gradient(case, student, teacher, target), case.loss(*several))
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    finally:
        torch.set_default_dtype(torch.float32)


@each_kernel
def test_pairs_without_rows(fused, case):
    students = [torch.zeros(0, 7, device=fused, requires_grad=True) for _ in range(3)]
    teachers = [torch.zeros(0, 7, device=fused) for _ in range(3)]
    target = torch.zeros(0, dtype=torch.int64, device=fused)
    for reduction, shape in (("batchmean", (3,)), ("none", (3, 0))):
        losses = case.loss(students, teachers, target, reduction=reduction)
        assert losses.shape == shape
        gradients = torch.autograd.grad(losses, students, torch.ones_like(losses))
        assert [gradient.shape for gradient in gradients] == [(0, 7)] * 3


def test_no_copy_is_made_of_a_shifted_sequence():
    """According to the profiler, only the gradient is allocated."""
    from torch.profiler import ProfilerActivity, profile

    batch, length, classes = 4, 65, 4096
    student, teacher = (torch.randn(batch, length, classes)[:, :-1] for _ in range(2))
    target = torch.randint(0, classes, (batch, length - 1))
    with fastkd.use_backend("native"):
        student = student.detach().requires_grad_()
        fastkd.dkd_loss(student, teacher, target)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
            fastkd.dkd_loss(student, teacher, target)
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in measured.events())
    gradient = batch * (length - 1) * classes * 4
    assert allocated < 1.1 * gradient
