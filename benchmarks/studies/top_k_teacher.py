"""Time, memory and error of a loss whose teacher is known at K classes, beside the dense teacher.

    python benchmarks/studies/top_k_teacher.py --shapes 128x21841 32x131072 --known 64 --output FILE.jsonl

One step, loss and gradient, of each variant in turn, so that all meet the same machine. "dense" is fastkd
with all of the teacher's logits; "eager" is the same loss of K + 1 classes in plain torch; "dense eager" is
plain torch with all logits. Memory is the peak above the inputs; the teacher's own bytes are beside it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from choose_hyperparameters import append

import fastkd
from fastkd.bench.measure import timing
from fastkd.bench.protocol import Launch, interleaved, make_clock, relative_error
from fastkd.losses.cases import call_of
from fastkd.ops.spec import CASES

LOSSES = ("kd", "ce-kd", "dkd", "jsd")
# Whether the teacher is known at K classes, and the backend.
VARIANTS = {
    "top_k": (True, "auto"),
    "dense": (False, "auto"),
    "eager": (True, "eager"),
    "dense eager": (False, "eager"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=["128x21841", "32x131072"], metavar="ROWSxCLASSES")
    parser.add_argument("--known", type=int, default=64, metavar="K")
    parser.add_argument("--losses", nargs="+", default=LOSSES, choices=CASES, metavar="LOSS")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--seconds", type=float, default=3.0, help="of each variant")
    parser.add_argument("--output", type=Path, metavar="FILE.jsonl")
    args = parser.parse_args()
    clock = make_clock("cuda" if torch.cuda.is_available() else "cpu")
    print("| loss | rows x classes | variant | ms | of the dense time | MB | teacher's MB | gradient error |")
    print("|---|---|---|---|---|---|---|---|")
    for shape in args.shapes:
        rows, classes = map(int, shape.split("x"))
        for name in args.losses:
            for record in measure(clock, name, rows, classes, args.known, args.dtype, args.seconds):
                print(line_of(record), flush=True)
                if args.output is not None:
                    append(args.output, record)


def measure(
    clock: Any, name: str, rows: int, classes: int, known: int, dtype: str, seconds: float
) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    spec, case = CASES[name]
    loss, temperature = call_of(case), spec.temperatures(case.options)[1]
    student = (3 * torch.randn(rows, classes, device=clock.device)).to(getattr(torch, dtype)).requires_grad_()
    dense = (3 * torch.randn(rows, classes, device=clock.device)).to(student.dtype)
    target = torch.randint(0, classes, (rows,), device=clock.device)
    form = fastkd.top_k(dense, known, target, temperature=temperature)

    def gradient(variant: str) -> torch.Tensor:
        is_known, backend = VARIANTS[variant]
        with fastkd.use_backend(backend):
            return torch.autograd.grad(loss(student, form if is_known else dense, target), student)[0]

    launches, records = {}, {}
    for variant, (is_known, _) in VARIANTS.items():
        launch = Launch(lambda _, variant=variant: gradient(variant), [None])
        launch(0)
        with fastkd.use_backend("eager"):
            leaf = student.detach().double().requires_grad_()
            exact = form.of([t.double() if t.is_floating_point() else t for t in form.tensors.values()])
            teacher = exact if is_known else dense.double()
            truth = torch.autograd.grad(loss(leaf, teacher, target), leaf)[0]
        launches[variant] = launch
        tensors = form.tensors.values() if is_known else [dense]
        records[variant] = {
            "loss": name, "rows": rows, "classes": classes, "known": known, "dtype": dtype,
            "variant": variant,
            "gradient_error": relative_error(gradient(variant), truth),
            "teacher_bytes": sum(tensor.nbytes for tensor in tensors),
            "extra_bytes": clock.extra_memory(lambda launch=launch: launch(0)),
            "torch": torch.__version__, "device": clock.device, "threads": torch.get_num_threads(),
        }  # fmt: skip
    times, _ = interleaved(clock, launches, seconds=seconds, least=5)
    for variant, values in times.items():
        records[variant].update(timing(values))
    for record in records.values():
        record["of_dense"] = record["ms"] / records["dense"]["ms"]
    return list(records.values())


def line_of(record: dict[str, Any]) -> str:
    memory = "-" if record["extra_bytes"] is None else f"{record['extra_bytes'] / 1e6:.1f}"
    return (
        f"| {record['loss']} | {record['rows']} x {record['classes']} | {record['variant']} "
        f"| {record['ms']:.2f} | {record['of_dense']:.2f} | {memory} | {record['teacher_bytes'] / 1e6:.2f} "
        f"| {record['gradient_error']:.0e} |"
    )


if __name__ == "__main__":
    main()
