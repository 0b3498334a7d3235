"""Forward and backward of the losses here: fastkd beside eager torch and torch.compile, in one run.

    python benchmarks/losses.py [--quick] [--output FILE.jsonl]

Protocol: the variants take turns in one process, over input sets that together exceed the last-level cache;
medians over the turns, with the 20th and 80th percentile; after each variant's own warm-up. Beside the time
stand the error of the gradient against float64 and the floor: three memory accesses an element (read student,
read teacher, write gradient) at the bandwidth of a copy measured in the same run. Eager and compiled peers
compute the formulas as their users have them. On a GPU the time includes the launch; on shared machines only
the ratios within one run mean something.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd

SHAPES = {
    "cpu": [(256, 1000), (128, 21841), (32, 131072)],
    "cuda": [(256, 1000), (8192, 32768), (4096, 131072), (256, 1_000_000)],
}
INPUT_SETS = 3
T_KD, T_BINARY = 4.0, 2.0

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def eager_kd(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    log_q, p = F.log_softmax(s / T_KD, 1), F.softmax(t / T_KD, 1)
    return F.kl_div(log_q, p, reduction="batchmean") * T_KD**2


def eager_dkd(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """DKD in the form in wide use: masks, probabilities of two classes, -1000 on the label."""
    label = torch.zeros_like(s).scatter_(1, y[:, None], 1).bool()
    q, p = F.softmax(s / T_KD, 1), F.softmax(t / T_KD, 1)
    two_q, two_p = (torch.stack([(x * label).sum(1), (x * ~label).sum(1)], 1) for x in (q, p))
    tckd = F.kl_div(two_q.log(), two_p, reduction="sum") * T_KD**2 / s.shape[0]
    rest_p = F.softmax(t / T_KD - 1000.0 * label, 1)
    rest_q = F.log_softmax(s / T_KD - 1000.0 * label, 1)
    return tckd + 8.0 * F.kl_div(rest_q, rest_p, reduction="sum") * T_KD**2 / s.shape[0]


def eager_binary_kl_norm(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """BinaryKL-Norm as released: both halves of a Bernoulli KL, clamped away from 0 and 1."""
    q = torch.sigmoid((s - t) / T_BINARY).clamp(1e-8, 1 - 1e-8)
    row = 0.5 * torch.log(0.5 / q) + 0.5 * torch.log(0.5 / (1 - q))
    return row.sum(1).mean() * T_BINARY**2


def eager_ce_kd(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return 0.1 * F.cross_entropy(s, y) + 0.9 * eager_kd(s, t, y)


LOSSES: dict[str, tuple[Loss, Loss]] = {
    "KD": (eager_kd, lambda s, t, y: fastkd.kd_loss(s, t)),
    "DKD": (eager_dkd, lambda s, t, y: fastkd.dkd_loss(s, t, y)),
    "BinaryKL-Norm": (eager_binary_kl_norm, lambda s, t, y: fastkd.binary_kl_norm_loss(s, t)),
    "CE + KD": (eager_ce_kd, lambda s, t, y: fastkd.distill_loss(s, t, y, ce_weight=0.1, kd_weight=0.9)[0]),
}


def step(loss: Loss, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    student = inputs[0]
    student.grad = None
    loss(*inputs).backward()
    assert student.grad is not None
    return student.grad


def timed(run: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) * 1e3


def gradient_error(loss: Loss, exact: Loss, inputs: tuple[Tensor, Tensor, Tensor]) -> float:
    gradient = step(loss, inputs).double()
    student = inputs[0].detach().double().requires_grad_()
    with fastkd.use_backend("eager"):
        truth = step(exact, (student, inputs[1].double(), inputs[2]))
    return ((gradient - truth).norm() / truth.norm()).item()


def measure(name: str, rows: int, classes: int, dtype: torch.dtype, device: str, turns: int) -> list[dict]:
    eager, fused = LOSSES[name]
    variants = {"eager": eager, "compiled": torch.compile(eager, dynamic=False), "fastkd": fused}
    sets = []
    for _ in range(INPUT_SETS):
        student, teacher = (3 * torch.randn(rows, classes, device=device) for _ in range(2))
        labels = torch.randint(0, classes, (rows,), device=device)
        sets.append((student.to(dtype).requires_grad_(), teacher.to(dtype), labels))
    source, target = torch.randn(2, INPUT_SETS, rows * classes, device=device).to(dtype)
    times: dict[str, list[float]] = {variant: [] for variant in [*variants, "copy"]}
    for turn in range(turns + 2):
        inputs = sets[turn % INPUT_SETS]
        for variant, loss in variants.items():
            elapsed = timed(lambda loss=loss, inputs=inputs: step(loss, inputs), device)
            if turn >= 2:
                times[variant].append(elapsed)
        place = turn % INPUT_SETS
        times["copy"].append(timed(lambda place=place: target[place].copy_(source[place]), device))
    floor = statistics.median(times["copy"]) * 3 / 2
    results = []
    for variant, loss in variants.items():
        low, median, high = (percentile(times[variant], share) for share in (0.2, 0.5, 0.8))
        results.append(
            {
                "loss": name, "rows": rows, "classes": classes, "dtype": str(dtype).removeprefix("torch."),
                "variant": variant, "ms": median, "p20": low, "p80": high, "floor_ms": floor,
                "gradient_error": gradient_error(loss, fused, sets[0]),
            }
        )  # fmt: skip
    return results


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[round(share * (len(values) - 1))]


def print_table(results: list[dict]) -> None:
    columns = [
        "loss", "shape", "dtype", "eager ms", "compiled ms", "fastkd ms", "vs eager", "vs compiled",
        "floor ms", "x floor", "gradient error: eager, fastkd",
    ]  # fmt: skip
    print("| " + " | ".join(columns) + " |")
    print("|---" * len(columns) + "|")
    for eager, compiled, fused in zip(results[::3], results[1::3], results[2::3], strict=True):
        cells = [
            eager["loss"], f"{eager['rows']} x {eager['classes']}", eager["dtype"],
            *(f"{row['ms']:.2f}" for row in (eager, compiled, fused)),
            f"{eager['ms'] / fused['ms']:.1f}", f"{compiled['ms'] / fused['ms']:.1f}",
            f"{fused['floor_ms']:.2f}", f"{fused['ms'] / fused['floor_ms']:.1f}",
            f"{eager['gradient_error']:.0e}, {fused['gradient_error']:.0e}",
        ]  # fmt: skip
        print("| " + " | ".join(cells) + " |")


def processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="KD and DKD on the two smaller shapes, few turns"
    )
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--output", type=Path, help="write one JSON line a measurement to this new file")
    arguments = parser.parse_args()
    if arguments.output and arguments.output.exists():
        parser.error(f"{arguments.output} exists; results are never overwritten")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    about = {
        "date": date.today().isoformat(), "device": processor(), "threads": torch.get_num_threads(),
        "backend": fastkd.backend.resolve(fastkd.get_backend(), device, torch.float32),
        "torch": torch.__version__, "fastkd": fastkd.__version__, "python": platform.python_version(),
    }  # fmt: skip
    if device == "cpu":
        from fastkd.ops import native

        about["instruction_set"] = native.instruction_set() if native.missing("cpu") is None else "none"
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    results = []
    names = ["KD", "DKD"] if arguments.quick else list(LOSSES)
    for rows, classes in SHAPES[device][: 2 if arguments.quick else None]:
        for name in names:
            torch._dynamo.reset()
            dtype = getattr(torch, arguments.dtype)
            results += measure(name, rows, classes, dtype, device, turns=7 if arguments.quick else 21)
    print_table(results)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text("".join(json.dumps({**about, **result}) + "\n" for result in results))


if __name__ == "__main__":
    main()
