"""``fastkd check``: compare every loss on every backend of this machine with float64. Needs only torch.

Value and gradient of each loss, under a random grad_output, are computed from logits of several shapes and
dtypes, from far apart to nearly and exactly equal, and compared with ``fastkd.reference`` in float64 on the
same logits. ``BOUNDS`` says what passes. Then come conditions of training: a loss scale in float16, a
constant between the logits of the two models, and row weights that are not contiguous.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import fastkd
from fastkd.command import add_json, print_json, run_command
from fastkd.losses.cases import call_of
from fastkd.ops import backend
from fastkd.ops.spec import CASES

Loss = Callable[..., Tensor]  # (student, teacher, target, reduction=) -> loss


def _losses() -> Iterator[tuple[str, Loss, bool]]:
    """Every case of ``ops.spec``: name, loss, and whether its gradient at equal logits is 0."""
    named = set()
    for _, case in CASES.values():
        name = f"{case.function}, {case.name}" if case.function in named else case.function
        named.add(case.function)
        yield name, call_of(case), case.vanishes
    for name in ("kd", "ce-dckd", "jsd"):
        loss, case = CASES[name]
        temperature = loss.temperatures(case.options)[1]
        yield f"{case.function} of top_k", _of_top_k(call_of(case), temperature), False


def _of_top_k(loss: Loss, temperature: float) -> Loss:
    """With a teacher known at a quarter of its classes, which have most of its probability."""

    def of_some(student: Tensor, teacher: Tensor, target: Tensor, **options: Any) -> Tensor:
        form = fastkd.top_k(teacher, teacher.shape[-1] // 4, target, temperature=temperature)
        return loss(student, form, target, **options)

    return of_some


LOSSES: dict[str, Loss] = {name: loss for name, loss, _ in _losses()}
# Losses whose gradient at equal logits is 0; exactly 0 from a kernel.
VANISHING = {name for name, _, vanishes in _losses() if vanishes}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rows of one tile, rows of odd length, and rows of several tiles.
SHAPES = ((4, 10), (16, 1000), (5, 2263), (2, 21841))
INTERPRETED_SHAPES = ((4, 10), (5, 2263))
REGIMES = ("random", "near-equal", "equal")
# A loss scale of 65536, for the elements of a gradient that is a mean over 64 rows of 32,768 classes.
SCALED_SHAPE, SCALE, SCALED_ROWS = (4, 32768), 65536.0, 64
# float16 rounds numbers below half of its smallest, 2^-24, to 0. Larger ones can be lost only by
# cancellation: scaled, the terms of q - p are near 1/64 here, of which float32 loses differences below 1e-9,
# far below 2^-24. So none should be lost; the share allows for elements near the limit.
SMALLEST_HALF, FLUSHED_SHARE = 2.0**-24, 1e-4
# A constant between the models, to which the softmax is invariant.
OFFSET, OFFSET_SHAPE, OFFSET_NOISE = 1000.0, (8, 8000), 0.3
# Other orders of summation in float32 change the errors of a few rows by this factor (torch's own differ
# between x86 and Arm); and the rounding of the largest terms, which no order avoids, relative to the loss of
# random logits (or to the gradient itself).
ORDER, ROUNDING = 4.0, 4e-7


@dataclass(frozen=True)
class Bounds:
    """Largest errors that pass, as the norm of the difference relative to a norm.

    ``loss``: of the row losses, relative to those of random logits, because near-equal logits have a loss of
    1e-5 that is a difference of numbers near 1. ``gradient``: relative to the gradient itself.
    ``near_equal``: the same if student and teacher differ by about 0.01; the gradient is then a difference of
    probabilities that agree to two digits or more, which leaves the rest of float32's seven. The bounds of a
    half type are the rounding of the gradient itself (Triton's interpreter truncates to bfloat16); half of
    its smallest number is allowed per element as well. Gradients of plain torch may err ``ORDER`` times as
    much, for its sums depend on the processor.
    """

    loss: float
    gradient: float
    near_equal: float


BOUNDS = {
    torch.float32: Bounds(loss=5e-5, gradient=5e-5, near_equal=1e-3),
    torch.bfloat16: Bounds(loss=5e-5, gradient=2**-6.5, near_equal=2**-6.5),
    torch.float16: Bounds(loss=5e-5, gradient=2e-3, near_equal=2e-3),
}


@dataclass
class Verdict:
    """One loss on one backend: the largest gradient error of each dtype, and what failed."""

    loss: str
    backend: str
    device: str
    errors: dict[torch.dtype, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @property
    def where(self) -> tuple[str, str]:
        return self.backend, self.device

    def plain(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        errors = {_name(dtype): error for dtype, error in self.errors.items()}
        return {
            "loss": self.loss, "backend": self.backend, "device": self.device, "errors": errors,
            "failures": self.failures,
        }  # fmt: skip

    def __str__(self) -> str:
        errors = " ".join(f"{_name(dtype)} {error:.1e}" for dtype, error in self.errors.items())
        head = f"{'FAIL' if self.failures else 'pass'}  {self.loss:31s} {self.backend:7s} {self.device:5s}"
        return f"{head} {errors}" + "".join(f"; {failure}" for failure in self.failures[:2])


def here() -> tuple[list[tuple[str, str]], dict[tuple[str, str], str]]:
    """Return the (backend, device) pairs that run here, and why the others do not."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    runs, absent = [], {}
    for device in devices:
        for name in ("native", "triton", "eager"):
            if (name, device) == ("triton", "cpu") and not os.environ.get("TRITON_INTERPRET"):
                reason: str | None = "it runs on GPUs; TRITON_INTERPRET=1 checks it in Triton's interpreter"
            else:
                reason = backend.missing(name, device)
            if reason is None:
                runs.append((name, device))
            else:
                absent[name, device] = reason
    return runs, absent


def make_logits(shape: tuple[int, int], regime: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    student = 3 * torch.randn(shape)
    other = {
        "random": 3 * torch.randn(shape), "near-equal": student + 0.01 * torch.randn(shape), "equal": student,
    }  # fmt: skip
    return student.to(dtype), other[regime].to(dtype), torch.randint(0, shape[1], shape[:1])


def loss_and_gradient(
    loss: Loss, inputs: Sequence[Tensor], grad_output: Tensor, **options: object
) -> tuple[Tensor, Tensor]:
    student, teacher, target = inputs
    student = student.detach().requires_grad_()
    value = loss(student, teacher, target, reduction="none", **options)
    value.backward(grad_output)
    assert student.grad is not None
    return value.detach().double().cpu(), student.grad.double().cpu()


def relative(value: Tensor, truth: Tensor, scale: Tensor, allowance: float = 0.0) -> float:
    """Return the norm of the error beyond ``allowance`` per element, relative to ``scale``'s norm.

    Infinite if the value is not finite, so that it never passes.
    """
    if not value.isfinite().all():
        return float("inf")
    difference = max((value - truth).norm().item() - allowance * value.numel() ** 0.5, 0.0)
    return difference / scale.norm().item() if difference else 0.0


def check(losses: Sequence[str] = tuple(LOSSES)) -> Iterator[Verdict]:
    """Yield a verdict for each loss and each backend that runs here."""
    runs, _ = here()
    for name in losses:
        verdicts = [Verdict(name, chosen, device) for chosen, device in runs]
        torch.manual_seed(0)
        for dtype in DTYPES:
            for shape in SHAPES:
                # The interpreter takes minutes for the others.
                chosen = [v for v in verdicts if v.where != ("triton", "cpu") or shape in INTERPRETED_SHAPES]
                _compare(chosen, LOSSES[name], dtype, shape)
        _compare_under_a_loss_scale(verdicts, LOSSES[name])
        _compare_at_an_offset(verdicts, LOSSES[name])
        _compare_strided_weights(verdicts, LOSSES[name])
        yield from verdicts


def _compare(verdicts: Sequence[Verdict], loss: Loss, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Compare one draw of logits per regime on each backend with float64."""
    bounds = BOUNDS[dtype]
    allowance = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2
    scales: tuple[Tensor, Tensor] | None = None
    for regime in REGIMES:
        inputs = make_logits(shape, regime, dtype)
        grad_output = torch.rand(shape[0]) + 0.5
        true_loss, true_gradient = _exact(loss, inputs, grad_output)
        scales = scales or (true_loss, true_gradient)  # of random logits, the first regime
        gradient_scale = scales[1] if regime == "equal" else true_gradient
        for verdict in verdicts:
            result = _of_backend(verdict, loss, inputs, grad_output)
            if result is None:
                continue
            value, gradient = result
            limit = bounds.near_equal if regime == "near-equal" else bounds.gradient
            if verdict.backend == "eager":
                limit *= ORDER
            where = f"at {_name(dtype)} {shape[0]} x {shape[1]}, {regime} logits"
            loss_error = relative(value, true_loss, scales[0])
            gradient_error = relative(gradient, true_gradient, gradient_scale, allowance)
            if regime == "random":
                verdict.errors[dtype] = max(verdict.errors.get(dtype, 0.0), gradient_error)
            if loss_error > bounds.loss:
                verdict.failures.append(f"loss error {loss_error:.1e} > {bounds.loss:.0e} {where}")
            if gradient_error > limit:
                verdict.failures.append(f"gradient error {gradient_error:.1e} > {limit:.0e} {where}")
            if (
                regime == "equal"
                and verdict.loss in VANISHING
                and verdict.backend != "eager"
                and gradient.any()
            ):
                verdict.failures.append(f"gradient not exactly 0 {where}")


def _of_backend(
    verdict: Verdict, loss: Loss, inputs: Sequence[Tensor], grad_output: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor] | None:
    """Return what the verdict's backend computes; None if it fails, which the verdict records."""
    options = {}
    if weight is not None:
        # With its strides, which a copy of the weights alone would lose.
        memory = weight.as_strided((1 + (len(weight) - 1) * weight.stride(0),), (1,)).to(verdict.device)
        options["weight"] = memory.as_strided(weight.shape, weight.stride())
    try:
        with fastkd.use_backend(verdict.backend):
            moved = [x.to(verdict.device) for x in inputs]
            return loss_and_gradient(loss, moved, grad_output.to(verdict.device), **options)
    except Exception as problem:  # a kernel that does not run is a failure to report
        verdict.failures.append(f"{type(problem).__name__}: {problem}".splitlines()[0])
        return None


def _exact(
    loss: Loss, inputs: Sequence[Tensor], grad_output: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    options = {} if weight is None else {"weight": weight.double().contiguous()}
    with fastkd.use_backend("eager"):
        wide = (inputs[0].double(), inputs[1].double(), inputs[2])
        return loss_and_gradient(loss, wide, grad_output.double(), **options)


def _shape_for(verdict: Verdict, shape: tuple[int, int]) -> tuple[int, int]:
    return INTERPRETED_SHAPES[-1] if verdict.where == ("triton", "cpu") else shape


def _by_shape(
    verdicts: Sequence[Verdict], shape: tuple[int, int]
) -> Iterator[tuple[tuple[int, int], list[Verdict]]]:
    """Yield the shape, or a smaller one for the interpreter, with the verdicts it is for."""
    for one in dict.fromkeys(_shape_for(verdict, shape) for verdict in verdicts):
        yield one, [verdict for verdict in verdicts if _shape_for(verdict, shape) == one]


def _compare_under_a_loss_scale(verdicts: Sequence[Verdict], loss: Loss) -> None:
    """float16 with the grad_output of a GradScaler: the scale must be applied before the rounding to half."""
    bounds = BOUNDS[torch.float16]
    for shape, chosen in _by_shape(verdicts, SCALED_SHAPE):
        inputs = make_logits(shape, "random", torch.float16)
        # Shorter rows get a proportionally smaller weight, so that elements are as small.
        weight = torch.full(shape[:1], shape[1] / SCALED_SHAPE[1] / SCALED_ROWS)
        grad_output = SCALE * (torch.rand(shape[0]) + 0.5)
        _, true_gradient = _exact(loss, inputs, grad_output, weight)
        while true_gradient.abs().max() > torch.finfo(torch.float16).max / 2:  # as a GradScaler does
            grad_output, true_gradient = grad_output / 2, true_gradient / 2
        for verdict in chosen:
            result = _of_backend(verdict, loss, inputs, grad_output, weight)
            if result is None:
                continue
            gradient = result[1]
            where = f"at float16 {shape[0]} x {shape[1]}, loss scale {SCALE:.0f}"
            gradient_error = relative(gradient, true_gradient, true_gradient, SMALLEST_HALF / 2)
            flushed = ((gradient == 0) & (true_gradient.abs() > SMALLEST_HALF)).double().mean().item()
            if flushed > FLUSHED_SHARE:
                verdict.failures.append(f"{flushed:.1%} of the gradient lost as 0 {where}")
            if gradient_error > bounds.gradient:
                verdict.failures.append(
                    f"gradient error {gradient_error:.1e} > {bounds.gradient:.0e} {where}"
                )


def _compare_at_an_offset(verdicts: Sequence[Verdict], loss: Loss) -> None:
    """float32 with a constant between the models: no worse than eager, whose softmax subtracts it first."""
    for shape, chosen in _by_shape(verdicts, OFFSET_SHAPE):
        teacher, other, target = make_logits(shape, "random", torch.float32)
        student = teacher + OFFSET_NOISE * torch.randn(shape)
        grad_output = torch.rand(shape[0]) + 0.5
        size = _exact(loss, (student, other, target), grad_output)[0].norm().item()
        inputs = (student, teacher + OFFSET, target)
        true_loss, true_gradient = _exact(loss, inputs, grad_output)
        with fastkd.use_backend("eager"):
            eager_loss, eager_gradient = loss_and_gradient(loss, inputs, grad_output)
        loss_limit = ORDER * (eager_loss - true_loss).norm().item() + ROUNDING * size
        eager_error = (eager_gradient - true_gradient).norm().item()
        gradient_limit = ORDER * (eager_error + ROUNDING * true_gradient.norm().item())
        for verdict in chosen:
            result = _of_backend(verdict, loss, inputs, grad_output)
            if result is None:
                continue
            for what, value, truth, limit in (
                ("loss", result[0], true_loss, loss_limit),
                ("gradient", result[1], true_gradient, gradient_limit),
            ):
                error = (value - truth).norm().item()
                if not error <= limit:  # NaN, too, fails
                    where = f"at float32 {shape[0]} x {shape[1]}, teacher's logits {OFFSET:.0f} higher"
                    verdict.failures.append(f"{what} off by {error:.1e}, more than {limit:.1e}, {where}")


def _compare_strided_weights(verdicts: Sequence[Verdict], loss: Loss) -> None:
    """Row weights with gaps in memory, and one weight expanded to all rows."""
    bounds = BOUNDS[torch.float32]
    for shape, chosen in _by_shape(verdicts, SHAPES[1]):
        inputs = make_logits(shape, "random", torch.float32)
        grad_output = torch.rand(shape[0]) + 0.5
        base = torch.rand(2 * shape[0]) + 0.5
        for words, weight in (("every other", base[::2]), ("one expanded", base[:1].expand(shape[0]))):
            true_loss, true_gradient = _exact(loss, inputs, grad_output, weight)
            for verdict in chosen:
                result = _of_backend(verdict, loss, inputs, grad_output, weight)
                if result is None:
                    continue
                where = f"at float32 {shape[0]} x {shape[1]}, row weights {words}"
                for what, value, truth, limit in (
                    ("loss", result[0], true_loss, bounds.loss),
                    ("gradient", result[1], true_gradient, bounds.gradient),
                ):
                    error = relative(value, truth, truth)
                    if error > limit:
                        verdict.failures.append(f"{what} error {error:.1e} > {limit:.0e} {where}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Compare every loss on every backend of this machine with float64: loss and gradient, in float32, "
        "bfloat16 and float16, under a loss scale, with a constant between the models and with strided row "
        "weights. Prints the largest gradient error of random logits; exit status 1 if anything fails."
    )
    names = list(dict.fromkeys(name.split(",")[0] for name in LOSSES))
    parser.add_argument(
        "--losses", nargs="+", choices=names, metavar="LOSS", default=names, help=f"among {', '.join(names)}"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print one line per loss and backend; return the exit status."""
    warnings.simplefilter("ignore", RuntimeWarning)
    begin = time.perf_counter()
    out = sys.stderr if args.json else sys.stdout
    for (name, device), reason in here()[1].items():
        print(f"not checked: {name} on {device}: {reason}", file=out)
    verdicts = []
    for verdict in check([name for name in LOSSES if name.split(",")[0] in args.losses]):
        print(verdict, flush=True, file=out)
        verdicts.append(verdict)
    failed = sum(bool(verdict.failures) for verdict in verdicts)
    seconds = time.perf_counter() - begin
    print(f"{len(verdicts) - failed} passed, {failed} failed, in {seconds:.0f} s", file=out)
    if args.json:
        checked = [verdict.plain() for verdict in verdicts]
        print_json(
            {"passed": len(verdicts) - failed, "failed": failed, "seconds": seconds, "checked": checked}
        )
    return 1 if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fastkd check")
    add_arguments(parser)
    return run_command(lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
