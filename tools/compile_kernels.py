"""Compiles the launched Triton kernels and all CUDA kernels without a GPU, and prints their register usage.

    python tools/compile_kernels.py [--quick]
    python tools/compile_kernels.py --report docs/reports/kernels.md     # see kernel_report.py

For sm_80, sm_90, sm_100 and gfx942, as Triton's JIT specialises them (jit_launches.py): the losses that need
most registers and, without --quick, calls that cover all pairs of values of arguments, dtypes, alignments and
row lengths. Exit status 1 if a kernel does not compile, or spills registers or uses local memory although it
is recorded not to with this release of Triton (NVIDIA only; read from the binary with cuobjdump, which ships
with Triton). The CUDA sources are compiled if nvcc is found. The kernels are not run.
"""

import argparse
import itertools
import sys
from pathlib import Path

import compile_cuda
import fake_gpu
import jit_launches
import kernel_report
import triton

# The most statistics; the longest resident row, and long rows whole and split.
REGISTER_HEAVY = [
    jit_launches.Call(loss, path, weights="rows", terms=terms)
    for loss, terms in (("ce-lskd-smoothed", True), ("ls-dkd", False), ("jsd", False))
    for path in ("C 8192", "C 20902", "C 20902, few rows", "C 32768")
]
REGISTER_HEAVY += [
    jit_launches.Call("ce-kd-smoothed", path, weights="rows", terms=True, known=known)
    for path, known in itertools.product(("C 8192", "C 20902"), jit_launches.KNOWN)
]
# As a reduced loss launches them: summed over rows, with labels that the kernel counts.
REGISTER_HEAVY += [
    jit_launches.Call(loss, path, "bf16", "bf16", weights=weights, terms=loss.startswith("ce"), summed=True)
    for loss, weights in (
        ("kd", "rows"), ("dkd", "counted labels"), ("ce-lskd-smoothed", "rows and counted labels"),
    )
    for path in ("C 10", "C 1000", "C 20902")
]  # fmt: skip
# Known spills among REGISTER_HEAVY, by Triton release: loss, path and known classes. Spills of other kernels,
# or with a release that is not listed, are reported but are not failures.
MAY_SPILL: dict[str, tuple[tuple[str, str, int], ...]] = {
    # 8 bytes in `expand` on sm_80, where ptxas stops at 32 registers. With 40 it would not, at the price of a
    # quarter of the warps. CE + LSKD with row weights beside the labels: 8 bytes on sm_80, once per row.
    "3.6": (
        ("ce-kd-smoothed", "C 20902", max(jit_launches.KNOWN)),
        ("dkd", "C 20902", 0),
        ("ce-lskd-smoothed", "C 1000", 0),
    ),
    # 24 to 40 bytes, 8 of them read in a loop of 650 instructions: of three programs on a multiprocessor a
    # thread has 80 registers. Not on sm_100, not of 32,768 classes.
    "3.8": (("dkd", "C 20902", 0),),
    "3.9": (("dkd", "C 20902", 0),),
}


def inspect(call: jit_launches.Call, target: str) -> list[tuple[bool, bool, str]]:
    """For each kernel of the call: whether it failed, whether it spills, and the text to print."""
    found = []
    with fake_gpu.on_target(target):
        try:
            launches = call.launches()
        except Exception as error:  # any error of the binder is a result
            return [(True, False, f"{target} FAILED ({type(error).__name__}: {error})")]
        for variant in launches:
            try:
                compiled = variant.compile()
            except Exception as error:  # any error of the compiler is a result
                found.append((True, False, f"{target} FAILED ({type(error).__name__}: {error})"))
                continue
            if "cubin" not in compiled.asm:
                found.append((False, False, f"{target} ok"))
                continue
            used = compile_cuda.used_by(compiled.asm["cubin"])
            spills = bool(used["STACK"] or used["LOCAL"])
            text = f"{target} {used['REG']:3d} reg" + (f" SPILLS {used}" if spills else "")
            found.append((False, spills, text))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="only the losses that need most registers")
    parser.add_argument(
        "--report", type=Path, metavar="FILE.md", help="write instructions per element instead"
    )
    arguments = parser.parse_args()
    if arguments.report is not None:
        arguments.report.write_text(kernel_report.report())
        return 0
    release = ".".join(triton.__version__.split(".")[:2])
    known = release in MAY_SPILL
    print(f"triton {triton.__version__}; registers per thread; stack and local memory are spills")
    calls = list(REGISTER_HEAVY)
    if not arguments.quick:
        calls += [call for call in jit_launches.covering(jit_launches.calls(), 2) if call not in calls]
    failures = spills = gated = compiled = 0
    for call in calls:
        by_target = [inspect(call, target) for target in fake_gpu.TARGETS]
        for found in zip(*by_target, strict=True):
            failures += sum(failed for failed, _, _ in found)
            spilled = sum(spilled for _, spilled, _ in found)
            spills += spilled
            may_spill = not known or (call.loss, call.path, call.known) in MAY_SPILL[release]
            gated += spilled if call in REGISTER_HEAVY and not may_spill else 0
            compiled += sum(not failed for failed, _, _ in found)
            print(f"{call!s:70s} " + "  ".join(text for _, _, text in found), flush=True)
    compiled_cuda, failures_cuda = compile_cuda.check()
    failures += failures_cuda + gated
    print(f"{compiled + compiled_cuda} kernels compiled, {failures} failed, {spills} Triton kernels spilled")
    if spills > gated:
        print(
            f"{spills - gated} spills are not failures: not recorded as free of spills with Triton {release}"
        )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
