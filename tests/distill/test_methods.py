"""Properties of every method, and the formula of each."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastkd
from fastkd import reference
from fastkd.distill import DCKD, DHKD, DKD, KD, MHKD, LossMethod, Method, OptionError, find_method, options_of
from fastkd.distill.method import Seen
from fastkd.distill.options import check_options
from fastkd.distill.terms import TermError, total_of

from .models import CLASSES, METHODS, Net, batch, pair


def build(name: str, seed: int = 0, **options: object) -> Method:
    student, teacher = pair(seed)
    return find_method(name)(student, teacher, example=batch(2)[0], **{**METHODS[name], **options})


def test_every_method_is_tried_here() -> None:
    shipped = {name for name, cls in Method._known.items() if cls.__module__.startswith("fastkd.")}
    assert shipped == set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_a_step_trains_the_student_and_leaves_the_teacher(name: str) -> None:
    method = build(name)
    teacher = method.teacher
    assert teacher is not None
    before = copy.deepcopy(teacher.state_dict())
    method.train()
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        terms = method(batch())
        losses.append(method.backward(terms).item())
        method.finish_gradients()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert not teacher.training
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not {id(p) for p in method.parameters()} & {id(p) for p in teacher.parameters()}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("graph", [True, False])
def test_the_terms_add_up_to_the_loss(name: str, graph: bool) -> None:
    method = build(name)
    with torch.set_grad_enabled(graph):
        terms = method(batch())
    assert "loss" not in terms
    assert all(value.requires_grad == graph for value in terms.values())
    total = sum(terms.values())
    assert torch.equal(total_of(terms), total)
    if graph:
        assert torch.equal(method.backward(terms), total)


@pytest.mark.parametrize("name", METHODS)
def test_the_sum_carries_the_gradient(name: str) -> None:
    options = {"align": "none", "dropout": 0.0} if name == "dhkd" else {}
    gradients = []
    for train in (lambda m, t: m.backward(t), lambda m, t: sum(t.values()).backward()):
        method = build(name, **options)
        train(method, method(batch()))
        gradients.append([p.grad for p in method.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert one is None or torch.equal(one, other)


@pytest.mark.parametrize("name", ["kd", "lskd", "dkd", "dckd"])
def test_the_gradient_of_a_fused_loss_is_that_of_its_formula(name: str) -> None:
    gradients = []
    for backend in ("native", "eager"):
        with fastkd.use_backend(backend):
            method = build(name)
            sum(method(batch()).values()).backward()
            gradients.append(torch.cat([p.grad.flatten() for p in method.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    assert gradients[0].abs().max() > 0


def test_a_term_of_a_fused_loss_has_no_gradient_of_its_own() -> None:
    terms = KD(*pair())(batch())
    with pytest.raises(RuntimeError, match="terms of a fused loss are trained together"):
        terms["ce"].backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="weighted by its options"):
        (terms["ce"] + 2 * terms["kd"]).backward()


def test_what_are_no_terms() -> None:
    method = KD(*pair())
    method.terms = lambda seen: torch.ones((), requires_grad=True)
    with pytest.raises(ValueError, match="terms returned a Tensor; expected a dict of named scalars"):
        method(batch())


@pytest.mark.parametrize("name", METHODS)
def test_export_is_the_plain_student(name: str) -> None:
    method = build(name)
    plain = Net(4)
    images, target = batch()
    method.train()
    method.backward(method((images, target)))
    exported = method.export()
    assert exported.state_dict().keys() == plain.state_dict().keys()
    assert type(exported) is Net
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in exported.modules())
    plain.load_state_dict(exported.state_dict())
    with torch.no_grad():
        assert torch.equal(exported.eval()(images), plain.eval()(images))


def test_wrapped_students() -> None:
    student, teacher = pair()
    for wrapped in (torch.compile(student), nn.DataParallel(student)):
        method = DHKD(wrapped, teacher, hint_layer="features.1", hint_weight=1.0, example=batch(2)[0])
        assert method.export() is student
        assert method.feature == "fc:input"  # paths are those of the plain student


@pytest.mark.parametrize("name", METHODS)
def test_check_changes_nothing(name: str) -> None:
    method = build(name).train()
    before, random = copy.deepcopy(method.state_dict()), torch.get_rng_state()
    modes = [module.training for module in method.modules()]
    method.check(batch(2))
    assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert [module.training for module in method.modules()] == modes
    assert all(parameter.grad is None for parameter in method.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_the_state_of_the_parts_comes_back(name: str) -> None:
    first, second = build(name), build(name, seed=5)
    state = first.parts_state()
    assert not any(key.startswith("student.") for key in state)
    assert bool(state) == (name in ("dhkd", "mhkd", "fitnets", "dckd"))
    second.load_parts_state(state)
    assert all(torch.equal(value, second.parts_state()[key]) for key, value in state.items())
    assert not torch.equal(first.student.fc.weight, second.student.fc.weight)
    with pytest.raises(ValueError, match=r"no place for \['nonsense'\]"):
        second.load_parts_state({**state, "nonsense": torch.zeros(1)})


@pytest.mark.parametrize("name", METHODS)
def test_methods_can_be_copied_and_pickled(name: str) -> None:
    method = build(name).eval()
    terms = method(batch())
    for other in (copy.deepcopy(method), pickle.loads(pickle.dumps(method))):
        assert other.student is not method.student
        again = other(batch())
        assert all(torch.equal(value, again[key]) for key, value in terms.items())


def eager(name: str, **options: object) -> torch.Tensor:
    with fastkd.use_backend("eager"):
        method = build(name, **options)
        return total_of(method(batch()))


def test_the_formulas() -> None:
    student, teacher = pair()
    images, target = batch()
    with torch.no_grad():
        s, t = student(images), teacher.eval()(images)
    ce = F.cross_entropy(s, target)

    def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return F.kl_div(b.log_softmax(1), a.log_softmax(1), log_target=True, reduction="batchmean")

    def standard(z: torch.Tensor) -> torch.Tensor:
        return (z - z.mean(1, keepdim=True)) / (z.std(1, keepdim=True) + 1e-7)

    def close(name: str, expected: torch.Tensor, **options: object) -> None:
        torch.testing.assert_close(total_of(build(name, **options)(batch())).detach(), expected)

    close("cross_entropy", ce, label_smoothing=0.0)
    close("kd", 0.1 * ce + 0.9 * 16 * kl(t / 4, s / 4), warmup_epochs=0)
    smooth = F.cross_entropy(s, target, label_smoothing=0.2)
    close("kd", 0.1 * smooth + 0.9 * 16 * kl(t / 4, s / 4), warmup_epochs=0, label_smoothing=0.2)
    close("lskd", 0.1 * ce + 9 * 4 * kl(standard(t) / 2, standard(s) / 2))
    difference = (s - t) / 4
    norm = 4 * difference.cosh().log().sum(1).mean()
    close("binary_kl_norm", ce + 0.5 * norm, center_teacher=False)
    tckd, nckd = (
        reference.softmax_rows(s, t, target, 4.0, 0.0, 0.0, a, b, 0.0, 0.0)[0].mean()
        for a, b in ((1.0, 0.0), (0.0, 1.0))
    )
    close("dkd", ce + 1.5 * tckd + 2 * nckd, alpha=1.5, beta=2.0)
    nkd = fastkd.nkd_loss(s, t, target, gamma=1.5, temperature=2.0)
    close("nkd", ce + nkd)


def test_dckd_that_fixes_nothing_is_dkd_to_the_bit() -> None:
    gradients = []
    for cls, options in ((DKD, {}), (DCKD, {"fix_acquired": False})):
        student, teacher = pair()
        method = cls(student, teacher, **options)
        method.backward(method(batch(32)))
        gradients.append([p.grad for p in student.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_dckd_does_not_pull_back_what_is_acquired() -> None:
    student, teacher = pair()
    images, target = batch(64)
    with torch.no_grad():
        sure = (student.train()(images) / 4).softmax(1).gather(1, target[:, None])
        teacher_sure = (teacher.eval()(images) / 4).softmax(1).gather(1, target[:, None])
    acquired = (sure >= teacher_sure)[:, 0]
    assert 0 < acquired.sum() < len(target)
    options = {"ce_weight": 0.0, "beta": 0.0}
    logits = {}
    for cls in (DCKD, DKD):
        method = cls(student, teacher, **options)
        seen = []
        hook = student.register_forward_hook(lambda *a, seen=seen: a[2].retain_grad() or seen.append(a[2]))
        method.backward(method((images, target)))
        hook.remove()
        logits[cls] = seen[0].grad
    assert not logits[DCKD][acquired].any()
    assert torch.equal(logits[DCKD][~acquired], logits[DKD][~acquired])
    assert logits[DKD][acquired].any()


def test_warmup_counts_epochs_from_one() -> None:
    method = build("kd", warmup_epochs=4)
    full = build("kd", warmup_epochs=0)(batch())["kd"]
    for epoch, share in ((0, 0.25), (1, 0.5), (3, 1.0), (9, 1.0)):
        method.set_epoch(epoch)
        torch.testing.assert_close(method(batch())["kd"], share * full)


def test_gradient_accumulation_is_the_gradient_of_the_whole() -> None:
    images, target = batch(8)
    whole = build("kd").eval()  # eval mode, since batch normalisation would make the halves differ
    whole.backward(whole((images, target)))
    parts = build("kd").eval()
    for half in (slice(0, 4), slice(4, 8)):
        parts.backward(parts((images[half], target[half])), micro_batches=2)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temprature": 2.0}, ["unknown option temprature", "did you mean temperature"]),
        ({"temperature": 0.0}, ["temperature = 0.0", "greater than 0"]),
        ({"kd_weight": -1.0}, ["kd_weight = -1.0", "greater than or equal to 0"]),
        ({"kd_weight": "1"}, ["kd_weight = '1' (str)", "number"]),
        ({"standardize": 1}, ["standardize = 1 (int)", "boolean"]),
        ({"hint_weight": float("inf")}, ["hint_weight = inf"]),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, object], words: list[str]) -> None:
    with pytest.raises(OptionError) as raised:
        KD(*pair(), **options)
    assert all(word in str(raised.value) for word in words)


def test_each_bad_value_is_one_error() -> None:
    with pytest.raises(OptionError) as raised:
        check_options(MHKD, {"layers": [3, "a", 4, 3], "alpha": -1.0, "head_linears": 3})
    assert [fault.partition(":")[0] for fault in str(raised.value).split("; ")] == [
        "layers = 3 (int)", "layers = 4 (int)", "alpha = -1.0 (float)", "head_linears = 3 (int)",
    ]  # fmt: skip


def test_options_are_those_of_the_signatures() -> None:
    assert list(options_of(KD))[:6] == [
        "ce_weight",
        "kd_weight",
        "temperature",
        "standardize",
        "label_smoothing",
        "warmup_epochs",
    ]
    assert options_of(find_method("lskd"))["kd_weight"].default == 9.0
    assert "hint_layer" in options_of(DCKD)
    assert "example" not in options_of(DCKD)


def test_a_missing_teacher_and_unlike_classes() -> None:
    student, _ = pair()
    with pytest.raises(ValueError, match="teacher is None"):
        KD(student, None)
    with pytest.raises(ValueError, match="student_logits has 7 classes and teacher_logits 9"):
        KD(student, Net(4, classes=9)).check(batch())
    with pytest.raises(
        ValueError, match=r"the student returns a torch.float32 tensor of shape \[8, 3, 8, 8\]"
    ):
        KD(nn.Identity(), student).check(batch())
    for wrong, words in (({}, "terms is empty"), ({"a": torch.zeros(2)}, r"'a' is torch.Size\(\[2\]\)")):
        method = KD(student, Net(6))
        method.terms = lambda seen, wrong=wrong: dict(wrong)
        with pytest.raises(ValueError, match=words):
            method.check(batch())
    with pytest.raises(ValueError, match=r"unknown method 'dkhd' .did you mean .*dhkd"):
        find_method("dkhd")
    with pytest.raises(ValueError, match="cannot be imported"):
        find_method("no_such_module:Thing")
    with pytest.raises(ValueError, match=r"expected a class derived from fastkd\.distill\.Method"):
        find_method("collections:OrderedDict")


def test_a_name_is_taken_once() -> None:
    with pytest.raises(TypeError, match=r"'kd' is taken by fastkd\.distill\.logits\.KD"):
        type("KD", (Method,), {"__module__": "elsewhere"})
    assert find_method("kd") is KD
    # A notebook's cell that is run again defines the same class anew.
    cells = [type("Cell", (Method,), {"__module__": "notebook"}) for _ in range(2)]
    assert find_method("cell") is cells[1]
    del Method._known["cell"]


def test_two_readings_of_dckd() -> None:
    """By argmax: where no student is right, it is DKD; where all are, it has no target term."""
    student, teacher = pair()
    logits, teacher_logits = torch.randn(6, 5), torch.randn(6, 5)

    def terms(name: str, target: torch.Tensor, **options: object) -> dict[str, float]:
        method = find_method(name)(student, teacher, beta=2.0, warmup_epochs=2, **options)
        seen = Seen(logits.clone().requires_grad_(), teacher_logits, target, {}, {})
        return {name: value.item() for name, value in method.terms(seen).items()}

    wrong, right = logits.argmin(1), logits.argmax(1)
    by_argmax = {"fix_acquired": "argmax"}
    assert terms("dckd", wrong, **by_argmax) == pytest.approx(terms("dkd", wrong), rel=1e-5)
    assert terms("dckd", right, **by_argmax)["tckd"] == 0.0
    assert terms("dckd", right, **by_argmax)["nckd"] == pytest.approx(terms("dkd", right)["nckd"], rel=1e-5)
    assert terms("dckd", right) == terms("dckd", right, fix_acquired=True)
    assert terms("dckd", right, fix_acquired="teacher") != terms("dckd", right, fix_acquired=False)
    assert terms("dckd", right, fix_acquired=False) == terms("dkd", right)
    accepted = "^fix_acquired = 'label' .str.: input should be a valid boolean, or 'teacher' or 'argmax'$"
    with pytest.raises(OptionError, match=accepted):
        terms("dckd", right, fix_acquired="label")


def test_a_loss_of_ones_own_and_what_it_may_return() -> None:
    def trained(loss: Callable[..., Any]) -> Tensor:
        method = LossMethod(*pair(), loss)
        return method.backward(method(batch()))

    kd = trained(lambda s, t, y: fastkd.kd_loss(s, t))
    for name in ("loss", "kd"):  # a term named as the loss does not take its place
        assert torch.equal(trained(lambda s, t, y, n=name: (v := fastkd.kd_loss(s, t), {n: v.detach()})), kd)
    for wrong in (lambda v: (v, v), lambda v: (v, {}, {}), lambda v: ()):
        with pytest.raises(TermError, match=r"a tuple of .*; expected a scalar, or a tuple of it and a dict"):
            trained(lambda s, t, y, wrong=wrong: wrong(fastkd.kd_loss(s, t)))


@pytest.mark.parametrize("name", METHODS)
def test_models_in_bfloat16(name: str) -> None:
    student, teacher = (model.bfloat16() for model in pair())
    images, target = batch()
    images = images.bfloat16()
    method = find_method(name)(student, teacher, example=images[:2], **METHODS[name]).train()
    method.backward(method((images, target)))
    method.finish_gradients()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in method.parameters())
    assert next(student.parameters()).grad is not None


def test_a_batch_of_too_many_entries() -> None:
    images, target = batch()
    logits = torch.randn(len(target), CLASSES)
    with pytest.raises(ValueError, match="the batch has 4 entries; expected"):
        build("kd")((images, target, logits, logits))


@pytest.mark.parametrize("name", METHODS)
def test_moved_to_bfloat16_as_a_whole(name: str) -> None:
    """With its heads and projections, and with its teacher, which is no submodule."""
    student, teacher = pair()
    method = find_method(name)(student, teacher, example=batch(2)[0], **METHODS[name]).to(torch.bfloat16)
    images, target = batch()
    terms = method((images.bfloat16(), target))
    method.backward(terms)
    assert all(value.isfinite() for value in terms.values())
    assert all(p.grad is not None for p in student.parameters())
