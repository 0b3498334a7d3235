"""Runs the native CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer; ``--quick`` is for CI.

The sources of ``csrc/cpu`` are compiled with ``benchmarks/sanitize.cpp``, which calls each instruction set's
kernels on buffers of exactly the required size: an access one element past a row, the weights or the labels
fails the run. ``--fault`` injects a fault into the driver (a weight stride, a row length or a shift out of
range), which must be detected.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from fastkd.ops import spec

ROOT = Path(__file__).parent.parent
FLAGS = [
    "-std=c++17", "-O1", "-g", "-ffp-contract=fast", "-fno-math-errno", "-fno-omit-frame-pointer", "-w",
    # Without null, alignment and object-size of `undefined`: they take minutes to compile.
    "-fsanitize=address,bounds,shift,signed-integer-overflow,integer-divide-by-zero,float-cast-overflow,return,"
    "unreachable", "-fno-sanitize-recover=all",
]  # fmt: skip
FAULTS = ("weight", "row", "arithmetic")


# A slope far above 1: exponents overflow unless they are bounded.
STEEP = spec.SoftmaxOptions(0.01, 0.1, tckd_weight=1.0, nckd_weight=8.0, standardize=True)


def cases() -> str:
    """The cases of fastkd/ops/spec.py as C++, for sanitize.cpp."""
    softmax = spec.LOSSES["softmax"]
    found = [(loss, case.options, case.labelled) for loss, case in spec.distinct_cases().values()]
    lines = []
    for loss, options, labelled in [*found, (softmax, STEEP, True)]:
        values = ", ".join(f"float({float(value)!r})" for value in options)
        index, needs = list(spec.LOSSES).index(loss.name), spec.needs_of(loss, options, labelled)
        lines.append(f"    {{{{{index}, {needs}u, {{{values}}}}}}},")
    return "\n".join(["const Case kCases[] = {", *lines, "};", ""])


def build(folder: Path) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        sys.exit("sanitize: no C++ compiler was found")
    program = folder / "sanitize"
    (folder / "sanitize_cases.inc").write_text(cases())
    sources = [ROOT / "benchmarks/sanitize.cpp", *sorted((ROOT / "csrc/cpu").glob("*.cpp"))]
    objects = [folder / f"{source.stem}.o" for source in sources]
    compilations = [
        subprocess.Popen(
            [compiler, *FLAGS, f"-I{ROOT / 'csrc'}", f"-I{folder}", "-c", str(source), "-o", str(target)]
        )
        for source, target in zip(sources, objects, strict=True)
    ]
    statuses = [compilation.wait() for compilation in compilations]
    if any(statuses):
        sys.exit("sanitize: the sources do not compile")
    subprocess.run([compiler, *FLAGS, *map(str, objects), "-o", str(program)], check=True)
    return program


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "UBSAN_OPTIONS": "print_stacktrace=1", "ASAN_OPTIONS": "detect_leaks=1"}
    return subprocess.run([str(program), *arguments], capture_output=True, text=True, env=environment)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer sizes, for CI")
    parser.add_argument("--fault", choices=FAULTS, help="inject this fault and expect it to be detected")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        program = build(Path(folder))
        if arguments.fault:
            done = run(program, "quick", arguments.fault)
            found = done.returncode != 0 and ("Sanitizer" in done.stderr or "runtime error" in done.stderr)
            outcome = "detected" if found else "NOT DETECTED"
            print(f"sanitize: the injected fault ({arguments.fault}) was {outcome}")
            sys.exit(not found)
        done = run(program, "quick" if arguments.quick else "full")
        print(done.stdout + done.stderr[-8000:], end="")
        sys.exit(done.returncode != 0)


if __name__ == "__main__":
    main()
