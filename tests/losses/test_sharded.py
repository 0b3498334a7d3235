"""``ShardedLogits`` on two and three ranks: values and gradients of every loss, against float64."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree

import fastkd
from fastkd import LinearLogits, ShardedLogits
from fastkd.ops.shards import Shard
from tests.cases import BY_NAME, Case, error, loss_and_gradient
from tests.losses import sharded_cases
from tests.losses.linear_cases import errors
from tests.losses.sharded_cases import RANGES, grad_output_of, layers_of, name_of, stored_inputs
from tests.train.ranks import on_ranks

# The formulas are eager's and the sums in another order: over seeds the median error is 1.0 to 1.3 times
# eager's, and one with 33 classes up to 3 times, where eager's rounding cancels. Relative to norms.
FACTOR = 2.0
FLOOR = {torch.float64: 1e-14, torch.float32: 4e-6, torch.bfloat16: 1e-3, torch.float16: 1e-4}
# By the name of what is refused.
DIFFER = "ValueError: the ranks of a loss of ShardedLogits differ in "
FOR_BOTH = "TypeError: {} is a {} and .* a ShardedLogits; expected ShardedLogits for both"
REFUSED = {
    "a gap": r"ValueError: the ranks' classes .* do not tile 0 to 34: rank 0 has",
    "an overlap": r"ValueError: .* do not tile 0 to 33: rank 0 has .*, rank 1 has",
    "too few classes": r"ValueError: .* do not tile 0 to 38",
    "other num_classes": DIFFER + r"num_classes: rank 0 has 33, rank \d has 34",
    "other rows": DIFFER + r"rows: rank 0 has 11, rank \d has 10",
    "other dtypes": DIFFER + "dtypes",
    "a gradient on one rank": DIFFER + "tensors that require grad",
    "other labels": DIFFER + "labels",
    "other rows ignored": DIFFER + "rows of weight 0",
    "other hidden": r"ValueError: student_logits\.local\.hidden has other rows on rank 1 than on rank 0",
    "a fault of one rank": r"ValueError: rank \d of the group has refused its arguments: TypeError: teach",
    "a label out of range": r"ValueError: target has the label 33; expected 0 to 32",
    "a stored teacher": FOR_BOTH.format("teacher_logits", "Tensor"),
    "a stored student": FOR_BOTH.format("student_logits", "Tensor"),
    "a teacher of K classes": FOR_BOTH.format("teacher_logits", "TopKLogits"),
    "a teacher of other classes": r"ValueError: student_logits has classes .* and teacher_logits classes",
    "local: a list": r"TypeError: student_logits\.local is a list",
    "first_class: a float": r"TypeError: student_logits\.first_class is 0\.0",
    "first_class: negative": r"ValueError: student_logits\.first_class is -1",
    "num_classes: 1": r"ValueError: student_logits\.num_classes is 1",
    "group: a name": r"TypeError: student_logits\.group is 'world'; expected a ProcessGroup",
    "probabilities": r"TypeError: target holds probabilities .* ShardedLogits, student_logits",
    "top_k": r"TypeError: teacher_logits is a ShardedLogits; expected all logits",
    "a layer's rows, with a gradient": "ValueError: reduction='none' has no gradient",
    "a fused backend": "BackendUnavailable: backend 'native' has no kernel for ShardedLogits",
    "torch.func": r"BackendUnavailable: .*torch\.func\.grad",
    "compiled in one graph": "(?s)Unsupported: .*exchanges numbers with other ranks",
    "second derivatives": "RuntimeError: .*create_graph=True",
}


class Ranks:
    """What the ranks found."""

    def __init__(self, found: list[dict[str, Any]]) -> None:
        self.found = found

    def same(self, name: str) -> Any:
        """What all ranks have, to the bit."""
        first = self.found[0][name]
        for other in self.found[1:]:
            assert bits(other[name]) == bits(first)
        return first

    def whole(self, name: str) -> list[Tensor]:
        """The loss, which all ranks have, and the gradient of all classes, whose parts they have."""
        losses = [found[name][0] for found in self.found]
        assert all(bits(loss) == bits(losses[0]) for loss in losses)
        return [losses[0], in_order([found[name][1] for found in self.found], -1)]


def bits(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, value.shape, value.contiguous().view(-1).view(torch.uint8).tolist()
    if isinstance(value, dict):
        return {key: bits(one) for key, one in value.items()}
    return [bits(one) for one in value] if isinstance(value, list | tuple) else value


def in_order(parts: list[Tensor], dim: int) -> Tensor:
    ranges = RANGES[len(parts)]
    return torch.cat(
        [part for _, part in sorted(zip(ranges, parts, strict=True), key=lambda one: one[0])], dim
    )


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return Ranks(on_ranks(2, sharded_cases.results, tmp_path_factory.mktemp("ranks")))


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    return Ranks(on_ranks(3, sharded_cases.results, tmp_path_factory.mktemp("ranks")))


@pytest.fixture
def ranks(request):
    """So many, started once: a fixture with parameters would start them for every test."""
    return request.getfixturevalue({2: "two", 3: "three"}[request.param])


def of_ranks(cases: Callable[[int], list[Any]]) -> pytest.MarkDecorator:
    """Each of ``cases(world)``, on so many ranks."""
    found = [pytest.param(w, *one, id=name_of(w, *one)) for w in RANGES for one in cases(w)]
    return pytest.mark.parametrize(("ranks", "one", "other"), found, indirect=["ranks"])


def dense(case: Case, dtype: torch.dtype, name: str, compute: torch.dtype, **more: Any) -> list[Tensor]:
    """Loss and gradient of all logits in memory, on the eager backend."""
    student, teacher, target, options = stored_inputs(case, dtype, name)
    logits = student.to(compute), teacher.to(compute)
    with fastkd.use_backend("eager"):
        grad_output = grad_output_of(case.loss(*logits, target, **options, **more))
        return list(loss_and_gradient(case, *logits, target, grad_output, **options, **more))


def assert_no_worse_than_eager(
    found: list[Tensor], case: Case, dtype: torch.dtype, name: str, floors: Sequence[float], **more: Any
) -> None:
    truth = dense(case, dtype, name, torch.float64, **more)
    ours, eager = (errors(one, truth) for one in (found, dense(case, dtype, name, dtype, **more)))
    for one, other, floor in zip(ours, eager, floors, strict=True):
        assert one <= FACTOR * other + floor, (ours, eager)


@of_ranks(sharded_cases.stored_cases)
def test_every_loss(ranks, one, other):
    """A row ignored by its weight, one by its label, a grad_output other than 1, and uneven shards."""
    case, dtype, name = BY_NAME[one], other, name_of("stored", one, other)
    found = ranks.whole(name)
    assert found[1].dtype == dtype
    assert_no_worse_than_eager(found, case, dtype, name, [FLOOR[dtype]] * 2)


@of_ranks(sharded_cases.kinds)
def test_unusual_logits(ranks, one, other):
    """Masked classes, near the teacher's, a large offset, a NaN; a loss per row, in blocks of three rows."""
    kind, case, name = one, BY_NAME[other], name_of(one, other)
    found = ranks.whole(name)
    floor = FLOOR[torch.float32]
    if kind == "nan":
        truth = dense(case, torch.float32, name, torch.float64)
        assert found[0].isnan()
        wrong = found[1].isnan().any(-1)
        assert wrong.nonzero().tolist() == [[4]]
        assert torch.equal(wrong, truth[1].isnan().any(-1))
        assert error(found[1][~wrong], truth[1][~wrong], 1e-3) < 1e-5
        return
    # The loss of near logits is of second order: rounding of two log-probabilities, times T^2 = 16.
    of_loss = 1e3 * 16 * 2.0**-23 if kind == "near" else floor
    assert_no_worse_than_eager(
        found, case, torch.float32, name, [of_loss, floor], **{"reduction": "none"} if kind == "rows" else {}
    )


@of_ranks(sharded_cases.layer_cases)
def test_every_loss_of_a_layer(ranks, one, other):
    """hidden's gradient is whole on every rank; weight's and bias's are of the rank's classes."""
    case, dtype, name = BY_NAME[one], other, name_of("layers", one, other)
    found = [rank[name] for rank in ranks.found]
    assert all(bits(values[:2]) == bits(found[0][:2]) for values in found)
    whole = [*found[0][:2], *(in_order([values[index] for values in found], 0) for index in (2, 3))]
    layers, options = layers_of(case, dtype, name)
    truth = layers.exact(case, grad_output=2.3, **options)
    with fastkd.use_backend("native"):  # LinearLogits of all classes
        stored = errors(layers.loss_and_gradients(case, grad_output=2.3, **options), truth)
    ours = errors(whole, truth)
    assert all(a <= FACTOR * b + FLOOR[dtype] for a, b in zip(ours, stored, strict=True)), (ours, stored)


@pytest.mark.parametrize("ranks", RANGES, indirect=True)
class TestOtherCalls:
    def test_the_same_bits_every_time(self, ranks):
        for found in ranks.found:
            first, again = found["again"]
            assert bits(first) == bits(again)

    @pytest.mark.parametrize("name", ["terms", "pairs", "leading", "no rows", "one row", "module", "group"])
    def test_as_of_all_classes(self, ranks, name):
        found = ranks.same(name)
        case = BY_NAME["ce-dkd"]
        student, teacher, target, options = stored_inputs(case, torch.float32, "others")
        weights = {"ce_weight": 0.5, "kd_weight": 0.3, "tckd_weight": 0.2}
        expected = {
            "terms": lambda: fastkd.distill_loss(student, teacher, target, **weights, **options)[1],
            "pairs": lambda: fastkd.kd_loss([student, teacher], [teacher, teacher]),
            "leading": lambda: fastkd.kd_loss(student[None, 1:], teacher[None, 1:], reduction="none"),
            "no rows": lambda: fastkd.kd_loss(student[:0], teacher[:0]),
            "one row": lambda: fastkd.kd_loss(student[0], teacher[0]),
            "module": lambda: fastkd.kd_loss(student, teacher, temperature=2.0),
            "group": lambda: fastkd.kd_loss(student, teacher),
        }[name]()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    def test_a_group_of_one(self, ranks):
        student, teacher, *_ = stored_inputs(BY_NAME["ce-dkd"], torch.float32, "others")
        first, *others = ranks.found
        torch.testing.assert_close(first["alone"], fastkd.kd_loss(student, teacher))
        assert all(
            "a ProcessGroup that this rank is a member of" in found["not a member"] for found in others
        )

    def test_a_centered_teacher(self, ranks):
        value, gradient = ranks.whole("centered")
        student, teacher, *_ = stored_inputs(BY_NAME["ce-dkd"], torch.float32, "others")
        student.requires_grad_()
        expected = fastkd.binary_kl_loss(student, teacher + 3, center_teacher=True)
        torch.testing.assert_close(value, expected.detach())
        (slope,) = torch.autograd.grad(expected, student, grad_output_of(expected))
        torch.testing.assert_close(gradient, slope, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
    def test_autocast(self, ranks, dtype):
        case, found = BY_NAME["ce-dkd"], [rank[name_of("autocast", dtype)] for rank in ranks.found]
        layers, options = layers_of(case, torch.float32, "others")
        with torch.autocast("cpu", dtype=dtype):
            expected = layers.loss_and_gradients(case, grad_output=2.3, **options)
        truth = layers.exact(case, grad_output=2.3, **options)
        ours, stored = (errors(one, truth[:2]) for one in (found[0][:2], expected[:2]))
        assert all(a <= FACTOR * b + FLOOR[dtype] for a, b in zip(ours, stored, strict=True)), (ours, stored)
        weight = in_order([one[2] for one in found], 0)
        assert weight.dtype == torch.float32
        assert error(weight, truth[2]) <= FACTOR * error(expected[2], truth[2]) + FLOOR[dtype]

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpointing(self, ranks, reentrant):
        value, gradient = ranks.whole(f"checkpoint-{reentrant}")
        case = BY_NAME["ce-dkd"]
        student, teacher, target, options = stored_inputs(case, torch.float32, "others")
        expected, slope = loss_and_gradient(case, student, teacher, target, **options)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient, slope, rtol=1e-5, atol=1e-6)

    def test_compiled_around_the_loss(self, ranks):
        value, gradient = ranks.whole("compiled")
        case = BY_NAME["kd"]
        student, teacher, *_ = stored_inputs(BY_NAME["ce-dkd"], torch.float32, "others")
        expected, slope = loss_and_gradient(case, student, teacher, None)
        torch.testing.assert_close(value, 2 * expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient, slope, rtol=1e-5, atol=1e-6)  # grad_output is 1/2

    def test_ranks_agree_once(self, ranks):
        assert ranks.same("later rows are not exchanged") == 0

    def test_another_split_of_a_group_is_refused_where_it_changes(self, ranks):
        for rank, classes in ((1, "13 to 21"), (2, "22 to 32")) if len(ranks.found) == 3 else ():
            assert ranks.found[rank]["a split"].startswith("no error")
            pattern = rf"has the classes {classes} of 33 .* use a process group of its own"
            assert re.search(pattern, ranks.found[rank]["another split"])

    def test_the_step_of_the_example(self, ranks):
        """Backbones have the gradient of all images, heads that of their classes: of one process with all."""
        found = [rank["example"] for rank in ranks.found]
        networks = []
        for parts in zip(*(rank["parameters"] for rank in found), strict=True):
            head = torch.cat([head for head, *_ in parts])
            networks.append([head, *parts[0][1:]])
            assert all(bits(part[1:]) == bits(parts[0][1:]) for part in parts)
        images, labels = (torch.cat(one) for one in zip(*(rank["batch"] for rank in found), strict=True))

        def logits(head, weight, bias, last_weight, last_bias):
            features = F.linear(F.linear(images, weight, bias).relu(), last_weight, last_bias)
            return 24.0 * F.normalize(features) @ F.normalize(head).t()

        student = [parameter.requires_grad_() for parameter in networks[0]]
        value, _ = fastkd.distill_loss(
            logits(*student), logits(*networks[1]), labels, ce_weight=0.3, kd_weight=0.7
        )
        value.backward()
        gradients = [rank["gradients"] for rank in found]
        torch.testing.assert_close(torch.cat([head for head, *_ in gradients]), student[0].grad)
        for rank in found:
            torch.testing.assert_close(rank["loss"], value.detach())
            torch.testing.assert_close(rank["gradients"][1:], [leaf.grad for leaf in student[1:]])

    def test_peak_memory(self, ranks):
        """Of a layer three chunks, its gradients and about ten blocks; of logits a gradient and blocks."""
        chunk, blocks, logits = 4 * 64 * 4096, 14 * 4 * 32 * 4096, 4 * 512 * 4096
        head = 2 * 4 * 16 * (512 + 4096)
        for rank in ranks.found:
            assert rank["memory"]["layers"] < 3 * chunk + blocks + head
            assert rank["memory"]["stored"] < logits + blocks + 2**16

    @pytest.mark.parametrize("name", REFUSED)
    def test_refused_on_every_rank(self, ranks, name):
        for rank, found in enumerate(ranks.found):
            pattern = REFUSED[name]
            if name == "a fault of one rank" and rank == len(ranks.found) - 1:
                pattern = r"^TypeError: teacher_logits\.local has dtype torch\.int64"
            assert re.search(pattern, found[f"refused: {name}"]), found[f"refused: {name}"]


def test_without_a_process_group():
    form = ShardedLogits(torch.randn(3, 5), first_class=0, num_classes=5)
    with pytest.raises(ValueError, match=r"init_process_group"):
        fastkd.kd_loss(form, form)


def test_the_form_says_what_its_logits_are():
    layer = LinearLogits(torch.randn(2, 3, 4), torch.randn(5, 4).requires_grad_())
    form = ShardedLogits(layer, first_class=10, num_classes=20)
    assert form.shape == (2, 3, 20)
    assert form.requires_grad
    assert not form.detach().requires_grad
    leaves, structure = _pytree.tree_flatten(form)
    assert leaves == [layer.hidden, layer.weight] or len(leaves) == 2
    again = _pytree.tree_unflatten(leaves, structure)
    assert (again.first_class, again.num_classes, again.local.weight) == (10, 20, layer.weight)


def test_functions_that_are_not_known_are_refused():
    """A new loss must not reduce over a rank's classes alone."""
    rows = Shard(None, 0, (5,)).rows(torch.randn(3, 5))
    for call in (lambda: rows.cumsum(-1), lambda: rows.sort(-1), lambda: rows.sum(0), lambda: rows[:, :2]):
        with pytest.raises(TypeError, match="spread over ranks is not defined"):
            call()
