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

from fastkd.ops.plan import plan_rows, plan_tile
from fastkd.ops.triton import formulas
from fastkd.ops.triton.launch import EXACT_PRODUCTS, softmax_switches
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
}
# Losses by name, options and what the call asks for.
LABELLED = {"LABELLED": True, "WEIGHTED": True, "GRADIENT": True, "TERMS": False}
UNLABELLED = {"LABELLED": False, "WEIGHTED": False, "GRADIENT": True, "TERMS": False}
LOSSES: dict[str, tuple[str, tuple[float, ...], dict[str, bool]]] = {
    "kd": ("softmax", (4.0, 0, 1, 0, 0, 0, 0, 0), UNLABELLED),
    "kd, no gradient": ("softmax", (4.0, 0, 1, 0, 0, 0, 0, 0), UNLABELLED | {"GRADIENT": False}),
    "lskd": ("softmax", (2.0, 0, 1, 0, 0, 0, 1, 0), UNLABELLED),
    "dkd": ("softmax", (4.0, 0, 0, 1, 8, 0, 0, 0), LABELLED),
    "ce": ("softmax", (4.0, 1, 0, 0, 0, 0, 0, 0), LABELLED | {"TERMS": True}),
    "ce + kd": ("softmax", (4.0, 0.1, 0.9, 0, 0, 0, 0, 0), LABELLED | {"TERMS": True}),
    "ce + lskd": ("softmax", (2.0, 0.1, 9, 0, 0, 0.1, 1, 0), LABELLED | {"TERMS": True}),
    "nkd": ("nkd", (3.0, 1.5), LABELLED),
    "ttm": ("ttm", (0.25, 1.0), UNLABELLED),
    "reverse kl": ("reverse_kl", (1.0,), UNLABELLED),
}
CLASSES = (10, 100, 1000, 4096, 8192, 20902)


def configurations(quick: bool) -> Iterator[tuple[str, object, dict, int, str]]:
    """(name, kernel, constants, warps, dtype) of every kernel as ops/triton/launch.py launches it."""
    dtypes = ("bf16",) if quick else ("fp32", "bf16", "fp16")
    sizes = (1000, 20902) if quick else CLASSES
    for classes, dtype in itertools.product(sizes, dtypes):
        plan = plan_rows(classes)
        for name, (loss, options, call) in LOSSES.items():
            constants = (
                softmax_switches(loss, options) | call | {"TILE": plan.tile, "ONE_TILE": plan.one_tile}
            )
            yield f"{name}, C {classes}", softmax_rows, constants, plan.warps, dtype
        tile, warps = plan_tile(classes)
        walk = {"WEIGHTED": True, "GRADIENT": True, "TILE": tile}
        yield f"jsd, C {classes}", jsd_rows, walk, warps, dtype
        for formula in ("binary_kl", "binary_kl_norm"):
            constants = walk | {"FORMULA": getattr(formulas, formula)}
            yield f"{formula}, C {classes}", pointwise_rows, constants, warps, dtype
        yield f"scale, C {classes}", scale_rows, {"TILE": tile}, warps, dtype


def compile_kernel(kernel, constants: dict, warps: int, dtype: str, target: GPUTarget):
    names = [parameter.name for parameter in kernel.params]
    signature = {}
    for name in names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_pointer"):
            signature[name] = POINTERS.get(name, f"*{dtype}")
        elif name in ("count", "classes") or name.endswith("_stride"):
            signature[name] = "i32"
        else:
            signature[name] = "fp32"
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs={})
    return triton.compile(source, target=target, options={"num_warps": warps, **EXACT_PRODUCTS})


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
    for name, kernel, constants, warps, dtype in configurations(quick):
        cells = []
        for architecture, target in TARGETS.items():
            try:
                compiled = compile_kernel(kernel, constants, warps, dtype, target)
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
        print(f"{name:28s} {dtype:5s} {warps:2d} warps  " + "  ".join(cells), flush=True)
    compiled_cuda, failures_cuda = compile_cuda.check()
    failures += failures_cuda
    print(f"{compiled_kernels + compiled_cuda} kernels compiled, {failures} failed or spilled")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
