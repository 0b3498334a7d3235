"""Measure the errors of every loss and gradient against float64, as docs/accuracy.md.

    python benchmarks/accuracy.py > docs/accuracy.md
    python benchmarks/accuracy.py kd jsd                # of these cases only

Run from the repository's root. For each loss, backend, dtype and regime of logits: the norm of the difference
from the float64 reference on the same logits, relative to the reference's norm, median of three draws.
"Eager" is fastkd's reference in float32, about as accurate as torch operations get.
"""

import os
import statistics
import sys
import warnings

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, ".")

import fastkd
from fastkd.ops.backend import missing
from tests.cases import BY_NAME, CASES, Case, exact, loss_and_gradient

ROWS, CLASSES, DRAWS = 16, 1000, 3
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def regimes(dtype: torch.dtype) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Student, teacher and labels of each regime."""
    student, teacher = (3 * torch.randn(ROWS, CLASSES) for _ in range(2))
    labels = torch.randint(0, CLASSES, (ROWS,))
    confident = [z.scatter(1, labels[:, None], 40.0) for z in (student, teacher)]
    masked = [z.clone() for z in (student, teacher)]
    for logits in masked:
        logits[:, CLASSES // 2 :] = -torch.inf
    pairs = {
        "random": (student, teacher),
        "near-equal": (student, student + 1e-3 * torch.randn_like(student)),
        "confident": confident,
        "saturated": (student.sign() * 1e4, teacher.sign() * 1e4),
        "masked": masked,
    }
    return {
        name: (s.to(dtype), t.to(dtype), labels % (CLASSES // 2) if name == "masked" else labels)
        for name, (s, t) in pairs.items()
    }


def defined(case: Case, regime: str, dtype: torch.dtype) -> bool:
    if regime == "masked":  # averages over all classes are undefined with masked ones
        return not case.averages_classes
    # Half types round near-equal logits to equal ones or to larger differences.
    return regime != "near-equal" or dtype == torch.float32


def relative(value: torch.Tensor, truth: torch.Tensor) -> float:
    scale = truth.norm().item()
    return (value.double().cpu() - truth).norm().item() / scale if scale else 0.0


def errors(case: Case, backend: str, device: str, inputs, grad_output) -> tuple[float, float]:
    true_loss, true_gradient = exact(case, *inputs, grad_output, reduction="none")
    moved = [x.to(device) for x in (*inputs, grad_output)]
    with fastkd.use_backend(backend):
        loss, gradient = loss_and_gradient(case, *moved, reduction="none")
    return relative(loss, true_loss), relative(gradient, true_gradient)


def cell(values: list[tuple[float, float]]) -> str:
    return " / ".join(f"{statistics.median(column):.0e}" for column in zip(*values, strict=True))


def main() -> None:
    if unknown := set(sys.argv[1:]) - set(BY_NAME):
        sys.exit(f"accuracy.py: error: no case {', '.join(sorted(unknown))}; expected {', '.join(BY_NAME)}")
    cases = [BY_NAME[name] for name in sys.argv[1:]] or CASES
    warnings.simplefilter("ignore")
    gpu = torch.cuda.is_available()
    devices = {"native": "cpu", "triton": "cuda" if gpu else "cpu", "eager": "cpu"}
    backends = [name for name, device in devices.items() if missing(name, device) is None]
    where = torch.cuda.get_device_name() if gpu else "Triton in its interpreter, on the CPU"
    print("# Accuracy\n")
    print(
        "Made by `python benchmarks/accuracy.py > docs/accuracy.md` "
        f"(torch {torch.__version__}, {where}).\n"
        "Each cell: error of the row losses / error of the gradient, relative to the float64 reference on\n"
        f"the same {ROWS} x {CLASSES} logits, median of {DRAWS} draws. A half type's gradient cannot be\n"
        "closer than its own rounding, about 2e-3 for bfloat16 and 2e-4 for float16; Triton's interpreter\n"
        "truncates to bfloat16, which doubles that. Near-equal logits differ by 1e-3: the loss of 1e-7 is\n"
        "lost to rounding, its gradient is not. Masked: half of both models' classes are -inf.\n"
    )
    for dtype in DTYPES:
        torch.manual_seed(0)
        draws = [(regimes(dtype), torch.randn(ROWS)) for _ in range(DRAWS)]
        names = [name for name in draws[0][0] if any(defined(case, name, dtype) for case in cases)]
        print(f"## {str(dtype).removeprefix('torch.')}\n")
        print("| loss | backend | " + " | ".join(names) + " |")
        print("|---" * (len(names) + 2) + "|")
        for case in cases:
            for backend in backends:
                cells = [
                    cell([errors(case, backend, devices[backend], draw[name], grad) for draw, grad in draws])
                    if defined(case, name, dtype)
                    else "-"
                    for name in names
                ]
                print(f"| {case.name} | {backend} | " + " | ".join(cells) + " |", flush=True)
        print()


if __name__ == "__main__":
    main()
