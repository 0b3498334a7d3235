"""What a teacher's cache stores: records, their precision, and the losses of methods that learn from them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import fastkd
from fastkd.distill import GivenTeacher, Method, find_method
from fastkd.distill.options import check_options
from fastkd.train.run.cache_stores import CacheError, LogitsStore, Store, TopKStore, features_store
from tests.train.tiny import CLASSES, Net

CPU = torch.device("cpu")


class Said(nn.Module):
    """A teacher that says what it is told."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.said = logits

    def forward(self, images: Tensor) -> Tensor:
        return self.said


def stored(store: Store, teacher: nn.Module, images: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        records = store.pack(*store.of_teacher(teacher, images, target))
    assert records.dtype == store.record
    return store.unpack(records, CPU)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5),
    classes=st.integers(2, 60),
    share=st.floats(0.0, 1.0),
    temperature=st.sampled_from([0.5, 1.0, 4.0]),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 10.0, 300.0]),
    shift=st.sampled_from([0.0, -50.0, 1000.0]),
    seed=st.integers(0, 2**31),
)
def test_top_k_comes_back(
    rows: int, classes: int, share: float, temperature: float, scale: float, shift: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=generator) * scale + shift
    target = torch.randint(classes, (rows,), generator=generator)
    store = TopKStore(classes, 1 + int(share * (classes - 2)), temperature)
    log_probs, indices, log_rest = stored(store, Said(logits), logits, target)
    exact = (logits.double() / temperature).log_softmax(1)
    assert (indices == target[:, None]).any(1).all()
    assert (indices.diff(dim=1) > 0).all()
    # float16 has 11 bits, and float32 rounded the logits before.
    atol = 1e-6 * (1 + scale + abs(shift)) / temperature
    torch.testing.assert_close(log_probs.double(), exact.gather(1, indices), rtol=2**-11, atol=atol)
    rest = exact.scatter(1, indices, -torch.inf).logsumexp(1)
    torch.testing.assert_close(log_rest.double(), rest, rtol=1e-6, atol=atol)


def test_logits_and_features_come_back() -> None:
    logits = torch.randn(8, 1000) * 4
    (again,) = stored(LogitsStore(1000), Said(logits), logits, torch.arange(8))
    torch.testing.assert_close(again, logits, rtol=0, atol=0.02)
    teacher, images = Net(6).eval(), torch.randn(8, 3, 8, 8)
    store = features_store(teacher, images, "float32")
    (features,) = stored(store, teacher, images, torch.arange(8) % CLASSES)
    assert features.dtype == torch.float16
    expected = teacher.features(images).mean((2, 3))
    torch.testing.assert_close(features.float(), expected, rtol=2**-11, atol=2**-25)
    form = store.teacher().logits(features)
    assert isinstance(form, fastkd.LinearLogits)
    torch.testing.assert_close(form.dense(), teacher(images), rtol=1e-3, atol=1e-3)


def test_the_sizes_of_records() -> None:
    def size(store: Store) -> int:
        return store.record.itemsize

    assert [size(TopKStore(1000, k, 1.0)) for k in (1, 4, 16)] == [8, 20, 68]
    assert TopKStore(2**16, 1, 1.0).record["classes"].base == np.dtype("<u2")
    assert size(TopKStore(2**16 + 1, 16, 1.0)) == 100
    assert size(LogitsStore(1000)) == 2004
    assert size(features_store(Net(256), torch.randn(2, 3, 8, 8), "float32")) == 2 * 512


class Own(Method, name="own_for_cache"):
    """Reads the teacher's logits as a tensor."""

    def terms(self, seen: Any) -> dict[str, Tensor]:
        return {"mse": F.mse_loss(seen.student_logits, seen.teacher_logits)}


METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "kd": ("kd", {"label_smoothing": 0.1}),
    "lskd": ("lskd", {}),
    "dkd": ("dkd", {"warmup_epochs": 3}),
    "dckd": ("dckd", {}),
    "dckd by argmax": ("dckd", {"fix_acquired": "argmax"}),
    "nkd": ("nkd", {}),
    "nkd at 3": ("nkd", {"temperature": 3.0}),
    "binary_kl": ("binary_kl", {}),
    "binary_kl_norm": ("binary_kl_norm", {"center_teacher": False}),
    "dhkd": ("dhkd", {"hidden": 8, "dropout": 0.0}),
    "own": ("own_for_cache", {}),
    "labels": ("cross_entropy", {}),
}
AT_K = ("kd", "dkd", "dckd", "dckd by argmax", "nkd")


def step(method: Method, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Loss and gradient of a training step, which the method's notes go through too."""
    method.train()
    loss = sum(method(batch).values(), torch.zeros(()))
    trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, trained, allow_unused=True)
    return loss.detach(), torch.cat([g.flatten() for g in gradients if g is not None])


def pair(name: str, given: GivenTeacher, teacher: nn.Module) -> tuple[Method, Method]:
    """The same method with a cached teacher and with the teacher."""
    kind, options = METHODS[name]
    methods = []
    for one in (given, teacher):
        torch.manual_seed(1)
        methods.append(find_method(kind)(Net(4, norm=False), one, **options))
    return methods[0], methods[1]


@pytest.fixture
def teacher() -> Net:
    torch.manual_seed(0)
    return Net(6).eval()


IMAGES = torch.randn(9, 3, 8, 8, generator=torch.Generator().manual_seed(5))
TARGET = torch.arange(9) % CLASSES


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("store", ["features", "logits"])
def test_every_method_of_logits_learns_from_features_and_logits(name: str, store: str, teacher: Net) -> None:
    made = LogitsStore(CLASSES) if store == "logits" else features_store(teacher, IMAGES, "float32")
    cached, live = pair(name, made.teacher(), teacher)
    outputs = stored(made, teacher, IMAGES, TARGET)
    loss, gradient = step(cached, (IMAGES, TARGET, *outputs))
    exact_loss, exact = step(live, (IMAGES, TARGET))
    torch.testing.assert_close(loss, exact_loss, rtol=1e-3, atol=1e-6)
    assert (gradient - exact).norm() <= 2e-3 * exact.norm()
    assert cached.take_notes() == live.take_notes()


def at_k(name: str, k: int) -> tuple[TopKStore, float]:
    kind, options = METHODS[name]
    cls = find_method(kind)
    temperature = cls.top_k_temperature(check_options(cls, options))
    return TopKStore(CLASSES, k, temperature), temperature


@pytest.mark.parametrize("name", AT_K)
def test_all_but_one_class_are_the_teacher(name: str, teacher: Net) -> None:
    store, _ = at_k(name, CLASSES - 1)
    cached, live = pair(name, store.teacher(), teacher)
    loss, gradient = step(cached, (IMAGES, TARGET, *stored(store, teacher, IMAGES, TARGET)))
    exact_loss, exact = step(live, (IMAGES, TARGET))
    torch.testing.assert_close(loss, exact_loss, rtol=1e-3, atol=1e-6)
    assert (gradient - exact).norm() <= 5e-3 * exact.norm()


@pytest.mark.parametrize("k", [1, 3])
def test_what_few_classes_leave_out(k: int, teacher: Net) -> None:
    """KD loses T^2 p_rest KL of the two models' distributions over the other classes, and nothing else."""
    store, temperature = at_k("kd", k)
    cached, live = pair("kd", store.teacher(), teacher)
    outputs = stored(store, teacher, IMAGES, TARGET)
    loss, _ = step(cached, (IMAGES, TARGET, *outputs))
    exact, _ = step(live, (IMAGES, TARGET))
    rest = torch.ones(9, CLASSES).scatter(1, outputs[1], 0).bool()
    with torch.no_grad():
        p, q = (
            (model(IMAGES) / temperature).softmax(1)[rest].view(9, -1) for model in (teacher, live.student)
        )
    total = p.sum(1)
    p, q = p / total[:, None], q / q.sum(1, keepdim=True)
    left_out = 0.9 * temperature**2 * (total * (p * (p / q).log()).sum(1)).mean()
    torch.testing.assert_close(exact - loss, left_out, rtol=2e-2, atol=2e-6)
    assert left_out > 0


@pytest.mark.parametrize(
    ("kind", "options", "found"),
    [
        ("kd", {"temperature": 3.0}, 3.0),
        ("dkd", {}, 4.0),
        ("dckd", {"temperature": 2.0}, 2.0),
        ("nkd", {}, 1.0),
        ("nkd", {"temperature": 3.0}, "at a temperature other than 1"),
        ("lskd", {}, "with standardize=True"),
        ("kd", {"standardize": True}, "with standardize=True"),
        ("dkd", {"standardize": True}, "with standardize=True"),
        ("binary_kl", {}, "compares each class by itself"),
        ("binary_kl_norm", {}, "compares each class by itself"),
        ("dhkd", {}, "compares each class by itself"),
        ("own_for_cache", {}, "does not say at which temperature"),
    ],
)
def test_where_top_k_is_defined(kind: str, options: dict[str, Any], found: float | str) -> None:
    cls = find_method(kind)
    given = check_options(cls, options)
    if isinstance(found, float):
        assert cls.top_k_temperature(given) == found
        return
    with pytest.raises(ValueError, match=found):
        cls.top_k_temperature(given)


def test_a_method_that_needs_all_logits_refuses_top_k(teacher: Net) -> None:
    cached, _ = pair("own", TopKStore(CLASSES, 2, 1.0).teacher(), teacher)
    with pytest.raises(ValueError, match="own_for_cache needs all of the teacher's logits"):
        cached((IMAGES, TARGET, *stored(TopKStore(CLASSES, 2, 1.0), teacher, IMAGES, TARGET)))


def test_mixed_labels(teacher: Net) -> None:
    """KD of mixed images reads no label of the teacher: the most probable classes are kept."""
    store, _ = at_k("kd", 2)
    mixed = F.one_hot(TARGET, CLASSES) * 0.7 + F.one_hot(TARGET.flip(0), CLASSES) * 0.3
    outputs = stored(store, teacher, IMAGES, mixed)
    expected = teacher(IMAGES).topk(2).indices.sort(1).values
    assert torch.equal(outputs[1], expected)
    cached, _ = pair("kd", store.teacher(), teacher)
    assert step(cached, (IMAGES, mixed, *outputs))[0].isfinite()


class Scaled(Net):
    def forward(self, images: Tensor) -> Tensor:
        return 2 * super().forward(images)


class Tokens(Net):
    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.features(images).flatten(2).mT).mean(1)


def test_teachers_without_a_head(teacher: Net) -> None:
    images = torch.randn(4, 3, 8, 8)
    with pytest.raises(CacheError, match=r"layer 'fc' does not give its logits; use --store logits or top_k"):
        features_store(Scaled(4), images, "float32")
    with pytest.raises(CacheError, match=r"layer 'fc' gets \[4, 4, 8\], expected \[N, H\]"):
        features_store(Tokens(4), images, "float32")
    no_linear = nn.Sequential(nn.Conv2d(3, 5, 8), nn.Flatten())
    with pytest.raises(
        CacheError, match=r"the teacher \(Sequential\) cannot be found: it has no linear layer"
    ):
        features_store(no_linear, images, "float32")
    store = features_store(teacher, images, "float32")
    with pytest.raises(CacheError, match=r"up to 7e\+04, beyond float16's 65504; use --store logits"):
        store.pack(torch.full((1, 12), 7e4))


def test_a_teacher_in_bfloat16(teacher: Net) -> None:
    """Its features have 8 bits, which float16 holds; the logits are not rounded to bfloat16 again."""
    store = features_store(teacher, IMAGES, "bfloat16")
    with torch.autocast("cpu", torch.bfloat16):
        (features,) = stored(store, teacher, IMAGES, TARGET)
        expected = teacher(IMAGES)
    form = store.teacher().logits(features)
    assert isinstance(form, fastkd.LinearLogits)
    assert (form.dense() - expected).abs().max() <= 2e-2 * expected.abs().max()
