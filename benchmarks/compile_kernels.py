"""Compiles every Triton kernel in every planned configuration, and every CUDA kernel, without a GPU, and
prints what they use.

    python benchmarks/compile_kernels.py [--quick]

For sm_80, sm_90, sm_100 and gfx942, through Triton's ahead-of-time compiler. Exit status 1 where a kernel
does not compile, spills registers or uses local memory (NVIDIA; read from the binary with cuobjdump, which
ships with Triton). The CUDA sources are checked where nvcc is found. The kernels are not run: this says
nothing of their speed.
"""

import argparse
import itertools
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"

import compile_cuda
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastkd.ops.plan import MAX_PARTS, Device, Plan, plan_rows
from fastkd.ops.triton import formulas
from fastkd.ops.triton.launch import compile_options, mixture_phases, needs_of, softmax_phases
from fastkd.ops.triton.mixture_rows import jsd_rows
from fastkd.ops.triton.pointwise_rows import pointwise_rows, scale_rows
from fastkd.ops.triton.softmax_rows import softmax_rows

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {
    "target_pointer": "*i64",
    "weight_pointer": "*fp32",
    "loss_pointer": "*fp32",
    "terms_pointer": "*fp32",
    "upstream_pointer": "*fp32",
    "moments_pointer": "*fp32",
    "sums_pointer": "*fp32",
    "kl_pointer": "*fp32",
}
DEVICE = Device(multiprocessors=132, cache_bytes=50 << 20)
MANY, FEW = 100_000, 4  # rows
# Losses by name, options, whether there are labels, and what the call asks for.
WEIGHED = {"WEIGHTED": True, "WITH_GRADIENT": True, "TERMS": False}
PLAIN = {"WEIGHTED": False, "WITH_GRADIENT": True, "TERMS": False}
LOSSES: dict[str, tuple[str, tuple[float, ...], bool, dict[str, bool]]] = {
    "kd": ("softmax", (4.0, 0, 1, 0, 0, 0, 0, 0), False, PLAIN),
    "kd, no gradient": ("softmax", (4.0, 0, 1, 0, 0, 0, 0, 0), False, PLAIN | {"WITH_GRADIENT": False}),
    "lskd": ("softmax", (2.0, 0, 1, 0, 0, 0, 1, 0), False, PLAIN),
    "dkd": ("softmax", (4.0, 0, 0, 1, 8, 0, 0, 0), True, WEIGHED),
    "ce": ("softmax", (4.0, 1, 0, 0, 0, 0, 0, 0), True, WEIGHED | {"TERMS": True}),
    "ce + kd": ("softmax", (4.0, 0.1, 0.9, 0, 0, 0, 0, 0), True, WEIGHED | {"TERMS": True}),
    "ce + lskd": ("softmax", (2.0, 0.1, 9, 0, 0, 0.1, 1, 0), True, WEIGHED | {"TERMS": True}),
    "nkd": ("nkd", (3.0, 1.5), True, WEIGHED),
    "ttm": ("ttm", (0.25, 1.0), False, PLAIN),
    "reverse kl": ("reverse_kl", (1.0,), False, PLAIN),
}
# Those compiled for every path where time is short: the smallest and the one that needs most registers.
QUICK = ("kd", "ce + lskd")
CLASSES = (10, 100, 1000, 4096, 8192, 20902)


def configurations(quick: bool) -> Iterator[tuple[str, object, dict, Plan, str]]:
    """(name, kernel, constants, plan, dtype) of every kernel as ops/triton/launch.py launches it."""
    dtypes = ("bf16",) if quick else ("fp32", "bf16", "fp16")
    sizes = (100, 1000, 20902) if quick else CLASSES
    for classes, dtype in itertools.product(sizes, dtypes):
        # Few long rows are shared by programs, one launch a phase.
        for rows in (MANY, FEW) if classes > max(CLASSES[:-1]) else (MANY,):
            yield from kernels(rows, classes, dtype, quick)


def kernels(
    rows: int, classes: int, dtype: str, quick: bool
) -> Iterator[tuple[str, object, dict, Plan, str]]:
    where = f"C {classes}" + (", few rows" if rows == FEW else "")

    def planned(loss: str):
        plan = plan_rows(loss, rows, classes, 4 if dtype == "fp32" else 2, DEVICE)
        return plan, {"ROWS": plan.rows, "TILE": plan.tile}

    for name, (loss, options, labelled, call) in LOSSES.items():
        if quick and name not in QUICK and (rows == FEW or classes == 100):
            continue
        plan, shape = planned(loss)
        needs = needs_of(loss, options, labelled)
        for phase in softmax_phases(plan, needs):
            constants = call | shape | {"FORMULA": getattr(formulas, loss), "NEEDS": needs}
            constants |= {"ONE_TILE": plan.one_tile, "PARTS": MAX_PARTS, "PHASE": phase}
            yield f"{name}, {where}{phase_name(phase)}", softmax_rows, constants, plan, dtype
    weighted = {"WEIGHTED": True, "WITH_GRADIENT": True}
    plan, shape = planned("jsd")
    for phase in mixture_phases(plan):
        constants = weighted | shape | {"PARTS": MAX_PARTS, "PHASE": phase}
        yield f"jsd, {where}{phase_name(phase)}", jsd_rows, constants, plan, dtype
    for formula in ("binary_kl", "binary_kl_norm"):
        plan, shape = planned(formula)
        constants = weighted | shape | {"FORMULA": getattr(formulas, formula)}
        yield f"{formula}, {where}", pointwise_rows, constants, plan, dtype
    plan, shape = planned("scale")
    yield f"scale, {where}", scale_rows, {"TILE": plan.tile}, plan, dtype


def phase_name(phase: int) -> str:
    return ("", ", moments", ", statistics", ", gradient", ", mixture")[phase]


def compile_kernel(kernel, constants: dict, plan: Plan, dtype: str, target: GPUTarget):
    names = [parameter.name for parameter in kernel.params]
    signature = {}
    for name in names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_pointers"):
            signature[name] = (f"*{dtype}",)  # one pair of logits
        elif name.endswith("_pointer"):
            signature[name] = POINTERS.get(name, f"*{dtype}")
        elif name == "options":
            signature[name] = ("fp32",) * 7
        elif name in ("count", "blocks", "parts", "classes") or name.endswith("_stride"):
            signature[name] = "i32"
        else:
            signature[name] = "fp32"
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs={})
    return triton.compile(
        source, target=target, options=compile_options(plan, constants.get("NEEDS", 0), target.backend)
    )


def used_by(compiled) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(compiled.asm["cubin"])
        binary.flush()
        (used,) = compile_cuda.resources(Path(binary.name)).values()
    return used


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="two row lengths in bf16, for continuous integration"
    )
    quick = parser.parse_args().quick
    print(f"triton {triton.__version__}; registers a thread; stack and local memory must be 0")
    failures = compiled_kernels = 0
    for name, kernel, constants, plan, dtype in configurations(quick):
        cells = []
        for architecture, target in TARGETS.items():
            try:
                compiled = compile_kernel(kernel, constants, plan, dtype, target)
            except Exception as error:  # whatever a compiler raises is this row's result
                failures += 1
                cells.append(f"{architecture} FAILED ({type(error).__name__}: {error})")
                continue
            compiled_kernels += 1
            if "cubin" not in compiled.asm:
                cells.append(f"{architecture} ok")
                continue
            used = used_by(compiled)
            bad = used["STACK"] or used["LOCAL"]
            failures += bool(bad)
            cells.append(f"{architecture} {used['REG']:3d} reg" + (f" SPILLS {used}" if bad else ""))
        print(f"{name:36s} {dtype:5s} {plan.warps:2d} warps  " + "  ".join(cells), flush=True)
    compiled_cuda, failures_cuda = compile_cuda.check()
    failures += failures_cuda
    print(f"{compiled_kernels + compiled_cuda} kernels compiled, {failures} failed or spilled")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
