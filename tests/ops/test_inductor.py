"""The pass for Inductor: the gradient of a compiled loss is scaled where it is."""

import pytest
import torch
from torch import nn
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor.utils import run_and_get_code
from torch.utils.flop_counter import FlopCounterMode

import fastkd
from tests.cases import BY_NAME, make_logits

OPERATOR = "torch.ops.fastkd.scale_rows_.default("


def compiled(function, *, in_place=True):
    """``function`` compiled anew, with the pass or without."""
    torch._dynamo.reset()
    options = {"post_grad_custom_post_pass": fastkd.ScaleInPlace()} if in_place else None
    return torch.compile(function, fullgraph=True, options=options)


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
@pytest.mark.parametrize("name", ["kd", "ce-dkd", "jsd", "binary-kl-norm"])
def test_the_gradient_is_the_same(fused, name, reduction):
    case = BY_NAME[name]
    student, teacher, target = make_logits(6, 33, torch.float32, fused)
    target[2] = -100
    gradients = {}
    for in_place in (False, True):
        loss = compiled(lambda s: case.loss(s, teacher, target, reduction=reduction), in_place=in_place)
        for upstream in (1.0, -2.5):
            inputs = student.detach().clone().requires_grad_()
            value = loss(inputs)
            value.backward(torch.full_like(value, upstream))
            gradients[in_place, upstream] = inputs.grad
    for upstream in (1.0, -2.5):
        torch.testing.assert_close(gradients[True, upstream], gradients[False, upstream], rtol=1e-6, atol=0.0)


def test_nothing_is_copied(fused):
    """Only the operator is called in the backward pass: no product, and no copy before or after it."""
    student, teacher, _ = make_logits(6, 33, torch.float32, fused)
    student.requires_grad_()
    for in_place in (False, True):
        loss = compiled(lambda s: fastkd.kd_loss(s, teacher), in_place=in_place)
        _, codes = run_and_get_code(lambda loss=loss: loss(student).backward())
        body = codes[-1].partition("def call(self, args):")[2].partition("return (")[0]
        assert (OPERATOR in body) == in_place
        assert ("fused" in body) != in_place
        assert not in_place or not any(word in body for word in ("clone", "copy_", "empty_strided"))


def test_heads_of_a_student_in_one_launch(fused):
    _, teacher, _ = make_logits(6, 33, torch.float32, fused)
    torch.manual_seed(0)
    backbone, heads = nn.Linear(8, 8).to(fused), nn.ModuleList([nn.Linear(8, 33), nn.Linear(8, 33)]).to(fused)
    images = torch.randn(6, 8, device=fused)

    def loss():
        features = backbone(images).relu()
        one, two = fastkd.kd_loss([head(features) for head in heads], [teacher] * 2)
        return one + 3 * two

    parameters = [*backbone.parameters(), *heads.parameters()]
    expected = torch.autograd.grad(loss(), parameters)
    _, codes = run_and_get_code(lambda: compiled(loss)().backward())
    assert codes[-1].count(OPERATOR) == 1
    torch.testing.assert_close([p.grad for p in parameters], list(expected))


@pytest.mark.parametrize("leading", [(6,), (2, 3)], ids=["rows", "leading dimensions"])
def test_equal_calls_have_gradients_of_their_own(fused, leading):
    """torch merges them to one, whose gradient would be scaled by both factors."""
    student, teacher, _ = make_logits(6, 33, torch.float32, fused)
    student, teacher = (logits.view(*leading, 33) for logits in (student, teacher))
    student.requires_grad_()

    def loss(s):
        return 2 * fastkd.kd_loss(s, teacher) + 3 * fastkd.kd_loss(s, teacher)

    (expected,) = torch.autograd.grad(loss(student), student)
    (gradient,) = torch.autograd.grad(compiled(loss)(student), student)
    torch.testing.assert_close(gradient, expected)


def test_a_gradient_that_may_be_needed_again_is_copied(fused):
    student, teacher, _ = make_logits(6, 33, torch.float32, fused)
    student.requires_grad_()
    expected = torch.autograd.grad(fastkd.kd_loss(student, teacher), student)[0]
    # torch's cache of compiled code would give that of a gradient that was handed over.
    without_cache = inductor_config.patch(force_disable_caches=True)
    with functorch_config.patch(donated_buffer=False), without_cache:
        loss = compiled(lambda s: fastkd.kd_loss(s, teacher))(student)
        for factor in (2.0, 3.0):
            (gradient,) = torch.autograd.grad(loss * factor, student, retain_graph=True)
            torch.testing.assert_close(gradient, factor * expected)


def test_a_forward_pass_that_saves_more_than_it_takes(fused):
    """torch numbers what it hands over among the inputs of the backward pass, of which there are more."""
    torch.manual_seed(0)
    parts = [part for _ in range(2) for part in (nn.Linear(20, 20), nn.LayerNorm(20), nn.GELU())]
    model, teacher = nn.Sequential(*parts, nn.Linear(20, 10)).to(fused), torch.randn(8, 10, device=fused)
    images = torch.randn(8, 20, device=fused)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(3 * fastkd.kd_loss(model(images), teacher), parameters)
    loss = compiled(lambda x: 3 * fastkd.kd_loss(model(x), teacher))(images)
    torch.testing.assert_close(torch.autograd.grad(loss, parameters), expected)


def test_code_that_is_not_compiled_keeps_its_gradient(fused):
    """Under a dispatch mode, which sees the operators of a compiled loss."""
    student, teacher, _ = make_logits(6, 33, torch.float32, fused)
    student.requires_grad_()
    with (
        inductor_config.patch(post_grad_custom_post_pass=fastkd.ScaleInPlace()),
        FlopCounterMode(display=False),
    ):
        loss = 3 * fastkd.kd_loss(student, teacher)
        first, second = (torch.autograd.grad(loss, student, retain_graph=True)[0].clone() for _ in range(2))
    assert torch.equal(first, second)


def test_opcheck_of_the_scaling(fused):
    gradient, factors = torch.randn(4, 11, device=fused), torch.rand(1, 4, device=fused)
    arguments = (gradient, factors, fastkd.get_backend())
    torch.library.opcheck(torch.ops.fastkd.scale_rows_.default, arguments)
