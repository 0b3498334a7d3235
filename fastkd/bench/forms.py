"""Memory and time of losses of a linear layer's output, with and without storing the logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd
from fastkd import LinearLogits
from fastkd.bench import cases, peers
from fastkd.bench.measure import COMPARED_ELEMENTS, failed, timing
from fastkd.bench.protocol import Clock, Launch, interleaved, relative_error
from fastkd.bench.results import Record
from fastkd.losses.cases import call_of
from fastkd.ops.plan import ELEMENT_BYTES
from fastkd.ops.spec import CASES

# Of the student (hidden, weight) and the teacher (hidden, weight), and the labels.
Layers = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
LayerLoss = Callable[[Layers], Tensor]

LOSSES = ("kd", "ce-kd", "ce")
# Rows, classes, hidden widths of student and teacher.
SHAPES = ((2048, 50304, 256, 512), (1024, 131072, 512, 512))
PEERS = ("stored", "eager", "compiled", "torch", "liger", "trl", "orda")


@dataclass(frozen=True)
class Case:
    loss: str
    rows: int
    classes: int
    student_width: int
    teacher_width: int
    dtype: str

    live_tensors: ClassVar[int] = 9  # of eager torch, and of float64's gradient of some rows

    @property
    def elements(self) -> int:
        return self.rows * self.classes

    @property
    def about(self) -> dict[str, Any]:
        return {**asdict(self), "pass": "forward+backward"}

    def __str__(self) -> str:
        widths = f"({self.student_width}, {self.teacher_width})"
        return f"{self.loss} {self.rows} x {widths} x {self.classes} {self.dtype}"


def suite(
    losses: Sequence[str] | None, shapes: Sequence[tuple[int, int]] | None, dtypes: Sequence[str] | None
) -> Iterator[Case]:
    """Yield the cases; a shape that is not one of SHAPES has the first one's widths."""
    widths = {known[:2]: known[2:] for known in SHAPES}
    chosen = SHAPES if shapes is None else [(*shape, *widths.get(shape, SHAPES[0][2:])) for shape in shapes]
    for rows, classes, student, teacher in chosen:
        for dtype in dtypes or ("float32",):
            for loss in losses or LOSSES:
                yield Case(loss, rows, classes, student, teacher, dtype)


def not_measured(device: str) -> dict[str, str]:
    """Return the peers that cannot run here, each with the reason."""
    reasons = {}
    if not hasattr(F, "linear_cross_entropy"):
        reasons["torch"] = f"torch {torch.__version__} has no linear_cross_entropy"
    for name, package in (("liger", "liger_kernel"), ("trl", "trl")):
        if (reason := peers.missing_package(package)) is not None:
            reasons[name] = reason
    if device != "cuda":
        reasons["orda"] = "runs on GPUs only (on a CPU it stores the logits), this run is on the CPU"
    elif (reason := peers.missing_package("orda_kernel")) is not None:
        reasons["orda"] = reason
    return reasons


def make_layers(case: Case, device: str, rows: int | None = None) -> Layers:
    """Return random layers whose logits have a spread of 3; the student's tensors require grad."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = cases.DTYPES[case.dtype]

    def layer(width: int) -> tuple[Tensor, Tensor]:
        hidden = torch.randn(rows or case.rows, width, device=device, generator=generator)
        weight = torch.randn(case.classes, width, device=device, generator=generator) * (3 / width**0.5)
        return hidden.to(dtype), weight.to(dtype)

    student, teacher = layer(case.student_width), layer(case.teacher_width)
    target = torch.randint(0, case.classes, (rows or case.rows,), device=device, generator=generator)
    return student[0].requires_grad_(), student[1].requires_grad_(), *teacher, target


# ---- the variants --------------------------------------------------------------------------------------


def chunked(name: str) -> LayerLoss:
    loss = call_of(CASES[name][1])
    return lambda layers: loss(LinearLogits(*layers[:2]), LinearLogits(*layers[2:4]), layers[4])


def of_stored_logits(name: str, loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> LayerLoss:
    def run(layers: Layers) -> Tensor:
        student = F.linear(*layers[:2])
        # The cross-entropy does not read the teacher, whose logits nobody would compute for it.
        teacher = student.detach() if name == "ce" else F.linear(*layers[2:4])
        return loss(student, teacher, layers[4])

    return run


def eager(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    if name == "ce":
        return lambda s, t, y: F.cross_entropy(s, y)
    return peers.EAGER[name]


def torch_chunked(name: str) -> LayerLoss | None:
    """Return torch's chunked cross-entropy, with its own choice of chunks."""
    if name != "ce":
        return None
    options = torch.nn.LinearCrossEntropyOptions()
    loss = F.linear_cross_entropy
    return lambda layers: loss(layers[0], layers[1], layers[4], options=options)


def liger(name: str) -> LayerLoss | None:
    """Return Liger-Kernel's chunked JSD, which is a KL at beta 0 and has no T^2."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    t = peers.T_KD
    options = {
        "kd": {"weight_hard_loss": 0.0, "weight_soft_loss": t**2, "beta": 0.0, "temperature": t},
        "ce-kd": {"weight_hard_loss": 0.1, "weight_soft_loss": 0.9 * t**2, "beta": 0.0, "temperature": t},
        "jsd": {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0, "beta": 0.5},
    }
    if name not in options:
        return None
    loss = LigerFusedLinearJSDLoss(**options[name])
    return lambda layers: loss(*layers)


def trl(name: str) -> LayerLoss | None:
    """Return TRL's chunked divergence, which has no T^2."""
    if name not in ("kd", "jsd"):
        return None
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    beta, temperature = (0.0, peers.T_KD) if name == "kd" else (0.5, 1.0)

    def run(layers: Layers) -> Tensor:
        student, student_weight, teacher, teacher_weight, _ = layers
        divergence, _ = ChunkedDivergenceFunction.apply(
            student, student_weight, None, teacher, teacher_weight, None, beta, temperature
        )
        return divergence.mean() * temperature**2

    return run


def orda(name: str, backend: str = "triton") -> LayerLoss | None:
    """Return orda-kernel's loss with its own choice of chunks; its KL has the factor T^2."""
    options: dict[str, dict[str, Any]] = {
        "kd": {"student_ce_weight": 0.0, "kl_weight": 1.0, "kl_temperature": peers.T_KD},
        "ce-kd": {"student_ce_weight": 0.1, "kl_weight": 0.9, "kl_temperature": peers.T_KD},
        "ce": {},
        "dkd": {
            "student_ce_weight": 0.0,
            "kl_weight": 1.0,
            "kl_temperature": peers.T_KD,
            "kl_divergence": "dkd",
            "kl_alpha": 1.0,
            "kl_beta": 8.0,
        },
    }
    if name not in options:
        return None
    from orda_kernel import SeparateTeacher, distillation_loss

    def run(layers: Layers) -> Tensor:
        student, student_weight, teacher, teacher_weight, target = layers
        return distillation_loss(
            student,
            student_weight,
            target,
            SeparateTeacher(teacher, teacher_weight),
            backend=backend,
            **options[name],
        ).loss

    return run


def variants(name: str, chosen: set[str]) -> dict[str, LayerLoss | str]:
    """Return fastkd and those of ``chosen`` that have the loss.

    A peer whose import fails is represented by the error's text.
    """
    found: dict[str, LayerLoss | str] = {"fastkd": chunked(name)}
    makers: dict[str, Callable[[], LayerLoss | None]] = {
        "stored": lambda: of_stored_logits(name, call_of(CASES[name][1])),
        "eager": lambda: of_stored_logits(name, eager(name)),
        "compiled": lambda: torch.compile(of_stored_logits(name, eager(name)), dynamic=False),
        "torch": lambda: torch_chunked(name),
        "liger": lambda: liger(name),
        "trl": lambda: trl(name),
        "orda": lambda: orda(name),
    }
    for peer, make in makers.items():
        if peer in chosen and (loss := peers.made(make)) is not None:
            found[peer] = loss
    return found


# ---- measuring -----------------------------------------------------------------------------------------


def gradients(loss: LayerLoss, layers: Layers) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(layers), layers[:2])


def truth_of(case: Case, few: Layers) -> tuple[Tensor, ...]:
    """The gradients of a few rows in float64."""
    with fastkd.use_backend("eager"):
        student = [tensor.detach().double().requires_grad_() for tensor in few[:2]]
        layers = (*student, *(tensor.double() for tensor in few[2:4]), few[4])
        return gradients(of_stored_logits(case.loss, call_of(CASES[case.loss][1])), layers)  # type: ignore[arg-type]


def measure(case: Case, clock: Clock, chosen: set[str], *, seconds: float) -> list[Record]:
    """Return one record per variant; that of a variant that failed says why."""
    layers = make_layers(case, clock.device)
    few = make_layers(case, clock.device, max(1, min(case.rows, COMPARED_ELEMENTS // case.classes)))
    truth = truth_of(case, few)
    # The parameter's gradient is needed with any variant.
    needed = layers[1].numel() * ELEMENT_BYTES[cases.DTYPES[case.dtype]]
    launches: dict[str, Launch] = {}
    records: dict[str, Record] = {}
    for name, loss in variants(case.loss, chosen).items():
        try:
            if isinstance(loss, str):
                raise ImportError(loss)
            found = gradients(loss, few)
            error = max(relative_error(one, true) for one, true in zip(found, truth, strict=True))
            del found
            launch = Launch(lambda inputs, loss=loss: gradients(loss, inputs), [layers])  # type: ignore[misc]
            launch(0)  # compilation happens here
            peak = clock.extra_memory(lambda: launch(0))  # noqa: B023 - called at once
            records[name] = {
                "kind": "form",
                **case.about,
                "variant": name,
                "gradient_error": error,
                "extra_bytes": None if peak is None else peak - needed,
            }
            launches[name] = launch
        except Exception as error:  # a peer that fails here must not end the run; it is recorded
            records[name] = failed(case, name, error)
    times, _ = interleaved(clock, launches, seconds=seconds, least=3)
    for name, values in times.items():
        records[name].update(timing(values))
    return list(records.values())


def describe(records: Sequence[Record]) -> str:
    """Return a case as lines: per variant the peak above inputs and the weight's gradient, time, error."""
    names = ("loss", "rows", "classes", "student_width", "teacher_width", "dtype")
    lines = [str(Case(**{name: records[0][name] for name in names}))]
    for record in records:
        if record["kind"] != "form":
            who = record.get("variant", "skipped")
            lines.append(f"  {who:8s} {record['kind']}: {record['reason']}")
            continue
        memory = "?" if record["extra_bytes"] is None else f"{record['extra_bytes'] / 1e6:.0f}"
        lines.append(
            f"  {record['variant']:8s} {memory:>6s} MB {record['ms']:9.1f} ms, gradient error "
            f"{record['gradient_error']:.0e}"
        )
    return "\n".join(lines)


def table_of(records: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return columns and lines of the report's table."""
    columns = [
        "loss",
        "rows x widths x classes",
        "dtype",
        "variant",
        "MB above gradients",
        "ms",
        "gradient error",
    ]
    lines = []
    for record in records:
        shape = (
            f"{record['rows']} x ({record['student_width']}, {record['teacher_width']}) x {record['classes']}"
        )
        memory = "-" if record["extra_bytes"] is None else f"{record['extra_bytes'] / 1e6:.0f}"
        time = f"{record['ms']:.0f} ({record['p20']:.0f} to {record['p80']:.0f})"
        error = f"{record['gradient_error']:.0e}"
        lines.append([record["loss"], shape, record["dtype"], record["variant"], memory, time, error])
    return columns, lines
