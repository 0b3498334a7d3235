"""Compiles the CUDA sources without a GPU, for the table of tools/compile_kernels.py.

``python tools/compile_cuda.py`` prints that table alone: registers, and instructions per element over all
passes (``vector_loops`` in sass.py).
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import sass

from fastkd.ops.spec import Needs
from fastkd.ops.team_plan import VECTOR

ROOT = Path(__file__).parent.parent
DTYPES = {"5": "float16", "6": "float32", "15": "bfloat16"}  # by the number of csrc/rows.h
# Architectures and their virtual architectures: without and with clusters.
ARCHITECTURES = {"sm_80": "compute_80", "sm_90": "compute_90", "sm_100": "compute_90"}


def resources(binary: Path) -> dict[str, dict[str, int]]:
    """Registers, stack, local and shared memory of each function of a cubin, by mangled name. Spills are on
    the stack."""
    cuobjdump = Path(importlib.util.find_spec("triton").origin).parent / "backends/nvidia/bin/cuobjdump"
    command = [cuobjdump, "--dump-resource-usage", binary]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {
        function: {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", numbers)}
        for function, numbers in re.findall(r"Function (\S+):\n(.*)", text)
    }


def used_by(cubin: bytes) -> dict[str, int]:
    """The same of a cubin's only function."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(cubin)
        binary.flush()
        (used,) = resources(Path(binary.name)).values()
    return used


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return (home and shutil.which("nvcc", path=str(Path(home, "bin")))) or shutil.which("nvcc")


def compile_for(nvcc: str, architecture: str, folder: str) -> dict[str, dict[str, int]] | str:
    """Each kernel's resources, or the compiler's message."""
    binary = Path(folder, f"{architecture}.cubin")
    command = [
        nvcc, "--options-file", "csrc/cuda/nvcc.options", "csrc/cuda/launch.cu", "-cubin", "-o", str(binary),
        f"-gencode=arch={ARCHITECTURES[architecture]},code={architecture}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        return done.stderr.strip()
    loops = sass.vector_loops(sass.disassembled(binary.read_bytes()))
    return {
        readable(function): {**used, "INSTRUCTIONS": sum(loops[function])}
        for function, used in resources(binary).items()
    }


def readable(function: str) -> str:
    """``Softmax, distills, student at t1, bfloat16`` for the kernel's mangled name."""
    kernel = re.search(
        r"(softmax|mixture|pointwise|scale|gather|scatter)_rowsI(?:NS_\d+([A-Za-z]+?)E)?(?:Lj(\d+)E)?"
        r"(?:NS0_5FixedILNS_5DTypeE(\d+)|NS0_7Varying)",
        function,
    )
    if kernel is None:
        return function
    family, loss, needs, dtype = kernel.groups()
    words = [need.name.replace("_", " ").lower() for need in Needs if int(needs or 0) & need]
    return ", ".join([loss or family, *words, DTYPES.get(dtype, "mixed dtypes")])


def check() -> tuple[int, int]:
    """Print a line per kernel; return how many were compiled, and how many failed or spilled."""
    nvcc = find_nvcc()
    if nvcc is None:
        print("CUDA sources: not checked, nvcc was not found")
        return 0, 0
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    print(f"CUDA sources, {version.strip().splitlines()[-1]}; all row lengths")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda architecture: compile_for(nvcc, architecture, folder), ARCHITECTURES))
    compiled = failures = 0
    kernels: dict[str, list[str]] = {}
    for architecture, result in zip(ARCHITECTURES, results, strict=True):
        if isinstance(result, str) or not result:
            failures += 1
            print(f"{architecture} FAILED: {result or 'no kernel in the binary'}")
            continue
        for name, used in result.items():
            compiled += 1
            bad = used["STACK"] or used["LOCAL"]
            failures += bool(bad)
            cell = f"{architecture} {used['REG']:3d} reg {used['INSTRUCTIONS'] / VECTOR:5.1f} instr"
            cell += f" SPILLS {used}" if bad else ""
            kernels.setdefault(name, []).append(cell)
    for name, cells in sorted(kernels.items()):
        print(f"{name:66s}  " + "  ".join(cells))
    return compiled, failures


if __name__ == "__main__":
    compiled, failures = check()
    sys.exit(not compiled or failures > 0)
