"""The numbers of whole training steps, and of losses of linear layers."""

import pytest
import torch
from torch import nn

from fastkd.bench import forms, step
from tests.bench.scripted import Scripted

# Seconds that each part takes in the step below; "data" is free.
TAKEN = {
    "teacher": 0.003,
    "student forward": 0.002,
    "loss": 0.005,
    "student backward": 0.007,
    "optimizer": 0.011,
}


class Net(nn.Module):
    """A linear layer in which time passes, forward and backward."""

    def __init__(self, part, clock):
        super().__init__()
        self.layer, self.part, self.clock, self.seen = nn.Linear(12, 5), part, clock, []

    def passes(self, part):
        self.clock.now += TAKEN[part]

    def forward(self, images):
        self.passes(self.part)
        self.seen.append((images, self.training))
        logits = self.layer(images.flatten(1))
        if logits.requires_grad:
            logits.register_hook(lambda gradient: self.passes("student backward"))
        return logits


def test_the_parts_of_a_step(ticking, monkeypatch):
    student, teacher = Net("student forward", ticking), Net("teacher", ticking)
    order = []
    slow = iter([1.0, 0.0, 0.5, 9.0, 0.0, 9.0])  # of the warm-up, and of one turn: no median has it

    def loss_of(name):
        def loss(s, t, y):
            order.append(name)
            assert s.is_leaf
            assert s.requires_grad
            assert not t.requires_grad
            seconds = TAKEN["loss"] * (2 if name == "eager" else 1)
            ticking.now += 0.8 * seconds + next(slow, 0.0)
            s.register_hook(lambda gradient: setattr(ticking, "now", ticking.now + 0.2 * seconds))
            return (s - t).square().sum()

        return loss

    took = torch.optim.SGD.step

    def optimize(self):
        ticking.now += TAKEN["optimizer"]
        before = student.layer.weight.clone()
        took(self)
        assert not torch.equal(before, student.layer.weight)

    losses = {name: loss_of(name) for name in ("fastkd", "eager")}
    asked = []
    monkeypatch.setattr(step.peers, "variants", lambda loss, names, device: asked.append(names) or losses)
    monkeypatch.setattr(torch.optim.SGD, "step", optimize)
    monkeypatch.setitem(step.STEPS, "tiny", step.Setup(lambda: (student, teacher), (3, 2, 2), 5, {"cpu": 3}))
    ours, eager = step.measure_step("tiny", "cpu", {"eager", "native"}, batch=None, seconds=0.0)
    assert asked == [{"eager"}]
    assert (ours["batch"], ours["classes"], ours["turns"]) == (3, 5, 7)
    assert order[:5] == ["fastkd", "fastkd", "eager", "eager", "fastkd"]  # twice each, and once for the time
    assert order[5:] == 3 * ["eager", "fastkd", "fastkd", "eager"] + ["eager", "fastkd"]
    expected = {"data": 0.0, **{part: 1e3 * seconds for part, seconds in TAKEN.items()}}
    assert ours["split_ms"] == pytest.approx(expected)
    assert eager["split_ms"] == pytest.approx({**expected, "loss": 10.0})
    assert (ours["ms"], eager["ms"]) == (pytest.approx(28), pytest.approx(33))
    assert ours["loss_share"] == pytest.approx(5 / 28)
    images, training = student.seen[0]
    assert training
    assert not teacher.seen[0][1]
    assert images.shape == (3, 3, 2, 2)
    assert 0 <= images.min() < images.max() <= 1


def test_seconds_of_a_step_are_ten_times_those_of_a_loss(ticking, monkeypatch):
    monkeypatch.setitem(TAKEN, "loss", 0.088)  # a step takes 0.1 s
    nets = Net("student forward", ticking), Net("teacher", ticking)

    def loss(s, t, y):
        ticking.now += TAKEN["loss"]
        return (s - t).sum()

    monkeypatch.setattr(step.peers, "variants", lambda *_: {"fastkd": loss, "eager": loss})
    monkeypatch.setitem(step.STEPS, "tiny", step.Setup(lambda: nets, (3, 2, 2), 5, {"cpu": 3}))
    ours, _ = step.measure_step("tiny", "cpu", set(), batch=2, seconds=0.33)
    assert (ours["batch"], ours["turns"]) == (2, 16)  # of 0.2 s for both, in 3.3 s


class Peak(Scripted):
    def extra_memory(self, call):
        super().extra_memory(call)
        return 1_000_000


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_memory_of_layers_is_without_the_gradient_of_the_weight(dtype, size):
    case = forms.Case("kd", 6, 50, 8, 12, dtype)
    clock = Peak()
    clock.time = lambda launch, turn: 2.0
    ours, eager = forms.measure(case, clock, {"eager"}, seconds=0.0)
    assert ours["extra_bytes"] == eager["extra_bytes"] == 1_000_000 - 50 * 8 * size
    assert (ours["ms"], ours["turns"]) == (2.0, 3)
    assert ours["gradient_error"] < (1e-5 if size == 4 else 0.02)


def test_the_larger_error_of_a_layer_counts(monkeypatch):
    found = iter([1.0, 3.0, 4.0, 2.0])
    monkeypatch.setattr(forms, "relative_error", lambda *_: next(found))
    clock = Peak()
    clock.time = lambda launch, turn: 2.0
    records = forms.measure(forms.Case("kd", 6, 50, 8, 12, "float32"), clock, {"eager"}, seconds=0.0)
    assert [record["gradient_error"] for record in records] == [3.0, 4.0]


def test_layers_have_logits_of_spread_3():
    layers = forms.make_layers(forms.Case("kd", 200, 300, 64, 16, "float32"), "cpu")
    for hidden, weight in (layers[:2], layers[2:4]):
        assert (hidden @ weight.t()).std().item() == pytest.approx(3.0, rel=0.05)
    assert [tensor.requires_grad for tensor in layers] == [True, True, False, False, False]


def test_widths_of_a_shape():
    known, other = forms.suite(["kd"], [(1024, 131_072), (8, 100)], None)
    assert (known.student_width, known.teacher_width) == (512, 512)
    assert (other.student_width, other.teacher_width) == (256, 512)
    assert {case.loss for case in forms.suite(None, None, None)} == set(forms.LOSSES)
