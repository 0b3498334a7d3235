"""MHKD: heads on named layers, the frozen backbone, the stop-gradient, heads from a checkpoint."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastkd.distill import MHKD, FeatureError, OptionError

from .models import Net, batch, pair

LAYERS = ["features.0", "features.1"]


def build(**options: object) -> MHKD:
    student, teacher = pair()
    return MHKD(student, teacher, **{"example": batch(2)[0], "layers": LAYERS, "head_width": 8, **options})


def head_gradients(method: MHKD) -> list[Tensor | None]:
    return [p.grad for p in method.teacher_heads.parameters()]


def test_the_formula() -> None:
    method = build(ce_weight=2.0, alpha=3.0, beta=0.5, temperature=3.0, head_kd=0.8).eval()
    images, target = batch()
    total = sum(method((images, target)).values())

    def kd(s: Tensor, t: Tensor) -> Tensor:
        return 9 * F.kl_div((s / 3).log_softmax(1), (t / 3).softmax(1), reduction="batchmean")

    student, teacher = method.student, method.teacher
    s, t = student(images), teacher(images)
    expected = 2 * F.cross_entropy(s, target) + 3 * kd(s, t)
    for i, (s_head, t_head) in enumerate(zip(method.student_heads, method.teacher_heads, strict=True)):
        hs, ht = s_head(student.features[: i + 1](images)), t_head(teacher.features[: i + 1](images))
        expected = expected + F.cross_entropy(ht, target)
        expected = expected + 0.5 * (0.8 * kd(hs, ht) + 0.2 * F.cross_entropy(hs, target))
    torch.testing.assert_close(total, expected)


def test_heads_of_unlike_widths() -> None:
    method = build(head_width=16)
    kinds = [type(layer) for layer in method.student_heads[1].layers]
    assert kinds == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU] * 2
    assert [head.layers[0].in_channels for head in method.student_heads] == [4, 8]
    assert [head.layers[0].in_channels for head in method.teacher_heads] == [6, 12]
    assert method.student_heads[0].classifier.in_features == 16


def test_heads_with_two_linear_layers(tmp_path: Path) -> None:
    method = build(head_linears=2)
    for head in (*method.student_heads, *method.teacher_heads):
        assert [type(layer) for layer in head.classifier] == [nn.Linear, nn.ReLU, nn.Linear]
        assert [(head.classifier[i].in_features, head.classifier[i].out_features) for i in (0, 2)] == [
            (8, 8),
            (8, 7),
        ]
    feature = torch.randn(2, 4, 8, 8)
    head = method.student_heads[0].eval()
    pooled = head.layers(feature).mean((2, 3))
    expected = head.classifier[2](head.classifier[0](pooled).relu())
    torch.testing.assert_close(head(feature), expected)
    method.backward(method(batch()))
    assert head.classifier[0].weight.grad.any()
    for bad in (0, 3, 1.5):
        with pytest.raises(OptionError, match="head_linears"):
            build(head_linears=bad)
    path = tmp_path / "last.pt"
    torch.save({"format": "fastkd-1", "method": method.parts_state()}, path)
    loaded = build(head_linears=2, teacher_heads=str(path))
    assert torch.equal(
        loaded.teacher_heads[1].classifier[2].weight, method.teacher_heads[1].classifier[2].weight
    )
    with pytest.raises(ValueError, match="does not fit"):
        build(teacher_heads=str(path))


def test_the_keys_of_a_checkpoint_stay() -> None:
    """Those of ``last.pt`` of earlier runs, whose teacher heads are loaded by name."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    head = ["layers.0.weight", *(f"layers.1.{name}" for name in norm)]
    head += [
        "layers.3.weight",
        *(f"layers.4.{name}" for name in norm),
        "classifier.weight",
        "classifier.bias",
    ]
    expected = [
        f"{of}_heads.{index}.{key}" for of in ("student", "teacher") for index in (0, 1) for key in head
    ]
    assert list(build().parts_state()) == expected


def test_the_teacher_stays_as_it_was_and_its_heads_learn() -> None:
    method = build().train()
    teacher = method.teacher
    teacher.train()  # a user's mistake, corrected by the next train()
    method.train()
    before, heads = copy.deepcopy(teacher.state_dict()), copy.deepcopy(method.teacher_heads.state_dict())
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        method.backward(method(batch()))
        optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    assert not torch.equal(method.teacher_heads[0].classifier.weight, heads["0.classifier.weight"])


def test_the_teachers_heads_hear_nothing_of_the_student() -> None:
    with_student, alone = build().eval(), build(alpha=0.0, beta=0.0).eval()
    alone.load_parts_state(with_student.parts_state())
    for method in (with_student, alone):
        method.backward(method(batch()))
    assert all(
        torch.equal(a, b) for a, b in zip(head_gradients(with_student), head_gradients(alone), strict=True)
    )
    assert all(gradient.any() for gradient in head_gradients(alone))


def test_teacher_heads_from_a_checkpoint(tmp_path: Path) -> None:
    trained = build()
    path = tmp_path / "last.pt"
    torch.save({"format": "fastkd-1", "method": trained.parts_state()}, path)
    method = build(teacher_heads=str(path)).train()
    for a, b in zip(trained.teacher_heads.parameters(), method.teacher_heads.parameters(), strict=True):
        assert torch.equal(a, b)
    before = copy.deepcopy(method.teacher_heads.state_dict())
    terms = method(batch())
    assert "teacher_head_ce" not in terms
    method.backward(terms)
    assert head_gradients(method) == [None] * len(head_gradients(method))
    assert not method.teacher_heads.training
    assert all(torch.equal(v, before[k]) for k, v in method.teacher_heads.state_dict().items())
    assert method.student_heads[0].classifier.weight.grad.any()

    with pytest.raises(ValueError, match="does not fit"):
        build(teacher_heads=str(path), head_width=4)
    torch.save({"method": {}}, path)
    with pytest.raises(ValueError, match="holds no teacher heads"):
        build(teacher_heads=str(path))
    path.write_bytes(b"half a file")
    with pytest.raises(ValueError, match="cannot be read"):
        build(teacher_heads=str(path))
    with pytest.raises(ValueError, match="cannot be read"):
        build(teacher_heads=str(tmp_path / "none.pt"))


def test_heads_that_know_nothing_of_the_labels_are_said(tmp_path: Path) -> None:
    """As those of another teacher, which fit by shape."""
    trained = build()
    optimizer = torch.optim.Adam(trained.teacher_heads.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        trained.backward(trained(batch()))
        optimizer.step()
    path = tmp_path / "last.pt"
    torch.save({"method": trained.parts_state()}, path)
    own = build(teacher_heads=str(path)).train()
    own(batch())
    assert own.take_notes() == []
    other = build(teacher_heads=str(path)).train()
    with torch.no_grad():
        last = other.teacher_heads[1].classifier
        last.weight.copy_(last.weight.roll(1, 0))
        last.bias.copy_(last.bias.roll(1))
    other(batch())
    (note,) = other.take_notes()
    assert "the teacher's head on features.1 has cross-entropy" in note
    assert "equal logits 1.95: are teacher_heads those of this teacher?" in note


def test_bad_layers() -> None:
    with pytest.raises(
        FeatureError, match=r"the student has no layer 'features\.2'; the nearest are features\.[01]"
    ):
        build(layers=["features.2"])
    with pytest.raises(FeatureError, match="the teacher has no layer 'feature'; the nearest are features"):
        build(teacher_layers=["features.0", "feature"])
    with pytest.raises(ValueError, match="must pair up"):
        build(teacher_layers=["features.0"])
    with pytest.raises(ValueError, match="must pair up"):
        build(layers=[])
    with pytest.raises(ValueError, match="example is missing"):
        build(example=None)


@pytest.mark.parametrize(
    ("layers", "teacher_layers", "shapes"),
    [
        (["features.1"], ["features.0"], ([8, 4, 4], [6, 8, 8])),
        (["features.0"], ["features.1"], ([4, 8, 8], [12, 4, 4])),
        (["fc:input"], ["features.0"], ([8], [6, 8, 8])),
        (["features.0"], ["tokens"], ([4, 8, 8], [16, 12])),
        (["tokens"], ["features.1"], ([16, 8], [12, 4, 4])),
    ],
)
def test_pairs_that_differ_in_width_and_space(
    layers: list[str], teacher_layers: list[str], shapes: tuple[list[int], list[int]]
) -> None:
    torch.manual_seed(0)
    student, teacher = TokenNet(4), TokenNet(6)
    options = {"layers": layers, "teacher_layers": teacher_layers, "head_width": 8}
    method = MHKD(student, teacher, example=batch(2)[0], **options).eval()
    found = [of_model[0][path] for of_model, path in zip(method.all_shapes(), method.pairs[0], strict=True)]
    assert [list(shape[1:]) for shape in found] == list(shapes)
    images, target = batch()
    with method.student_taps.reading() as s, method.teacher_taps.reading() as t:
        student(images), teacher(images)
    of_student, of_teacher = (
        method.student_heads[0](s[layers[0]]),
        method.teacher_heads[0](t[teacher_layers[0]]),
    )
    kd = 16 * F.kl_div((of_student / 4).log_softmax(1), (of_teacher / 4).softmax(1), reduction="batchmean")
    terms = method((images, target))
    torch.testing.assert_close(terms["head_kd"], 0.9 * kd)
    method.train()
    optimizer = torch.optim.SGD(method.parameters(), lr=0.05)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        losses.append(method.backward(method((images, target))).item())
        optimizer.step()
    assert losses[-1] < losses[0]


class TokenNet(Net):
    """``Net`` whose last feature also exists as a sequence of tokens: the output of ``tokens``."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.tokens = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.tokens(self.features(images).flatten(2).transpose(1, 2))
        return self.fc(tokens.mean(1))
