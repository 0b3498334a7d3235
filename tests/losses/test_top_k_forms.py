"""``TopKLogits`` beside other forms of logits, under wrappers and compilers; and how they are made."""

import pytest
import torch
from torch.utils import _pytree

import fastkd
from fastkd import LinearLogits
from fastkd.losses.cases import call_of
from tests.cases import error
from tests.losses.test_top_k import CLASSES, DEFINED, ERROR, SOME, interpreted, logits, made


@pytest.mark.parametrize("dtype", ERROR, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", SOME)
def test_a_student_that_is_never_stored(fused, name, dtype):
    """Neither model's logits are in memory."""
    case = DEFINED[name][1]
    if dtype != torch.float32 and name not in ("kd", "ce-dkd") and interpreted(fused):
        pytest.skip("slow in the interpreter")
    leaves = [torch.randn(11, 8), torch.randn(CLASSES, 8), torch.randn(CLASSES)]
    leaves = [leaf.to(dtype).to(fused).requires_grad_() for leaf in leaves]
    _, teacher, target = logits(rows=11, device=fused)
    form = made(name, teacher, 6, target)
    weight = torch.rand(11, device=fused)
    weight[3] = 0
    student = LinearLogits(*leaves, chunk_rows=4)
    results = []
    for one in (student, student.dense()):
        value = call_of(case)(one, form, target, weight=weight)
        results.append([value, *torch.autograd.grad(value, leaves, torch.full_like(value, 1.7))])
    for ours, stored in zip(*results, strict=True):
        assert error(ours, stored.double(), 1e-3) < (1e-5 if dtype == torch.float32 else 0.02)


def test_lists_of_pairs(fused):
    student, teacher, target = logits(device=fused)
    students = [student.requires_grad_(), (student.detach() / 2).requires_grad_()]
    forms = [fastkd.top_k(teacher, k, target, temperature=4.0) for k in (4, 6)]
    together, terms = fastkd.distill_loss(students, forms, target, ce_weight=0.5, kd_weight=0.5)
    alone = [
        fastkd.distill_loss(one, form, target, ce_weight=0.5, kd_weight=0.5)
        for one, form in zip(students, forms, strict=True)
    ]
    torch.testing.assert_close(together, torch.stack([value for value, _ in alone]))
    torch.testing.assert_close(terms["ce"], torch.stack([terms["ce"] for _, terms in alone]))


def test_leading_dimensions_and_strides(fused):
    student = torch.randn(2, 5, CLASSES, device=fused)[:, :-1]
    teacher = torch.randn(2, 4, CLASSES, device=fused)
    target = torch.randint(0, CLASSES, (2, 4), device=fused)
    form = fastkd.top_k(teacher, 5, target, temperature=4.0)
    assert form.log_probs.shape == (2, 4, 5)
    ours = fastkd.dkd_loss(student, form, target, reduction="none")
    flat = fastkd.top_k(teacher.flatten(0, 1), 5, target.flatten(), temperature=4.0)
    expected = fastkd.dkd_loss(
        student.reshape(8, CLASSES).contiguous(), flat, target.flatten(), reduction="none"
    )
    torch.testing.assert_close(ours, expected.view(2, 4))


def test_a_transposed_form(each_backend):
    """As of logits [B, C, T]; at batch size 1 a view of it remains one."""
    logits, student = (
        torch.randn(1, CLASSES, 5, device=each_backend),
        torch.randn(1, 5, CLASSES, device=each_backend),
    )
    log_probs, indices = logits.log_softmax(1).topk(3, 1)
    ours, expected = (
        fastkd.kd_loss(
            student, fastkd.TopKLogits(*form, num_classes=CLASSES, temperature=1.0), temperature=1.0
        )
        for form in (
            (log_probs.mT, indices.mT),
            (log_probs.mT.contiguous(), indices.mT.contiguous()),
        )
    )
    torch.testing.assert_close(ours, expected)


def test_float16_gradients_wait_for_the_loss_scale(fused):
    """As for dense logits, the gradient is computed in backward, with grad_output in its weights."""
    student, teacher, target = logits(dtype=torch.float16, device=fused)
    form = fastkd.top_k(teacher, 5, target, temperature=4.0)
    student.requires_grad_()
    loss = fastkd.dkd_loss(student, form, target) * 2.0**-14
    (loss * 2.0**14).backward()
    wide = student.detach().float().requires_grad_()
    fastkd.dkd_loss(wide, form, target).backward()
    assert error(student.grad, wide.grad.double()) < 2e-3


def test_compiled_in_one_graph(fused):
    if interpreted(fused):
        pytest.skip("the interpreter cannot be traced")
    student, teacher, target = logits(device=fused)

    def step(student, teacher, target, ce_weight):
        form = fastkd.top_k(teacher, 5, target, temperature=4.0)
        return fastkd.distill_loss(
            student, form, target, ce_weight=ce_weight, tckd_weight=1.0, nckd_weight=0.5
        )[0]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for ce_weight in (0.5, 0.7, 0.9):
        results = []
        for call in (step, compiled):
            leaf = student.detach().clone().requires_grad_()
            value = call(leaf, teacher, target, ce_weight)
            results.append((value, *torch.autograd.grad(value, leaf)))
        for plain, traced in zip(*results, strict=True):
            torch.testing.assert_close(plain, traced)


def test_a_pytree_of_its_tensors():
    _, teacher, target = logits()
    form = fastkd.top_k(teacher, 5, target, temperature=2.0)
    leaves, structure = _pytree.tree_flatten(form)
    assert leaves == [form.log_probs, form.indices, form.log_rest] or len(leaves) == 3
    again = _pytree.tree_unflatten(leaves, structure)
    assert (again.num_classes, again.temperature, again.rest) == (CLASSES, 2.0, "one_class")
    assert again.log_rest is form.log_rest


@pytest.mark.parametrize("dtype", [*ERROR, torch.float64])
def test_top_k_of_logits(dtype):
    _, teacher, target = logits(dtype=dtype)
    form = fastkd.top_k(teacher, 5, target, temperature=2.0)
    p = (teacher.double() / 2).softmax(-1)
    assert form.log_probs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (form.indices.diff(dim=-1) > 0).all()
    assert (form.indices == target[:, None]).any(-1).all()
    torch.testing.assert_close(form.log_probs.exp().double(), p.gather(1, form.indices), rtol=1e-5, atol=1e-7)
    rest = p.scatter(1, form.indices, 0).sum(-1)
    torch.testing.assert_close(form.log_rest.exp().double(), rest, rtol=1e-5, atol=1e-7)
    others = p.scatter(1, target[:, None], 0).topk(4).indices  # the most probable beside the label
    assert all(
        set(row) <= set(found) for row, found in zip(others.tolist(), form.indices.tolist(), strict=True)
    )


def test_top_k_of_a_layer_equals_that_of_its_logits(monkeypatch):
    monkeypatch.setattr("fastkd.losses.known._BLOCK", 3 * CLASSES)  # chunks of three rows
    layer = LinearLogits(torch.randn(2, 5, 8), torch.randn(CLASSES, 8))
    target = torch.randint(0, CLASSES, (2, 5))
    target[0, 0] = -100
    ours, stored = fastkd.top_k(layer, 4, target), fastkd.top_k(layer.dense(), 4, target)
    for one, other in zip(ours.tensors.values(), stored.tensors.values(), strict=True):
        torch.testing.assert_close(one, other)


def test_check_top_k():
    _, teacher, target = logits()
    form = fastkd.top_k(teacher, 5, target)
    fastkd.check_top_k(form, target)
    target[2] = next(index for index in range(CLASSES) if index not in form.indices[2].tolist())
    with pytest.raises(ValueError, match=r"row 2 .* lacks its label"):
        fastkd.check_top_k(form, target)
    form.log_probs[4, 1] = 0.5
    with pytest.raises(ValueError, match=r"row 4 .* 0\.5; expected at most 0"):
        fastkd.check_top_k(form)
