"""Features by path, finding classifiers, hints and relations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from fastkd.distill import DHKD, DKD, KD, RKD, CrossEntropy, FeatureError, FitNets, Taps, find_classifier
from fastkd.distill.features import Hint, angle_loss, distance_loss
from fastkd.distill.given import GivenTopK
from fastkd.models import GlyphCNN

from .models import CLASSES, batch, pair


class Odd(nn.Module):
    """Layers whose output is not a feature tensor, or that run twice or not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.two = Two()
        self.flat = nn.Linear(4, 4)
        self.never = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.relu = nn.ReLU(inplace=True)
        self.indices = Indices()

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.two(x)
        x = self.flat(self.flat(x))
        self.indices(x)
        return self.relu(self.norm(x))


class Two(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Indices(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.argmax(1)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("two", "'two' gives a tuple of 2; expected a tensor of features"),
        ("indices", "'indices' gives a torch.int64 tensor of shape"),
        ("never", "'never' did not run"),
        ("flat", "'flat' runs more than once"),
        ("norm", "'norm' is changed in place by a later layer"),
    ],
)
def test_what_is_no_feature(path: str, words: str) -> None:
    model = Odd()
    taps = Taps(model, "student")
    taps.add(path)
    with pytest.raises(FeatureError, match=words), taps.reading():
        model(torch.randn(3, 4))
    assert not any(module._forward_hooks for module in model.modules())


def test_outputs_and_inputs_by_path() -> None:
    student, _ = pair()
    taps = Taps(student, "student")
    taps.add("features.0")
    taps.add("fc:input")
    images, _ = batch()
    with taps.reading() as features:
        student(images)
    assert features["features.0"].shape == (8, 4, 8, 8)
    assert torch.equal(student.fc(features["fc:input"]), student(images)) or student.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in student.modules())
    for path in ("", ":input", "fc:output", "feature.0"):
        with pytest.raises(FeatureError, match="the student has no layer"):
            taps.add(path)


TORCHVISION = {
    "resnet18": "fc",
    "mobilenet_v2": "classifier.1",
    "vgg11": "classifier.6",
    "densenet121": "classifier",
    "shufflenet_v2_x0_5": "fc",
    "efficientnet_b0": "classifier.1",
    "convnext_tiny": "classifier.2",
    "swin_t": "head",
    "vit_b_32": "heads.head",
    "googlenet": "fc",
}


@pytest.mark.parametrize(("name", "path"), TORCHVISION.items())
def test_torchvisions_classifiers(name: str, path: str) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(name, num_classes=11)
    found, linear = find_classifier(model)
    assert (found, linear.out_features) == (path, 11)


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenetv3_small_050", "convnext_atto", "vit_tiny_patch16_224"]
)
def test_timms_classifiers(name: str) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, num_classes=11)
    path, linear = find_classifier(model)
    assert model.get_submodule(path) is model.get_classifier() is linear
    with pytest.raises(FeatureError, match="cannot be found"):
        find_classifier(timm.create_model(name, num_classes=0))


def test_our_own_and_a_strangers_classifier() -> None:
    assert find_classifier(GlyphCNN(11, width=2))[0] == "head"
    assert find_classifier(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))[0] == "1"
    with pytest.raises(FeatureError, match=r"of the student \(Sequential\) cannot be found: .* are 0, 1"):
        find_classifier(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    with pytest.raises(FeatureError, match="it has no linear layer; name the layer"):
        DHKD(torchvision.models.squeezenet1_1(num_classes=7), pair()[1])


@pytest.mark.parametrize("projection", ["bn_relu", "linear"])
def test_a_hint(projection: str) -> None:
    student, teacher = pair()
    images, target = batch()
    options = {"hint_layer": "features.1", "hint_weight": 3.0, "example": images[:2]}
    method = FitNets(student, teacher, hint_projection=projection, **options).eval()
    terms = method((images, target))
    projected = method.hint.projection
    convolution = projected if projection == "linear" else projected[0]
    assert (convolution.in_channels, convolution.out_channels, convolution.kernel_size) == (8, 12, (1, 1))
    expected = 3 * F.mse_loss(projected(student.features(images)), teacher.features(images))
    torch.testing.assert_close(terms["hint"], expected)
    pooled = FitNets(student, teacher, hint_projection=projection, hint_layer="fc:input", example=images[:2])
    assert any(isinstance(layer, nn.Linear) for layer in pooled.hint.projection.modules())

    with pytest.raises(ValueError, match="hint_layer is missing"):
        FitNets(student, teacher)
    with pytest.raises(ValueError, match="example is missing: fitnets"):
        FitNets(student, teacher, hint_layer="features.1")
    options = {"hint_layer": "features.1", "hint_teacher_layer": "fc:input", "example": images[:2]}
    with pytest.raises(FeatureError, match=r"two feature maps.* gives \[N, 8, 4, 4\] and .* \[N, 12\]"):
        FitNets(student, teacher, **options)
    for weight in ("hint_weight", "distance_weight", "angle_weight"):
        with pytest.raises(ValueError, match="teacher is None, but a hint or a relation distils from one"):
            CrossEntropy(student, None, **{weight: 1.0})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hint_layer": "feature.1"}, "the student has no layer 'feature.1'; the nearest are features.1"),
        ({"hint_teacher_layer": "feature.1"}, "the teacher has no layer 'feature.1'; the nearest are"),
        ({"relation_layer": "ffc:input"}, "the student has no layer 'ffc'; the nearest are fc"),
        ({"relation_layer": "fc", "relation_teacher_layer": "ffc"}, "the teacher has no layer 'ffc'"),
    ],
)
def test_layers_that_a_weight_of_zero_leaves_unread_must_exist(options: dict[str, str], words: str) -> None:
    student, teacher = pair()
    with pytest.raises(FeatureError, match=words):
        KD(student, teacher, **options)
    right = {"hint_layer": "features.1", "relation_layer": "fc:input", "relation_teacher_layer": "fc"}
    method = KD(student, teacher, hint_weight=0.0, distance_weight=0.0, angle_weight=0.0, **right)
    assert set(method(batch())) == {"ce", "kd"}
    assert not method.teacher_taps.paths  # so that a cache can replace it
    images, target = batch()
    cached = KD(student, GivenTopK(CLASSES, 3, 4.0), hint_weight=0.0, **right)
    assert set(cached((images, target, *cached.teacher.example(target)))) == {"ce", "kd"}
    CrossEntropy(student, hint_layer="features.1")


@pytest.mark.parametrize(
    ("of_student", "of_teacher", "compared"),
    [
        ((8, 8), (4, 4), (4, 4)),
        ((4, 4), (8, 8), (4, 4)),
        ((8, 2), (4, 6), (4, 2)),  # each is larger in one dimension
        ((7, 5), (4, 5), (4, 5)),
        ((3, 5), (3, 5), (3, 5)),
    ],
)
def test_a_hint_between_maps_of_different_sizes(
    of_student: tuple[int, int], of_teacher: tuple[int, int], compared: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    s = torch.randn(2, 3, *of_student, dtype=torch.float64, requires_grad=True)
    t = torch.randn(2, 5, *of_teacher, dtype=torch.float64)
    hint = Hint(s.shape, t.shape, ("a", "b"), "linear").double()

    def plain(s: Tensor) -> Tensor:
        """The mean of each cell, which reaches from floor(i in / out) to ceil((i + 1) in / out)."""

        def cells(x: Tensor) -> Tensor:
            rows = torch.stack([x[:, :, low:high].mean(2) for low, high in spans(x.shape[2], compared[0])], 2)
            columns = [rows[..., low:high].mean(3) for low, high in spans(x.shape[3], compared[1])]
            return torch.stack(columns, 3)

        def spans(inputs: int, outputs: int) -> list[tuple[int, int]]:
            return [(i * inputs // outputs, -(-(i + 1) * inputs // outputs)) for i in range(outputs)]

        return (hint.projection(cells(s)) - cells(t)).square().mean()

    value, expected = hint(s, t), plain(s)
    torch.testing.assert_close(value, expected, rtol=1e-13, atol=0.0)
    wanted = [s, *hint.parameters()]
    for found, gradient in zip(
        torch.autograd.grad(value, wanted), torch.autograd.grad(expected, wanted), strict=True
    ):
        torch.testing.assert_close(found, gradient, rtol=1e-12, atol=1e-16)
    if of_student == of_teacher:
        assert torch.equal(value, F.mse_loss(hint.projection(s), t))


def test_a_hint_of_another_size_trains_any_method() -> None:
    student, teacher = pair()
    images, target = batch()
    options = {"hint_layer": "features.1", "hint_teacher_layer": "features.0", "hint_weight": 2.0}
    options["hint_projection"] = "linear"
    method = KD(student, teacher, example=images[:2], **options).eval()
    terms = method((images, target))
    s, t = method.hint.projection(student.features(images)), teacher.features[0](images)
    torch.testing.assert_close(terms["hint"], 2 * F.mse_loss(s, F.avg_pool2d(t, 2)))
    method.backward(terms)
    assert method.hint.projection.weight.grad.any()


def test_hints_of_tokens() -> None:
    tokens = torch.Size([2, 5, 8])
    assert Hint(tokens, torch.Size([2, 5, 12]), ("a", "b"), "linear").projection.out_features == 12
    for other, words in (
        ([2, 7, 8], r"as many tokens L .*'a' gives \[N, 5, 8\] and .*'b' \[N, 7, 8\]"),
        ([2, 8], r"two sequences of tokens .*'b' \[N, 8\]"),
        ([2, 8, 4, 4], r"two feature maps .*'b' \[N, 8, 4, 4\]"),
    ):
        with pytest.raises(FeatureError, match=words):
            Hint(tokens, torch.Size(other), ("a", "b"), "bn_relu")


@pytest.mark.parametrize("shape", [(6, 3, 4, 5), (6, 4, 3), (6, 3), (1, 3)])
def test_the_published_projection(shape: tuple[int, ...]) -> None:
    """Each channel of the projected feature is normalised over everything else, then cut off at zero."""
    torch.manual_seed(0)
    width = 1 if len(shape) != 3 else -1
    s = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    t = torch.randn(*shape, dtype=torch.float64).relu().movedim(width, 0)[:2].movedim(0, width)
    hint = Hint(s.shape, t.shape, ("a", "b"), "bn_relu").double()
    linear, norm, _ = hint.projection
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, 2.0]))
        norm.bias.copy_(torch.tensor([0.3, -0.2]))

    def plain() -> Tensor:
        rows, targets = (x.movedim(width, -1).flatten(0, -2) for x in (s, t))
        projected = rows @ linear.weight.flatten(1).T + linear.bias
        if shape != (1, 3):  # a single row has no variance, so the running statistics are used
            mean, variance = projected.mean(0), projected.var(0, correction=0)
            projected = (projected - mean) / (variance + 1e-5).sqrt()
        else:
            projected = projected / (1 + 1e-5) ** 0.5
        return ((projected * norm.weight + norm.bias).relu() - targets).square().mean()

    value, expected = hint(s, t), plain()
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0.0)
    wanted = [s, *hint.parameters()]
    for found, gradient in zip(
        torch.autograd.grad(value, wanted), torch.autograd.grad(expected, wanted), strict=True
    ):
        torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-12)


def test_the_published_weight_needs_the_published_projection() -> None:
    """A step on a linear projection of features with a mean diverges at 100; normalised, it does not."""

    def last(projection: str) -> float:
        torch.manual_seed(0)
        s, t = torch.rand(16, 64, 4, 4) + 1, torch.rand(16, 64, 4, 4)
        hint = Hint(s.shape, t.shape, ("a", "b"), projection)
        optimizer = torch.optim.SGD(hint.parameters(), lr=0.05, momentum=0.9)
        for _ in range(30):
            optimizer.zero_grad()
            loss = 100 * hint(s, t)
            loss.backward()
            optimizer.step()
        return loss.item() / 100

    assert last("bn_relu") < 0.5
    assert not last("linear") < 1e6


def test_a_projection_that_cannot_reach_the_teachers_feature_is_said() -> None:
    student, teacher = pair()
    images, target = batch()
    options = {"hint_layer": "features.1", "hint_weight": 1.0, "example": images[:2]}
    for layer, projection, said in (
        ("features.1.0", "bn_relu", True),
        ("features.1.0", "linear", False),
        ("features.1", "bn_relu", False),
    ):
        method = KD(student, teacher, hint_teacher_layer=layer, hint_projection=projection, **options)
        method((images, target))
        notes = method.take_notes()
        assert bool(notes) == said
        if said:
            assert "% of the teacher's values at 'features.1.0' are negative" in notes[0]
            assert "hint_projection: linear" in notes[0]
        method((images, target))
        assert not method.take_notes()


def test_relations() -> None:
    generator = torch.Generator().manual_seed(0)
    s, t = torch.randn(6, 3, generator=generator), torch.randn(6, 5, generator=generator)

    def distances(x: Tensor) -> Tensor:
        all_ = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
        return all_ / all_[all_ > 0].mean()

    def cosines(x: Tensor) -> Tensor:
        out = torch.zeros(6, 6, 6)
        for i in range(6):
            for j in range(6):
                for k in range(6):
                    if i not in (j, k):
                        out[i, j, k] = F.cosine_similarity(x[j] - x[i], x[k] - x[i], dim=0)
        return out

    torch.testing.assert_close(distance_loss(s, t), F.smooth_l1_loss(distances(s), distances(t)))
    torch.testing.assert_close(angle_loss(s, t), F.smooth_l1_loss(cosines(s), cosines(t)))
    for loss in (distance_loss, angle_loss):
        same = s.clone().requires_grad_()
        assert loss(same, 7 * s).item() < 1e-10  # relations are invariant to scale
        twins = s[[0, 0, 1, 1]].clone().requires_grad_()
        loss(twins, t[:4]).backward()
        assert twins.grad.isfinite().all()  # equal points have no direction, which must not give NaN
        single = s[:1].clone().requires_grad_()
        alone = loss(single, t[:1])
        assert alone.item() == 0.0
        alone.backward()
        assert not single.grad.any()
        maps = s[:, :, None, None].expand(6, 3, 2, 2)
        torch.testing.assert_close(loss(maps, t), loss(s, t))


def relation_gradient(loss: Callable[[Tensor, Tensor], Tensor], s: Tensor, t: Tensor) -> Tensor:
    points = s.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(points, t), points)
    return gradient.double()


def by_differences(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """RKD's formulas with each difference taken by itself; equal points have distance and cosine 0."""

    def relation(points: Tensor) -> Tensor:
        differences = points[None] - points[:, None]
        apart = (differences != 0).any(2, keepdim=True)
        differences = differences.where(apart, 1.0)
        lengths = differences.norm(dim=2, keepdim=True)
        if loss is distance_loss:
            distances = lengths.where(apart, 0.0).squeeze(2)
            return distances * len(points) * (len(points) - 1) / distances.sum()
        directions = (differences / lengths).where(apart, 0.0)
        return directions @ directions.transpose(1, 2)

    return lambda s, t: F.smooth_l1_loss(relation(s), relation(t))


@pytest.mark.parametrize("loss", [distance_loss, angle_loss])
@pytest.mark.parametrize("case", ["around 10", "near a point", "two equal", "equal in pairs"])
def test_relations_of_near_and_equal_points(loss: Callable[[Tensor, Tensor], Tensor], case: str) -> None:
    generator = torch.Generator().manual_seed(0)
    plain, t = (torch.randn(32, 16, generator=generator) for _ in range(2))
    points = {
        "around 10": 10 + 0.01 * plain,
        "near a point": plain[0] + 1e-3 * plain,
        "two equal": torch.cat([plain[:1], plain[:31]]),
        "equal in pairs": plain[:16].repeat(2, 1),
    }[case]
    expected = relation_gradient(by_differences(loss), points.double(), t.double())

    def under_autocast(s: Tensor, t: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):  # in which near points would be equal
            return loss(s, t)

    # Rounding may give equal points a small distance instead of 0.
    error = (relation_gradient(under_autocast, points, t) - expected).norm() / expected.norm()
    assert error < (1e-3 if case == "equal in pairs" else 1e-5)
    points[0, 0] = torch.nan
    assert loss(points, t).isnan()


def test_relations_are_of_the_pooled_features_by_default() -> None:
    student, teacher = pair()
    images, target = batch()
    terms = RKD(student, teacher).eval()((images, target))
    s, t = (model.features(images).mean((2, 3)) for model in (student, teacher))
    torch.testing.assert_close(terms["distance"], 25 * distance_loss(s, t))
    torch.testing.assert_close(terms["angle"], 50 * angle_loss(s, t))
    for weight, loss in (("distance_weight", distance_loss), ("angle_weight", angle_loss)):
        # Without any other term that reads the teacher, and with one of the two layers given.
        alone = {weight: 2.0, "relation_teacher_layer": "features.0"}
        terms = CrossEntropy(student, teacher, **alone).eval()((images, target))
        found = terms[weight.removesuffix("_weight")]
        torch.testing.assert_close(found, 2 * loss(s, teacher.features[0](images)))


def test_any_method_with_a_feature_and_a_relation_term() -> None:
    images, target = batch()
    options = {"hint_layer": "features.1", "hint_weight": 2.0, "distance_weight": 3.0, "example": images[:2]}
    for cls in (KD, DKD, DHKD):
        student, teacher = pair()
        torch.manual_seed(3)
        plain = cls(student, teacher).eval()
        torch.manual_seed(3)
        more = cls(student, teacher, **options).eval()
        if cls is DHKD:
            more.head.load_state_dict(plain.head.state_dict())
        alone, together = plain((images, target)), more((images, target))
        assert together.keys() - alone.keys() == {"hint", "distance"}
        assert all(torch.equal(alone[name], together[name]) for name in alone)


class Named(nn.Module):
    """A network with one linear layer before and one behind the features, of any names."""

    def __init__(self, first: str, last: str, width: int) -> None:
        super().__init__()
        self.names = first, last
        self.add_module(first, nn.Linear(192, width))
        self.add_module(last, nn.Linear(width, 7))

    def forward(self, images: Tensor) -> Tensor:
        first, last = map(self.get_submodule, self.names)
        return last(first(images.flatten(1)).relu())


def test_a_layer_that_is_not_the_classifier_is_not_taken_for_it() -> None:
    images, target = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    with pytest.raises(FeatureError, match="cannot be found: its linear layers are fc, classifier; name the"):
        RKD(Named("fc", "classifier", 8), Named("fc", "classifier", 16))
    method = RKD(Named("linear", "last", 8), Named("linear", "last", 16))
    with pytest.raises(FeatureError, match="'linear' was taken for its classifier, but has 8 outputs, and"):
        method((images, target))
    named = RKD(Named("linear", "last", 8), Named("linear", "last", 16), relation_layer="last:input")
    assert named((images, target))["distance"] > 0
    for first in (8, 5):  # more outputs than the logits have classes, and fewer
        with pytest.raises(FeatureError, match=f"has {first} outputs, and the logits 7 classes"):
            DHKD(Named("linear", "last", first), Named("linear", "last", 16))((images, target))
