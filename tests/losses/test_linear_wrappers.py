"""``LinearLogits`` in modules that are wrapped: DDP, FSDP2, checkpoints, compilers, export."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree
from torch.utils.checkpoint import checkpoint

import fastkd
from fastkd import LinearLogits
from tests.losses.linear_cases import Layers
from tests.train.ranks import WORLD, on_two_ranks

CLASSES = 40


class Student(nn.Module):
    """A model that owns a head tied to its embedding, and computes its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, 8)
        self.body = nn.Linear(8, 8)
        self.unused = nn.Linear(2, 2)
        self.head = nn.Linear(8, CLASSES, bias=False)
        self.head.weight = self.embedding.weight
        options = {"ce_weight": 0.5, "kd_weight": 0.5}
        self.loss = fastkd.LinearDistillLoss(self.head, fastkd.DistillLoss(**options), chunk_rows=3)

    def forward(self, tokens, target, hidden, weight, stored=False):
        state = self.body(self.embedding(tokens)).tanh()
        teacher = LinearLogits(hidden, weight, chunk_rows=5)
        if stored:
            return self.loss.loss(self.head(state), teacher.dense(), target)[0]
        return self.loss(state, teacher, target)[0]


def model_and_batches():
    torch.manual_seed(0)
    model, weight = Student(), torch.randn(CLASSES, 5)
    batches = [
        (torch.randint(0, CLASSES, (2, 7)), torch.randint(0, CLASSES, (2, 7)), torch.randn(2, 7, 5), weight)
        for _ in range(WORLD)
    ]
    return model, batches


def gradients_of(wrapper, variant):
    """Of the mean of the ranks' losses, at the second step."""
    model, batches = model_and_batches()
    if variant != "unused parameters":
        model.unused.requires_grad_(False)
    if variant == "compiled":  # Inductor would spend its time on the layers around the loss
        model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    if variant == "checkpointed":
        forward = model.forward
        model.forward = lambda *batch: checkpoint(forward, *batch, use_reentrant=False)
    if wrapper == "FSDP2":
        wrapped = fully_shard(model)
    else:
        wrapped = DistributedDataParallel(model, find_unused_parameters=variant == "unused parameters")
    for _ in range(2):
        model.zero_grad()
        wrapped(*batches[dist.get_rank()]).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {
        name: gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        for name, gradient in gradients.items()
    }


def of_ddp():
    return {
        variant: gradients_of("DDP", variant)
        for variant in ("plain", "unused parameters", "compiled", "checkpointed")
    }


def of_fsdp2():
    found = {variant: gradients_of("FSDP2", variant) for variant in ("plain", "compiled", "checkpointed")}
    head = fully_shard(Student()).head
    refused = []
    for which, pair in (
        ("student_logits", (LinearLogits(torch.randn(3, 8), head.weight), torch.randn(3, CLASSES))),
        ("teacher_logits", (torch.randn(3, CLASSES), LinearLogits(torch.randn(3, 8), head.weight).detach())),
    ):
        with pytest.raises(TypeError) as error:
            fastkd.kd_loss(*pair)
        refused.append((which, str(error.value)))
    return {**found, "refused": refused}


def stored_gradients():
    model, batches = model_and_batches()
    (sum(model(*batch, stored=True) for batch in batches) / WORLD).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("work", [of_ddp, of_fsdp2], ids=["DDP", "FSDP2"])
def test_two_processes(tmp_path, work):
    """Plain, compiled as one graph, with checkpoints; DDP also with parameters that get no gradient."""
    expected = stored_gradients()
    for found in on_two_ranks(work, tmp_path):
        for which, message in found.pop("refused", []):
            assert message.startswith(f"{which}.weight is a DTensor")
            assert "inside the forward of the wrapped module that owns the head" in message
        for gradients in found.values():
            assert gradients.keys() == expected.keys()
            for name, gradient in gradients.items():
                if expected[name] is None:
                    assert gradient is None
                else:
                    torch.testing.assert_close(gradient, expected[name])


def step(loss, leaves):
    for leaf in leaves:
        leaf.grad = None
    value = loss(*leaves)
    value.backward()
    return [value.detach(), *(leaf.grad for leaf in leaves)]


def loss_of(layers):
    def loss(*leaves, weight=None):
        student = LinearLogits(*leaves, softcap=9.0, chunk_rows=4)
        teacher = LinearLogits(*layers.teacher)
        options = {"ce_weight": 0.3, "kd_weight": 0.7, "weight": weight}
        return fastkd.distill_loss(student, teacher, layers.target, **options)[0]

    return loss


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(fused, reentrant):
    layers = Layers.random(device=fused)
    leaves = [leaf.requires_grad_() for leaf in layers.student]
    loss = loss_of(layers)
    expected = step(loss, leaves)
    found = step(lambda *leaves: checkpoint(loss, *leaves, use_reentrant=reentrant), leaves)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
def test_compiled(fused, compiler):
    if compiler == "inductor" and fastkd.get_backend() == "triton" and fused == "cpu":
        pytest.skip("Triton's interpreter is no compiler")
    torch._dynamo.reset()
    layers = Layers.random(device=fused)
    layers.target[3] = -100
    leaves = [leaf.requires_grad_() for leaf in layers.student]
    loss = loss_of(layers)
    torch.testing.assert_close(
        step(torch.compile(loss, fullgraph=True, backend=compiler), leaves), step(loss, leaves)
    )


def kd_at(temperature):
    return lambda student, teacher, target, **options: fastkd.kd_loss(
        student, teacher, temperature=temperature, **options
    )


def test_compiled_once_for_all_batch_sizes_and_options(fused):
    """Forms are arguments here."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def loss(student, teacher, weight, temperature):
        return fastkd.kd_loss(student, teacher, weight=weight, temperature=temperature)

    for rows, temperature in ((4, 2.0), (6, 3.5), (9, 5.25), (11, 7.0)):
        layers = Layers.random(rows=rows, device=fused)
        leaves = [leaf.requires_grad_() for leaf in layers.student]
        weight = torch.rand(rows, device=fused)
        value = loss(LinearLogits(*leaves), LinearLogits(*layers.teacher), weight, temperature)
        found = torch.autograd.grad(value * 0.37, leaves)
        truth = layers.exact(kd_at(temperature), weight=weight)[1:]
        torch.testing.assert_close(found, tuple(one.float() for one in truth))
    assert counter.frame_count <= 2  # a float is symbolic from its second value


def test_a_compiled_student_of_float16_logits(fused):
    torch._dynamo.reset()
    layers = Layers.random(dtype=torch.float16, device=fused)
    student = torch.randn(11, 33, device=fused).half().requires_grad_()
    teacher = LinearLogits(*layers.teacher, chunk_rows=4)

    def loss(student):
        return fastkd.kd_loss(student, teacher) * 4096

    torch.testing.assert_close(
        step(torch.compile(loss, fullgraph=True, backend="aot_eager"), [student]), step(loss, [student])
    )


def test_pytree():
    form = LinearLogits(torch.randn(3, 4), torch.randn(5, 4), None, scale=2.0, num_classes=4, chunk_rows=2)
    leaves, spec = _pytree.tree_flatten({"student": form})
    again = _pytree.tree_unflatten(leaves, spec)["student"]
    for name in ("hidden", "weight", "bias", "scale", "softcap", "num_classes", "chunk_rows"):
        assert getattr(again, name) is getattr(form, name)
    moved = _pytree.tree_map(lambda tensor: tensor.double(), form)
    assert moved.dtype == torch.float64
    assert moved.scale == 2.0


def test_export(fused):
    model, batches = model_and_batches()
    model = model.to(fused)
    batch = tuple(tensor.to(fused) for tensor in batches[0])
    program = torch.export.export(model.requires_grad_(False), batch, strict=True)
    torch.testing.assert_close(program.module()(*batch), model(*batch))


def test_operator_check(fused):
    """Schema, fake tensors and autograd, by torch's own checks."""
    from fastkd.ops.call import Call
    from fastkd.ops.chunks import LinearCall
    from fastkd.ops.linear import _flat

    layers = Layers.random(device=fused)
    student = [tensor.requires_grad_() for tensor in layers.student]
    name = fastkd.get_backend()
    options = (4.0, 0.3, 0.7, 0.0, 0.0, 0.0, 0.0, 0.0)
    weight = torch.tensor([0.0, *torch.rand(10)], device=fused)
    call = Call(layers.target, weight, 11, "softmax", list(options), None, name, True, True)
    arguments = _flat(LinearCall(call, 33, 4, False))
    torch.library.opcheck(
        torch.ops.fastkd.linear_loss.default, (student, layers.teacher, [True] * 3, *arguments)
    )


class Lora(nn.Linear):
    def forward(self, hidden):
        return super().forward(hidden) + hidden.sum()


def test_a_layer_that_does_more_than_its_weight_and_bias():
    plain, hooked = nn.Linear(3, 5), nn.Linear(3, 5)
    hooked.register_forward_hook(lambda *_: None)
    normalised = torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 5))
    for layer, words in ((Lora(3, 5), "a Lora, which has a forward of its own"), (hooked, "has hooks")):
        with pytest.raises(TypeError, match=f"^head (is )?{words}"):
            fastkd.LinearDistillLoss(layer, fastkd.KDLoss())
        with pytest.raises(TypeError, match=f"^teacher_head (is )?{words}"):
            fastkd.LinearDistillLoss(plain, fastkd.KDLoss(), teacher_head=layer)
    hidden, teacher = torch.randn(2, 3), torch.randn(2, 5)
    loss = fastkd.LinearDistillLoss(normalised, fastkd.KDLoss())(hidden, teacher)
    torch.testing.assert_close(loss, fastkd.kd_loss(normalised(hidden), teacher))


def test_the_teachers_head_is_frozen_and_the_target_has_a_name():
    head, teacher = nn.Linear(3, 5), nn.Linear(4, 5)
    loss = fastkd.LinearDistillLoss(head, fastkd.DKDLoss(), teacher_head=teacher)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    batch = torch.randn(2, 3), torch.randn(2, 4), torch.tensor([0, 1])
    assert torch.equal(loss(*batch), loss(*batch[:2], target=batch[2]))
    fastkd.LinearDistillLoss(head, fastkd.KDLoss(), teacher_head=head)
    assert all(parameter.requires_grad for parameter in head.parameters())


@pytest.mark.parametrize(
    "change",
    [
        lambda head: head.register_forward_hook(lambda *_: None),
        lambda head: head.register_full_backward_hook(lambda *_: None),
        lambda head: setattr(head, "forward", lambda hidden: 3 * hidden),  # as accelerate's hooks do
    ],
)
@pytest.mark.parametrize("later", [False, True])
def test_what_is_done_to_a_layer_and_would_not_be_computed(change, later):
    head = torch.nn.Linear(4, 5)
    if not later:
        change(head)
        with pytest.raises(TypeError, match=r"head (has hooks|is a Linear, which has a forward)"):
            fastkd.LinearDistillLoss(head, fastkd.KDLoss())
        return
    loss = fastkd.LinearDistillLoss(head, fastkd.KDLoss())
    loss(torch.randn(2, 4), torch.randn(2, 5))
    change(head)
    with pytest.raises(TypeError, match="only its weight and bias would be used"):
        loss(torch.randn(2, 4), torch.randn(2, 5))
