"""DHKD: the head, the alignment in every supported setting, the stop."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastkd.distill import DHKD, GradientAlignment, find_method
from fastkd.distill.alignment import parameters_of
from fastkd.distill.heads import RowBatchNorm
from tests.train.ranks import on_two_ranks

from .models import CLASSES, METHODS, Net, batch, pair

SCOPES = ("all", "shared")


def gradients(method: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}


def separate(
    method: DHKD, batches: list[tuple[Tensor, Tensor]]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """g0 and g1 by name, from separate backward passes, averaged over batches; 0 without a gradient."""
    both: list[dict[str, Tensor]] = []
    for term in ("ce", "binary_kl_norm"):
        method.zero_grad()
        for one in batches:
            (method(one)[term] / len(batches)).backward()
        both.append(
            {
                n: torch.zeros_like(p) if p.grad is None else p.grad.clone()
                for n, p in method.named_parameters()
            }
        )
    method.zero_grad()
    return both[0], both[1]


def aligned(g0: dict[str, Tensor], g1: dict[str, Tensor], scope: str) -> dict[str, Tensor]:
    """The released formula, p.grad = (1 - min(c, 0)) g0 + g1, on the vector of the scope."""
    shared = [name for name in g0 if scope == "all" or name.startswith("student.features")]
    dot = sum((g0[name].double() * g1[name].double()).sum() for name in shared)
    square = sum(g0[name].double().square().sum() for name in shared)
    c = float(dot / square)
    return {n: (1 - min(c, 0.0) * (n in shared)) * g0[n] + g1[n] for n in g0}


def conflicting(scope: str, **options: object) -> tuple[DHKD, tuple[Tensor, Tensor]]:
    """A deterministic method, on a batch where the gradients conflict."""
    student, teacher = pair()
    images, target = batch()
    with torch.no_grad():
        logits = teacher.eval()(images)
        teacher.fc.weight *= 30
        # Labels that the teacher considers least likely, so that the losses conflict.
        target = logits.argmin(1)
    method = DHKD(student, teacher, align=scope, dropout=0.0, head="linear", **options).eval()
    method.head.load_state_dict(student.fc.state_dict())
    return method, (images, target)


def matches(method: nn.Module, expected: dict[str, Tensor], **tolerance: float) -> None:
    for name, gradient in gradients(method).items():
        torch.testing.assert_close(gradient, expected[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance)


@pytest.mark.parametrize("scope", SCOPES)
def test_the_released_formula(scope: str) -> None:
    method, one = conflicting(scope)
    g0, g1 = separate(method, [one])
    expected = aligned(g0, g1, scope)
    assert not torch.equal(
        expected["student.features.0.0.weight"],
        (g0["student.features.0.0.weight"] + g1["student.features.0.0.weight"]),
    )
    method.backward(method(one))
    method.finish_gradients()
    matches(method, expected, rtol=1e-4, atol=1e-6)
    # With the backbone as scope, no conflict remains there.
    after = gradients(method)
    dot = sum(((after[n] - g0[n]) * g0[n]).sum() for n in g0 if n.startswith("student.features"))
    before = sum((g1[n] * g0[n]).sum() for n in g0 if n.startswith("student.features"))
    assert before < 0
    assert dot > before
    if scope == "shared":
        assert abs(dot) < 1e-4 * abs(before)


def test_gradients_that_agree_are_left_alone() -> None:
    student, teacher = pair()
    method = DHKD(student, teacher, dropout=0.0).eval()
    images, _ = batch()
    target = teacher(images).argmax(1)
    method.head = nn.Sequential(method.head, nn.Identity())
    g0, g1 = separate(method, [(images, target)])
    dot = sum((g0[n] * g1[n]).sum() for n in g0)
    assert dot > 0
    method.backward(method((images, target)))
    method.finish_gradients()
    matches(method, {n: g0[n] + g1[n] for n in g0})


def test_a_frozen_backbone_has_nothing_to_align() -> None:
    """Each loss then reaches its own head alone."""
    method, one = conflicting("shared")
    method.student.features.requires_grad_(False)
    g0, g1 = separate(method, [one])
    method.backward(method(one))
    method.finish_gradients()
    matches(method, {name: g0[name] + g1[name] for name in g0})
    assert gradients(method).keys() == {"student.fc.weight", "student.fc.bias", "head.weight", "head.bias"}


def test_no_gradient_of_the_labels_is_no_nan() -> None:
    student, teacher = pair()
    method = DHKD(student, teacher, ce_weight=0.0)
    method.backward(method(batch()))
    method.finish_gradients()
    assert all(gradient.isfinite().all() for gradient in gradients(method).values())
    assert gradients(method)["student.features.0.0.weight"].any()


@pytest.mark.parametrize("align", [*SCOPES, "none"])
def test_alignment_costs_one_backward_of_the_student(align: str) -> None:
    student, teacher = pair()
    method = DHKD(student, teacher, align=align)
    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    student.features[1][0].register_full_backward_hook(count)
    method.backward(method(batch()))
    method.finish_gradients()
    assert passes == (1 if align == "none" else 2)


@pytest.mark.parametrize("scope", SCOPES)
def test_accumulated_gradients_are_aligned_once_and_whole(scope: str) -> None:
    method, (images, target) = conflicting(scope)
    halves = [(images[:4], target[:4]), (images[4:], target[4:])]
    expected = aligned(*separate(method, halves), scope)
    for _ in range(2):  # the state between backward passes is reset
        method.zero_grad()
        for half in halves:
            method.backward(method(half), micro_batches=2)
        method.finish_gradients()
        matches(method, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scope", SCOPES)
def test_scaled_gradients_are_aligned_unscaled(scope: str) -> None:
    method, one = conflicting(scope)
    expected = aligned(*separate(method, [one]), scope)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for _ in range(2):
        optimizer.zero_grad()
        method.backward(method(one), scaler=scaler)
        scaler.unscale_(optimizer)
        method.finish_gradients()
        matches(method, expected, rtol=1e-4, atol=1e-6)
        scaler.step(optimizer)
        scaler.update(2.0**7)  # another scale in the next step
    optimizer.zero_grad()
    method.backward(method((one[0] * torch.inf, one[1])), scaler=scaler)
    scaler.unscale_(optimizer)
    method.finish_gradients()
    weights = [p.clone() for p in method.parameters()]
    scaler.step(optimizer)  # a step that overflowed is skipped as usual
    assert all(torch.equal(a, b) for a, b in zip(weights, method.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(dtype: torch.dtype) -> None:
    method, one = conflicting("all")
    expected = aligned(*separate(method, [one]), "all")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=dtype == torch.float16)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    with torch.autocast("cpu", dtype=dtype):
        terms = method(one)
    method.backward(terms, scaler=scaler)
    scaler.unscale_(optimizer)
    method.finish_gradients()
    for name, gradient in gradients(method).items():
        assert (gradient - expected[name]).norm() < 0.1 * expected[name].norm() + 1e-3, name


def test_clipping_sees_the_aligned_gradient() -> None:
    method, one = conflicting("all")
    expected = aligned(*separate(method, [one]), "all")
    method.backward(method(one))
    method.finish_gradients()
    norm = torch.nn.utils.clip_grad_norm_(method.parameters(), 1e-3)
    torch.testing.assert_close(
        norm, torch.stack([g.norm() for g in expected.values()]).norm(), rtol=1e-4, atol=0.0
    )


def of_this_rank() -> dict[str, list[dict[str, Tensor]]]:
    rank = torch.distributed.get_rank()
    found: dict[str, list[dict[str, Tensor]]] = {}
    for scope in SCOPES:
        method, (images, target) = conflicting(scope)
        runner = nn.parallel.DistributedDataParallel(method)
        mine = slice(4 * rank, 4 * rank + 4)
        method.backward(runner((images[mine], target[mine])))
        method.finish_gradients()
        whole = gradients(method)
        # And once more with accumulation, which does not reduce the first half.
        method.zero_grad()
        with runner.no_sync():
            method.backward(runner((images[mine][:2], target[mine][:2])), micro_batches=2)
        method.backward(runner((images[mine][2:], target[mine][2:])), micro_batches=2)
        method.finish_gradients()
        found[scope] = [whole, gradients(method)]
    for name in ("dckd", "mhkd"):
        found[name] = [gradients_of(name, slice(4 * rank, 4 * rank + 4), wrapped=True)]
    return found


def gradients_of(name: str, mine: slice, *, wrapped: bool) -> dict[str, Tensor]:
    method = find_method(name)(*pair(), example=batch(2)[0], **METHODS[name]).eval()
    runner = nn.parallel.DistributedDataParallel(method) if wrapped else method
    images, target = batch()
    method.backward(runner((images[mine], target[mine])))
    return gradients(method)


def test_two_processes_align_the_reduced_gradient(tmp_path: Path) -> None:
    of_ranks = on_two_ranks(of_this_rank, tmp_path)
    for name in ("dckd", "mhkd"):  # DCKD's relations are those of the whole batch too
        expected = gradients_of(name, slice(None), wrapped=False)
        for of_rank in of_ranks:
            (found,) = of_rank[name]
            for key, gradient in found.items():
                torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-6)
    for scope in SCOPES:
        method, one = conflicting(scope)
        expected = aligned(*separate(method, [one]), scope)
        for of_rank in of_ranks:
            for found in of_rank[scope]:
                assert found.keys() == expected.keys()
                for name, gradient in found.items():
                    torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_the_stop() -> None:
    student, teacher = pair()
    method = DHKD(student, teacher, stop_epoch=2)
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    for epoch, names in (
        (0, {"ce", "binary_kl_norm"}),
        (1, {"ce", "binary_kl_norm"}),
        (2, {"ce"}),
        (3, {"ce"}),
    ):
        method.set_epoch(epoch)
        terms = method(batch())
        assert set(terms) == names
        method.backward(terms)
        method.finish_gradients()
    assert len(calls) == 2  # an unused teacher does not run


def test_a_weight_of_zero_is_the_student_alone() -> None:
    student, teacher = pair()
    with torch.no_grad():
        teacher.fc.weight.fill_(torch.inf)  # 0 * inf would be NaN
    method = DHKD(student, teacher, alpha=0.0)
    method.backward(method(batch()))
    method.finish_gradients()
    assert all(gradient.isfinite().all() for gradient in gradients(method).values())


def test_heads() -> None:
    student, teacher = pair()
    shape = [type(layer) for layer in DHKD(student, teacher).head]
    assert shape == [nn.Linear, nn.Dropout, RowBatchNorm, nn.ReLU, nn.Linear]
    method = DHKD(student, teacher)
    assert (method.head[0].in_features, method.head[0].out_features, method.head[4].out_features) == (
        8,
        200,
        CLASSES,
    )
    assert method.head[1].p == 0.1
    assert isinstance(DHKD(student, teacher, head="linear").head, nn.Linear)
    by_path = DHKD(student, teacher, feature="features.1", head="linear", example=batch(2)[0])
    assert by_path.head.in_features == 8
    # The mean of features.1 is the classifier's input: both ways give the same features.
    found = DHKD(student, teacher, head="linear")
    by_path.head.load_state_dict(found.head.state_dict())
    torch.testing.assert_close(by_path(batch())["binary_kl_norm"], found(batch())["binary_kl_norm"])


def test_the_auxiliary_head_trains_the_backbone_and_not_the_main_head() -> None:
    student, teacher = pair()
    terms = DHKD(student, teacher)(batch())
    reached = set(parameters_of([terms["binary_kl_norm"]]))
    assert student.features[0][0].weight in reached
    assert student.fc.weight not in reached


def test_an_unknown_scope() -> None:
    with pytest.raises(ValueError, match="scope is 'backbone'; expected 'all' or 'shared'"):
        GradientAlignment("backbone")
    with pytest.raises(ValueError, match="align = 'backbone'"):
        DHKD(*pair(), align="backbone")
    assert isinstance(pair()[0], Net)


@pytest.mark.parametrize("name", ["dhkd", "binary_kl", "binary_kl_norm"])
def test_what_is_said_of_the_teachers_offset(name: str) -> None:
    """Once, in the first training batch, with the default that was taken."""

    def said(**options: object) -> str:
        student, teacher = pair()
        with torch.no_grad():
            teacher.fc.bias.add_(offset)
        method = find_method(name)(student, teacher, **options)
        method.check(batch())
        assert method.take_notes() == []
        method(batch())
        (note,) = method.take_notes()
        method(batch())
        assert method.take_notes() == []
        return note

    offset = -16.0
    assert "row mean -15.9" in said()
    assert said().endswith("center_teacher=true takes the mean out")
    assert "says nothing about the classes" in said(center_teacher=False)
    offset = 0.0
    assert said(center_teacher=False).endswith("center_teacher=false")


@pytest.mark.parametrize("name", ["dhkd", "binary_kl", "binary_kl_norm"])
def test_a_centered_teacher_has_no_offset(name: str) -> None:
    options = {"align": "none", "dropout": 0.0} if name == "dhkd" else {}

    def terms(offset: float, center_teacher: bool) -> dict[str, Tensor]:
        student, teacher = pair()
        with torch.no_grad():
            teacher.fc.bias.add_(offset)
        torch.manual_seed(0)
        method = find_method(name)(student, teacher, center_teacher=center_teacher, **options)
        return method(batch())

    for key, value in terms(0.0, True).items():
        torch.testing.assert_close(terms(-16.0, True)[key], value, rtol=1e-4, atol=1e-5)
    (distilled,) = set(terms(0.0, False)) - {"ce"}
    assert terms(-16.0, False)[distilled] > 2 * terms(0.0, False)[distilled]


def test_dhkd_that_has_stopped_says_nothing_of_its_teacher() -> None:
    method = DHKD(*pair(), stop_epoch=0)
    method(batch())
    assert method.take_notes() == []


def test_alignment_follows_what_is_frozen() -> None:
    method = DHKD(*pair(), example=batch(2)[0], hidden=16).train()
    body = method.student.features

    def aligned() -> int:
        method.zero_grad()
        method.backward(method(batch()))
        count = len(method.alignment._parameters)
        method.finish_gradients()
        return count

    everything = aligned()
    body[0].requires_grad_(False)
    assert aligned() == everything - len(list(body[0].parameters()))
    body[0].requires_grad_(True)
    assert aligned() == everything


def test_a_first_gradient_that_overflows_corrects_nothing() -> None:
    """In float16 the scaled gradient of the first loss is infinite, that of the sum is not."""
    weight = nn.Parameter(torch.ones(4))
    optimizer, scaler = torch.optim.SGD([weight], 0.1), torch.amp.GradScaler("cpu")
    alignment = GradientAlignment()
    outputs = (weight.half() * 8).float()
    first, rest = outputs.sum() * 0.25, -outputs.sum() * 0.2
    alignment.add(first, [rest], scaler)
    assert not any(bool(g.isfinite().all()) for g in alignment._first)
    scaler.scale(first + rest).backward()
    scaler.unscale_(optimizer)
    expected = weight.grad.clone()
    alignment.apply()
    assert torch.equal(weight.grad, expected)
    assert expected.isfinite().all()


def test_a_sharded_student_is_refused(tmp_path: Path) -> None:
    """FSDP puts the gradients elsewhere: they would stay as they were, without a word."""
    script = """
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from tests.distill.test_dhkd import conflicting
dist.init_process_group("gloo", init_method="file://" + __import__("sys").argv[1], rank=0, world_size=1)
method, batch = conflicting("all")
fully_shard(method.student, mesh=dist.init_device_mesh("cpu", (1,)))
try:
    method.backward(method(batch))
except RuntimeError as error:
    print(error)
dist.destroy_process_group()
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "meeting")], capture_output=True, text=True, timeout=120
    )
    assert "has no .grad to align: it is sharded (FSDP)" in done.stdout, done.stderr[-2000:]
