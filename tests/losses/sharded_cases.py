"""What the ranks of ``ShardedLogits`` compute for test_sharded.py, in one start of the processes."""

from __future__ import annotations

import importlib.util
import itertools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastkd
from fastkd import LinearLogits, ShardedLogits
from fastkd.bench.protocol import make_clock
from fastkd.ops import sharded_rows
from tests.cases import BY_NAME, CASES, KERNELS, Case, make_logits
from tests.losses.linear_cases import NUMBERS, Layers

CLASSES = 33
# First class and size by rank: uneven, in another order than the ranks', and none.
RANGES = {2: [(0, 21), (21, 12)], 3: [(13, 20), (13, 0), (0, 13)]}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Between them they have every reduction over classes, in forward and backward.
SOME = ("ce-dkd", "lskd", "wttm", "jsd", "tvd", "binary-kl")
MASKABLE = [name for name in SOME if not BY_NAME[name].averages_classes]
# Each case with the next of the layer's numbers.
NUMBERS_OF = dict(
    zip([case.name for case in CASES], itertools.cycle(name for name in NUMBERS if name != "padded"))
)


def stored_cases(world: int) -> list[tuple[str, torch.dtype]]:
    """Every loss in float64, those of other kernels in float32, and some in half precision."""
    if world == 3:
        return [(name, torch.float32) for name in SOME]
    return [
        *((case.name, torch.float64) for case in CASES),
        *((name, torch.float32) for name in KERNELS),
        *itertools.product(SOME, (torch.bfloat16, torch.float16)),
    ]


def kinds(world: int) -> list[tuple[str, str]]:
    """Unusual logits, and whose loss they are."""
    found = [("masked", name) for name in MASKABLE]
    return found + list(
        itertools.product(("near", "large", "nan", "rows") if world == 2 else ("rows",), SOME)
    )


def layer_cases(world: int) -> list[tuple[str, torch.dtype]]:
    if world == 3:
        return [(name, torch.float32) for name in SOME]
    halves = itertools.product(SOME, (torch.bfloat16, torch.float16))
    return [*((name, torch.float32) for name in KERNELS), *halves]


Loss = Callable[..., Tensor]


def name_of(*parts: Any) -> str:
    return "-".join(str(part).removeprefix("torch.") for part in parts)


def seeded(name: str) -> None:
    torch.manual_seed(zlib.crc32(name.encode()))


def weights_and_ignored(case: Case, target: Tensor, rows: int) -> dict[str, Any]:
    """One row ignored by its weight, one by its label if the case can."""
    weight = torch.rand(rows) + 0.5
    weight[3] = 0
    if case.ignores_rows:
        target[1] = -100
    return {"weight": weight}


def stored_inputs(case: Case, dtype: torch.dtype, name: str) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """Student, teacher, target and options of all classes; the same on every rank and in the test."""
    seeded(name)
    student, teacher, target = make_logits(11, CLASSES, dtype)
    match name.split("-")[0]:
        case "near":
            teacher = student + 1e-3 * torch.randn_like(student)
        case "masked":  # classes that no row may choose
            student[:, 5:8] = teacher[:, 5:8] = -torch.inf
            target = target % 5
        case "nan":
            student[4, 30] = torch.nan
        case "large":
            student, teacher = student + 1000, teacher - 500
    return student, teacher, target, weights_and_ignored(case, target, 11)


def layers_of(case: Case, dtype: torch.dtype, name: str) -> tuple[Layers, dict[str, Any]]:
    seeded(name)
    layers = Layers.random(classes=CLASSES, dtype=dtype)
    layers.numbers = NUMBERS[NUMBERS_OF[case.name]]
    return layers, weights_and_ignored(case, layers.target, 11)


class Rank:
    """This rank's part of everything."""

    def __init__(self) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.first, self.size = RANGES[self.world][self.rank]
        self.own = slice(self.first, self.first + self.size)
        self.place = {"first_class": self.first, "num_classes": CLASSES}

    def sharded(self, local: Any, **place: Any) -> ShardedLogits:
        return ShardedLogits(local, **{**self.place, **place})

    def stored(
        self, loss: Loss, student: Tensor, teacher: Tensor, *rest: Any, **options: Any
    ) -> list[Tensor]:
        """The loss and the gradient of a tensor, by a grad_output that differs by row if the loss does."""
        leaf = student[..., self.own].detach().clone().requires_grad_()
        value = loss(self.sharded(leaf), self.sharded(teacher[..., self.own]), *rest, **options)
        with no_collectives():
            value.backward(grad_output_of(value))
        return [value.detach(), leaf.grad]

    def layers(self, loss: Loss, layers: Layers, **options: Any) -> list[Tensor]:
        """The loss and the gradients of hidden, weight and bias."""
        hidden, *head = layers.student
        teacher_hidden, *teacher_head = layers.teacher
        leaves = [hidden.clone(), *(part[self.own].clone() for part in head)]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        student = LinearLogits(*leaves, **layers.numbers, chunk_rows=4)
        teacher = LinearLogits(teacher_hidden, *(part[self.own] for part in teacher_head), **layers.numbers)
        value = loss(self.sharded(student), self.sharded(teacher), layers.target, **options)
        with no_collectives():
            value.backward(torch.full_like(value, 2.3))
        return [value.detach(), *(leaf.grad for leaf in leaves)]


def grad_output_of(value: Tensor) -> Tensor:
    return torch.linspace(0.5, 2.5, value.numel(), dtype=value.dtype).view(value.shape)


def no_collectives() -> Any:
    """Fails if the block exchanges anything."""
    names = ("all_gather", "all_reduce", "all_gather_object")
    return mock.patch.multiple(dist, **{name: mock.Mock(side_effect=AssertionError(name)) for name in names})


def refusal(call: Callable[[], Any]) -> str:
    try:
        return f"no error: {call()}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


# ---- what each rank runs -------------------------------------------------------------------------------


def results() -> dict[str, Any]:
    rank = Rank()
    found: dict[str, Any] = {}
    for case_name, dtype in stored_cases(rank.world):
        case, name = BY_NAME[case_name], name_of("stored", case_name, dtype)
        *logits, options = stored_inputs(case, dtype, name)
        found[name] = rank.stored(case.loss, *logits, **options)
    for kind, case_name in kinds(rank.world):
        case, name = BY_NAME[case_name], name_of(kind, case_name)
        *logits, options = stored_inputs(case, torch.float32, name)
        if kind == "rows":
            options["reduction"] = "none"
        with mock.patch.dict(sharded_rows._BLOCK, cpu=3 * CLASSES if kind == "rows" else 2**20):
            found[name] = rank.stored(case.loss, *logits, **options)
    for case_name, dtype in layer_cases(rank.world):
        case, name = BY_NAME[case_name], name_of("layers", case_name, dtype)
        layers, options = layers_of(case, dtype, name)
        found[name] = rank.layers(case.loss, layers, **options)
    return found | others(rank)


def others(rank: Rank) -> dict[str, Any]:
    found: dict[str, Any] = {}
    case = BY_NAME["ce-dkd"]
    *logits, options = stored_inputs(case, torch.float32, "others")
    student, teacher, target = logits
    own, other = rank.sharded(student[:, rank.own]), rank.sharded(teacher[:, rank.own])
    found["again"] = [rank.stored(case.loss, *logits, **options) for _ in range(2)]
    weights = {"ce_weight": 0.5, "kd_weight": 0.3, "tckd_weight": 0.2}
    found["terms"] = fastkd.distill_loss(own, other, target, **weights, **options)[1]
    found["pairs"] = fastkd.kd_loss([own, other], [other, other])
    found["leading"] = fastkd.kd_loss(
        *(rank.sharded(one.view(1, 11, -1)[:, 1:, rank.own]) for one in (student, teacher)), reduction="none"
    )
    found["no rows"] = fastkd.kd_loss(
        rank.sharded(student[:0, rank.own]), rank.sharded(teacher[:0, rank.own])
    )
    found["one row"] = fastkd.kd_loss(rank.sharded(student[0, rank.own]), rank.sharded(teacher[0, rank.own]))
    found["centered"] = rank.stored(
        lambda one, other: fastkd.binary_kl_loss(one, other, center_teacher=True), student, teacher + 3
    )
    found["module"] = fastkd.KDLoss(temperature=2.0)(own, other)
    found["group"] = fastkd.kd_loss(*(replace(form, group=dist.group.WORLD) for form in (own, other)))
    half = dist.new_group([0])  # a group that this rank may not be in
    alone = ShardedLogits(student, half, first_class=0, num_classes=CLASSES)
    if rank.rank == 0:
        found["alone"] = fastkd.kd_loss(alone, replace(alone, local=teacher))
    else:
        found["not a member"] = refusal(lambda: fastkd.kd_loss(alone, replace(alone, local=teacher)))
    if rank.world == 3:
        # A rank that keeps its classes would not take part in another comparison.
        group = dist.new_group()
        cuts = [(0, 13, 21, CLASSES), (0, 13, 22, CLASSES)]
        for name, cut in zip(("a split", "another split"), cuts, strict=True):
            first, end = cut[rank.rank : rank.rank + 2]
            parts = [
                ShardedLogits(logits[:, first:end], group, first_class=first, num_classes=CLASSES)
                for logits in (student, teacher)
            ]
            if rank.rank or name == "a split":
                found[name] = refusal(lambda parts=parts: fastkd.kd_loss(*parts))
    found["later rows are not exchanged"] = exchanges(lambda: fastkd.kd_loss(own, other))
    layers, more = layers_of(case, torch.float32, "others")
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            found[name_of("autocast", dtype)] = rank.layers(case.loss, layers, **more)
    leaf = student[:, rank.own].clone().requires_grad_()
    for reentrant in (False, True):
        value = checkpoint(
            lambda local: case.loss(rank.sharded(local), other, target, **options),
            leaf, use_reentrant=reentrant,
        )  # fmt: skip
        value.backward()
        found[f"checkpoint-{reentrant}"] = [value.detach(), leaf.grad.clone()]
        leaf.grad = None
    found["compiled"] = rank.stored(
        torch.compile(lambda one, other: 2 * fastkd.kd_loss(one, other), backend="aot_eager"),
        student,
        teacher,
    )
    torch._dynamo.reset()
    found["example"] = step_of_the_example(rank)
    found["memory"] = memory(rank)
    return found | {
        f"refused: {name}": refusal(call) for name, call in refused(rank, student, teacher, target)
    }


def example() -> Any:
    """examples/class_parallel.py, with few identities, and not as many as there are classes here."""
    path = Path(__file__).parents[2] / "examples" / "class_parallel.py"
    spec = importlib.util.spec_from_file_location("class_parallel", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.IDENTITIES = CLASSES + 1
    return module


def step_of_the_example(rank: Rank) -> dict[str, Any]:
    """Data-parallel backbones, and a head whose classes are spread."""
    module = example()
    torch.manual_seed(rank.rank)
    student, teacher = module.Network(6), module.Network(8)
    images, labels = torch.randn(4, module.PIXELS), torch.randint(CLASSES, (4,))
    with torch.no_grad():
        known = teacher(images)
    target = module.Gather.apply(labels)
    value, _ = fastkd.distill_loss(student(images), known, target, ce_weight=0.3, kd_weight=0.7)
    value.backward()
    return {
        "loss": value.detach(),
        "gradients": [parameter.grad for parameter in student.parameters()],
        "parameters": [[p.detach() for p in network.parameters()] for network in (student, teacher)],
        "batch": (images, labels),
    }


def memory(rank: Rank) -> dict[str, int]:
    """Peak bytes above inputs, of 512 rows x 4096 classes per rank."""
    torch.manual_seed(0)
    place = {"first_class": 4096 * rank.rank, "num_classes": 4096 * rank.world}
    leaves = [torch.randn(512, 16).requires_grad_(), torch.randn(4096, 16).requires_grad_()]
    stored = [torch.randn(512, 4096).requires_grad_()]
    clock = make_clock("cpu")

    def peak(student: list[Tensor], form: Callable[..., Any]) -> int:
        def step() -> None:
            for leaf in student:
                leaf.grad = None
            local = form(*student)
            fastkd.kd_loss(ShardedLogits(local, **place), ShardedLogits(local.detach(), **place)).backward()

        step()
        return int(clock.extra_memory(step))

    found = {}
    with mock.patch.dict(sharded_rows._BLOCK, cpu=32 * 4096):
        found["layers"] = peak(leaves, lambda *layer: LinearLogits(*layer, chunk_rows=64))
        found["stored"] = peak(stored, lambda logits: logits)
    return found


def exchanges(call: Callable[[], Any]) -> int:
    with mock.patch.object(dist, "all_gather_object", wraps=dist.all_gather_object) as exchange:
        call()
    return int(exchange.call_count)


def refused(
    rank: Rank, student: Tensor, teacher: Tensor, target: Tensor
) -> Sequence[tuple[str, Callable[[], Any]]]:
    """Errors on every rank, some the fault of one; in a group that has not agreed on anything yet."""
    last = rank.rank == rank.world - 1
    new = dist.new_group()
    rank.place["group"] = new

    def kd(local: Any = student[:, rank.own], other: Any = teacher[:, rank.own], **place: Any) -> Tensor:
        return fastkd.kd_loss(rank.sharded(local, **place), rank.sharded(other, **place))

    def of_layer(rows: Tensor) -> Tensor:
        head = torch.ones(rank.size, 4)
        return kd(LinearLogits(rows, head), LinearLogits(rows, head))

    own, other = rank.sharded(student[:, rank.own]), rank.sharded(teacher[:, rank.own])
    torch.manual_seed(rank.rank)
    hidden = torch.randn(11, 4)
    return [
        ("a gap", lambda: kd(first_class=rank.first + (last and 1), num_classes=CLASSES + 1)),
        ("an overlap", lambda: kd(first_class=max(rank.first - 1, 0))),
        ("too few classes", lambda: kd(num_classes=CLASSES + 5)),
        ("other num_classes", lambda: kd(num_classes=CLASSES + last)),
        ("other rows", lambda: kd(student[: 11 - last, rank.own], teacher[: 11 - last, rank.own])),
        ("other dtypes", lambda: kd(student[:, rank.own].to((torch.float32, torch.bfloat16)[last]))),
        ("a gradient on one rank", lambda: kd(student[:, rank.own].clone().requires_grad_(last))),
        ("other hidden", lambda: of_layer(hidden)),
        ("other labels", lambda: fastkd.dkd_loss(own, other, (target + last) % CLASSES)),
        (
            "other rows ignored",
            lambda: fastkd.kd_loss(own, other, weight=(torch.arange(11) != rank.rank).float()),
        ),
        ("a fault of one rank", lambda: fastkd.kd_loss(
            own, replace(other, local=other.local.long()) if last else other
        )),
        ("a label out of range", lambda: fastkd.dkd_loss(own, other, torch.full((11,), CLASSES))),
        ("a stored teacher", lambda: fastkd.kd_loss(own, teacher)),
        ("a stored student", lambda: fastkd.kd_loss(student, other)),
        ("a teacher of K classes", lambda: fastkd.kd_loss(own, fastkd.top_k(teacher, 3, temperature=4.0))),
        ("a teacher of other classes", lambda: fastkd.kd_loss(own, replace(other, first_class=40))),
        ("local: a list", lambda: kd([1.0])),
        ("first_class: a float", lambda: kd(first_class=0.0)),
        ("first_class: negative", lambda: kd(first_class=-1)),
        ("num_classes: 1", lambda: kd(num_classes=1)),
        ("group: a name", lambda: kd(group="world")),
        ("probabilities", lambda: fastkd.distill_loss(own, other, student.softmax(-1), ce_weight=1.0)),
        ("top_k", lambda: fastkd.top_k(own, 3)),
        ("a layer's rows, with a gradient", lambda: fastkd.kd_loss(
            rank.sharded(LinearLogits(torch.ones(3, 4).requires_grad_(), torch.ones(rank.size, 4))),
            rank.sharded(LinearLogits(torch.ones(3, 4), torch.ones(rank.size, 4))),
            reduction="none",
        )),
        ("a fused backend", lambda: on_native(own, other)),
        ("torch.func", lambda: torch.func.grad(lambda local: kd(local))(own.local)),
        ("compiled in one graph", lambda: torch.compile(kd, fullgraph=True, backend="eager")(own.local)),
        ("second derivatives", lambda: second(kd, own.local)),
    ]  # fmt: skip


def on_native(*pair: ShardedLogits) -> Tensor:
    with fastkd.use_backend("native"):
        return fastkd.kd_loss(*pair)


def second(loss: Loss, local: Tensor) -> Any:
    leaf = local.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf, create_graph=True)
