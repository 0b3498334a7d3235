"""``fastkd check``: every loss on every backend of this machine against float64. Needs torch alone.

Each loss is computed, value and gradient under a random upstream gradient, on logits of several shapes,
from far apart to nearly and exactly equal, in every dtype, and compared with ``fastkd.reference`` in float64
on the very same logits. ``BOUNDS`` says what passes.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

import fastkd
from fastkd import backend
from fastkd.command import run_command

Loss = Callable[..., Tensor]  # (student, teacher, target, reduction=) -> loss


def _distill(student: Tensor, teacher: Tensor, target: Tensor, **options: object) -> Tensor:
    return fastkd.distill_loss(student, teacher, target, **options)[0]  # type: ignore[arg-type]


def _unlabelled(loss: Loss, student: Tensor, teacher: Tensor, target: Tensor, **options: object) -> Tensor:
    return loss(student, teacher, **options)


LOSSES: dict[str, Loss] = {
    "kd_loss": partial(_unlabelled, fastkd.kd_loss),
    "kd_loss, T 1": partial(_unlabelled, fastkd.kd_loss, temperature=1.0),
    "kd_loss, standardized": partial(_unlabelled, fastkd.kd_loss, temperature=2.0, standardize=True),
    "dkd_loss": fastkd.dkd_loss,
    "dkd_loss, standardized": partial(fastkd.dkd_loss, standardize=True),
    "dckd_loss": fastkd.dckd_loss,
    "distill_loss, CE": partial(_distill, ce_weight=1.0),
    "distill_loss, CE + KD": partial(_distill, ce_weight=0.1, kd_weight=0.9),
    "distill_loss, CE + DKD": partial(_distill, ce_weight=1.0, tckd_weight=1.0, nckd_weight=8.0),
    "distill_loss, smoothed": partial(
        _distill, ce_weight=0.5, kd_weight=0.5, temperature=1.0, label_smoothing=0.1
    ),
    "nkd_loss": fastkd.nkd_loss,
    "ttm_loss": partial(_unlabelled, fastkd.ttm_loss, gamma=0.25),
    "ttm_loss, weighted": partial(_unlabelled, fastkd.ttm_loss, gamma=0.25, weighted=True),
    "reverse_kl_loss": partial(_unlabelled, fastkd.reverse_kl_loss, temperature=2.0),
    "jsd_loss": partial(_unlabelled, fastkd.jsd_loss),
    "jsd_loss, beta 0.1": partial(_unlabelled, fastkd.jsd_loss, beta=0.1, temperature=2.0),
    "binary_kl_loss": partial(_unlabelled, fastkd.binary_kl_loss),
    "binary_kl_norm_loss": partial(_unlabelled, fastkd.binary_kl_norm_loss),
}
# Losses whose gradient at equal logits is 0, exactly so from a kernel.
VANISHING = [
    loss for name, loss in LOSSES.items() if not name.startswith(("distill_loss", "nkd_loss", "ttm_loss"))
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One row that is one tile, rows of odd length, and rows that are walked along in tiles.
SHAPES = ((4, 10), (16, 1000), (5, 2263), (2, 21841))
INTERPRETED_SHAPES = ((4, 10), (5, 2263))
REGIMES = ("random", "near-equal", "equal")


@dataclass(frozen=True)
class Bounds:
    """Largest errors that pass, as the norm of the difference relative to a norm.

    ``loss``: of the row losses, relative to what they are on random logits: near-equal logits have a loss
    of 1e-5 that is a difference of numbers near 1. ``gradient``: relative to the gradient itself.
    ``near_equal``: the same where student and teacher differ by about 0.01; it is a difference of
    probabilities that agree to two digits and more, of which float32 keeps what is left of its seven. A half
    type's bounds are the rounding of the gradient itself (Triton's interpreter truncates to bfloat16); half
    a unit of its smallest number an element is allowed besides.
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

    def __str__(self) -> str:
        errors = " ".join(f"{_name(dtype)} {error:.1e}" for dtype, error in self.errors.items())
        head = f"{'FAIL' if self.failures else 'pass'}  {self.loss:24s} {self.backend:7s} {self.device:5s}"
        return f"{head} {errors}" + "".join(f"; {failure}" for failure in self.failures[:2])


def here() -> tuple[list[tuple[str, str]], dict[tuple[str, str], str]]:
    """The (backend, device) pairs that run here, and the reasons of those that do not."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    runs, absent = [], {}
    for device in devices:
        for name in ("native", "triton", "eager"):
            if (name, device) == ("triton", "cpu") and "TRITON_INTERPRET" not in os.environ:
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


def loss_and_gradient(loss: Loss, inputs: Sequence[Tensor], upstream: Tensor) -> tuple[Tensor, Tensor]:
    student, teacher, target = inputs
    student = student.detach().requires_grad_()
    value = loss(student, teacher, target, reduction="none")
    value.backward(upstream)
    assert student.grad is not None
    return value.detach().double().cpu(), student.grad.double().cpu()


def relative(value: Tensor, truth: Tensor, scale: Tensor, allowance: float = 0.0) -> float:
    """Norm of the error beyond ``allowance`` an element, relative to ``scale``'s norm; infinite where the
    value is not finite, so that it never passes."""
    if not value.isfinite().all():
        return float("inf")
    difference = max((value - truth).norm().item() - allowance * value.numel() ** 0.5, 0.0)
    return difference / scale.norm().item() if difference else 0.0


def check(losses: Sequence[str] = tuple(LOSSES)) -> Iterator[Verdict]:
    """A verdict for each loss and each backend that runs here."""
    runs, _ = here()
    for name in losses:
        verdicts = [Verdict(name, chosen, device) for chosen, device in runs]
        torch.manual_seed(0)
        for dtype in DTYPES:
            for shape in SHAPES:
                # The interpreter takes minutes for more.
                chosen = [v for v in verdicts if v.where != ("triton", "cpu") or shape in INTERPRETED_SHAPES]
                _compare(chosen, LOSSES[name], dtype, shape)
        yield from verdicts


def _compare(verdicts: Sequence[Verdict], loss: Loss, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Hold a draw of logits of each regime on each backend against float64."""
    bounds = BOUNDS[dtype]
    allowance = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2
    scales: tuple[Tensor, Tensor] | None = None
    for regime in REGIMES:
        inputs = make_logits(shape, regime, dtype)
        upstream = torch.rand(shape[0]) + 0.5
        with fastkd.use_backend("eager"):
            wide = (inputs[0].double(), inputs[1].double(), inputs[2])
            true_loss, true_gradient = loss_and_gradient(loss, wide, upstream.double())
        scales = scales or (true_loss, true_gradient)  # of random logits, which come first
        gradient_scale = scales[1] if regime == "equal" else true_gradient
        limit = bounds.near_equal if regime == "near-equal" else bounds.gradient
        for verdict in verdicts:
            try:
                with fastkd.use_backend(verdict.backend):
                    moved = [x.to(verdict.device) for x in inputs]
                    value, gradient = loss_and_gradient(loss, moved, upstream.to(verdict.device))
            except Exception as problem:  # a kernel that does not run is a failure to report, not the end
                verdict.failures.append(f"{type(problem).__name__}: {problem}".splitlines()[0])
                continue
            where = f"at {_name(dtype)} {shape[0]} x {shape[1]}, {regime} logits"
            loss_error = relative(value, true_loss, scales[0])
            gradient_error = relative(gradient, true_gradient, gradient_scale, allowance)
            if regime == "random":
                verdict.errors[dtype] = max(verdict.errors.get(dtype, 0.0), gradient_error)
            if loss_error > bounds.loss:
                verdict.failures.append(f"loss error {loss_error:.1e} > {bounds.loss:.0e} {where}")
            if gradient_error > limit:
                verdict.failures.append(f"gradient error {gradient_error:.1e} > {limit:.0e} {where}")
            if regime == "equal" and loss in VANISHING and verdict.backend != "eager" and gradient.any():
                verdict.failures.append(f"gradient not exactly 0 {where}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Check every loss on every backend of this machine against float64: loss and gradient, in "
        "float32, bfloat16 and float16. Prints the largest gradient error of random logits; exit status 1 "
        "if anything fails."
    )
    names = list(dict.fromkeys(name.split(",")[0] for name in LOSSES))
    parser.add_argument(
        "--losses", nargs="+", choices=names, metavar="LOSS", default=names, help=f"among {', '.join(names)}"
    )


def run(args: argparse.Namespace) -> int:
    """Print a line a loss and backend; the exit status."""
    warnings.simplefilter("ignore", RuntimeWarning)
    begin = time.perf_counter()
    for (name, device), reason in here()[1].items():
        print(f"not checked: {name} on {device}: {reason}")
    passed = failed = 0
    for verdict in check([name for name in LOSSES if name.split(",")[0] in args.losses]):
        print(verdict, flush=True)
        passed += not verdict.failures
        failed += bool(verdict.failures)
    print(f"{passed} passed, {failed} failed, in {time.perf_counter() - begin:.0f} s")
    return 1 if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fastkd check")
    add_arguments(parser)
    return run_command(lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
