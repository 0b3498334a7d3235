"""Compile the Triton kernels of the tests and benchmarks for a GPU on a machine without one.

    python tools/compile_ahead.py pack KERNELS.tar.xz [--target sm_90] [--tests EXPRESSION] [--no-benchmarks]
    python tools/compile_ahead.py unpack KERNELS.tar.xz     # on the machine with the GPU, into Triton's cache

Most of the first minutes on a GPU are compilation. ``pack`` runs the tests that would run on a GPU, and the
cases of ``fastkd bench`` and ``benchmarks/plans.py``, with launches that do nothing (``fake_gpu.py``), and
keeps what was compiled: 2,400 kernels of the tests took twelve minutes on two cores. Triton looks a kernel
up by its source, its options, ptxas, and the bytes of its own library, which differ between two Pythons of
one release: ``unpack`` puts that machine's in. Both machines need the same commit of fastkd and the same
release of Triton; a kernel that differs in anything is compiled as if there were no archive.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "tools", ROOT / "benchmarks"):
    sys.path.insert(0, str(folder))

# The tests that benchmarks/on_gpu.sh runs for Triton, by their names on a CPU.
TESTS = "triton-cpu or test_triton_launch or test_triton_top_k"
TEST_FOLDERS = ("tests/losses", "tests/ops")
EMULATED = ("tests/ops/test_cuda_kernels.py", "tests/ops/test_cuda_top_k.py")
TARGET = "FASTKD_COMPILE_AHEAD_FOR"  # environment variable: set in the processes that pretend
INDEX = "index.json"


def pretend(target: str) -> None:
    """Make this process launch Triton's kernels on CPU tensors as on ``target``, and record what they are."""
    import fake_gpu
    import torch
    from triton.compiler import compiler
    from triton.runtime import cache

    from fastkd.ops import backend

    fake_gpu.on_target(target).__enter__()
    backend._PROBES["triton"] = lambda device: None
    torch.testing.assert_close = lambda *arguments, **named: None  # type: ignore[assignment]
    keys = Path(os.environ["TRITON_CACHE_DIR"]) / f"keys-{os.getpid()}.jsonl"

    def recorded(source: Any, *arguments: Any, **named: Any) -> str:
        key = cache.get_cache_key(source, *arguments, **named)
        library = f"{cache.triton_key()}-"
        if not key.startswith(library):
            raise RuntimeError(f"Triton's keys of compiled kernels have another form than expected: {key}")
        with keys.open("a") as file:
            file.write(json.dumps([folder_of(key), key.removeprefix(library)]) + "\n")
        return key

    compiler.get_cache_key = recorded


def folder_of(key: str) -> str:
    """The folder of a kernel in Triton's cache."""
    from triton.runtime.cache import _base32

    return _base32(hashlib.sha256(key.encode("utf-8")).hexdigest())


if TARGET in os.environ:  # as a plugin of pytest too, before tests/conftest.py chooses the interpreter
    pretend(os.environ[TARGET])


def launch_cases() -> None:
    """Launch the cases of ``fastkd bench``, of ``benchmarks/on_gpu.sh`` and of ``benchmarks/plans.py``."""
    import plans
    import torch

    import fastkd
    from fastkd.bench import cases
    from fastkd.bench.measure import runner

    def inputs_of(case: cases.Case) -> tuple[torch.Tensor, ...]:
        dtype = cases.DTYPES[case.dtype]
        # Never touched, so that they take no memory.
        student, teacher = (torch.empty(case.rows, case.classes, dtype=dtype) for _ in range(2))
        return student.requires_grad_(case.backward), teacher, torch.zeros(case.rows, dtype=torch.int64)

    def all_cases() -> Iterator[cases.Case]:
        yield from cases.suite()
        yield from cases.suite(shapes=on_gpu_shapes(), dtypes=["bfloat16"], passes=["forward+backward"])

    for case in all_cases():
        with fastkd.use_backend("triton"):
            runner(cases.FASTKD[case.loss], case.backward)(inputs_of(case))
    for (rows, classes), loss in itertools.product(plans.SHAPES, cases.LOSSES):
        case = cases.Case(loss, rows, classes, plans.DTYPE, "forward+backward")
        inputs = inputs_of(case)
        for values, _ in plans.variants(case, "triton", torch.device("cpu")).values():
            try:
                plans.launch(case, "triton", plans.kind_of(case), values, inputs).run(inputs)
            except Exception as error:  # too many threads, say, as on a GPU
                print(f"{case}: {values}: {error}", file=sys.stderr)


def on_gpu_shapes() -> list[tuple[int, int]]:
    """The shapes that ``benchmarks/on_gpu.sh`` names."""
    words = (ROOT / "benchmarks/on_gpu.sh").read_text().split()
    pairs = (word.split("x") for word in words)
    return [(int(pair[0]), int(pair[1])) for pair in pairs if len(pair) == 2 and all(map(str.isdigit, pair))]


def pack(archive: Path, target: str, tests: str, benchmarks: bool) -> None:
    import triton

    with tempfile.TemporaryDirectory(prefix="fastkd-kernels-") as name, tarfile.open(archive, "x:xz") as tar:
        cache = Path(name)
        environment = {**os.environ, "TRITON_CACHE_DIR": name, TARGET: target, "TRITON_INTERPRET": "0"}
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(ROOT / "tools"), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        # Without assertions, which would fail, since the launches compute nothing.
        environment["PYTHONOPTIMIZE"] = "1"
        pytest = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--assert=plain",
            "--tb=no",
            "--no-summary",
            "-n",
            "auto",
        ]
        ignored = (f"--ignore={path}" for path in EMULATED)
        command = [*pytest, "-p", "compile_ahead", *TEST_FOLDERS, *ignored, "-k", tests]
        subprocess.run(command, cwd=ROOT, env=environment)
        if benchmarks:
            subprocess.run([sys.executable, __file__, "cases"], cwd=ROOT, env=environment, check=True)

        lines = [line for path in cache.glob("keys-*.jsonl") for line in path.read_text().splitlines()]
        kernels: dict[str, str] = dict(json.loads(line) for line in lines)
        found = [file for folder in kernels for file in (cache / folder).iterdir()]
        # By the kernel's name, for a smaller archive; the compiler's intermediate results are not needed.
        found = sorted(
            (file for file in found if _is_needed(file)), key=lambda file: (file.suffix, file.name)
        )
        index = cache / INDEX
        index.write_text(json.dumps({"triton": triton.__version__, "kernels": kernels}))
        for file in [index, *found]:
            tar.add(file, arcname=file.relative_to(cache))
        print(f"{archive}: {len(kernels)} kernels for {target}, Triton {triton.__version__}")


def _is_needed(file: Path) -> bool:
    return file.suffix == ".cubin" or (file.suffix == ".json" and not file.name.startswith("__grp__"))


def unpack(archive: Path) -> None:
    import triton
    from triton.runtime.cache import get_cache_manager, triton_key

    contents: dict[str, dict[str, bytes]] = {}  # by folder and name
    with tarfile.open(archive) as tar:
        for member in filter(tarfile.TarInfo.isfile, tar):
            folder, _, name = member.name.rpartition("/")
            contents.setdefault(folder, {})[name] = tar.extractfile(member).read()  # type: ignore[union-attr]
    index = json.loads(contents[""][INDEX])
    if index["triton"] != triton.__version__:
        found = f"{archive} is for Triton {index['triton']}, not {triton.__version__}"
        raise SystemExit(f"compile_ahead.py: error: {found}")
    for folder, rest in index["kernels"].items():
        key = f"{triton_key()}-{rest}"
        manager = get_cache_manager(hashlib.sha256(key.encode("utf-8")).hexdigest())
        group = {name: manager.put(content, name) for name, content in contents[folder].items()}
        manager.put_group(next(name for name in group if name.endswith(".json")), group)
    print(f"{len(index['kernels'])} kernels")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_subparsers(dest="what", required=True)
    packing = what.add_parser("pack", help="compile, and write the new file ARCHIVE")
    packing.add_argument("archive", type=Path, metavar="ARCHIVE")
    packing.add_argument("--target", default="sm_90", choices=("sm_80", "sm_90", "sm_100"))
    packing.add_argument("--tests", default=TESTS, metavar="EXPRESSION", help="which tests, as pytest's -k")
    packing.add_argument("--no-benchmarks", action="store_true", help="only the tests")
    what.add_parser("unpack", help="into Triton's cache").add_argument(
        "archive", type=Path, metavar="ARCHIVE"
    )
    what.add_parser("cases")  # used by pack
    args = parser.parse_args()
    if args.what == "pack":
        pack(args.archive, args.target, args.tests, not args.no_benchmarks)
    elif args.what == "unpack":
        unpack(args.archive)
    else:
        launch_cases()


if __name__ == "__main__":
    main()
