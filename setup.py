"""Builds the native backend: one shared library that links neither torch nor Python.

It uses torch through the stable C ABI (csrc/torch_abi.h), so an isolated build installs no second torch, and
one wheel works with every Python from 3.10 and every torch from 2.10. If the build fails, the install
continues without the library: `fastkd doctor` reports the reason, and the losses run on another backend. CUDA
kernels are included if nvcc is found and succeeds; otherwise the library records the reason. docs/building.md
compares the alternatives.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# Exactly one of the two is linked.
CUDA_SOURCE = "csrc/cuda/launch.cu"
CUDA_ABSENT = "csrc/cuda/absent.cpp"
SOURCES = sorted(str(path) for path in Path("csrc").glob("**/*.cpp"))
NVCC_OPTIONS = "csrc/cuda/nvcc.options"
HEADERS = [CUDA_SOURCE, NVCC_OPTIONS, *sorted(str(path) for path in Path("csrc").glob("**/*.h"))]
FAILURE_NOTE = Path("fastkd/ops/_native_build_error.txt")
# Explicit, because compilers' defaults differ. csrc/cpu/vector.h prevents fusion where it would be harmful.
COMPILE_FLAGS = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fvisibility=hidden", "-g0"]


# GCC 12 emits thousands of warnings about uninitialised vectors in its own headers.
GCC_FLAGS = ["-Wno-psabi", "-Wno-ignored-attributes", "-Wno-maybe-uninitialized"]
# Compute capabilities to compile for, if nvcc supports them; with PTX for later devices.
CUDA_ARCHITECTURES = "80 90 100 120"


class CudaFailure(Exception):
    """The reason why the library is built without CUDA kernels."""


def check_environment() -> None:
    """Stop the build on an invalid value."""
    without = os.environ.get("FASTKD_WITHOUT_CUDA", "")
    if without not in ("", "0", "1"):
        sys.exit(f"the environment's FASTKD_WITHOUT_CUDA is {without!r}; expected 1, 0 or nothing")
    asked = os.environ.get("FASTKD_CUDA_ARCHS", "")
    if asked and (not re.fullmatch(r"\d+( \d+)*", asked) or min(map(int, asked.split())) < 80):
        sys.exit(
            f"the environment's FASTKD_CUDA_ARCHS is {asked!r}; expected numbers from 80 on, as in '80 90'"
        )


def find_nvcc() -> str:
    if os.environ.get("FASTKD_WITHOUT_CUDA", "") == "1":
        raise CudaFailure("FASTKD_WITHOUT_CUDA was set when it was built")
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            candidate = Path(os.environ[variable], "bin", "nvcc")
            if candidate.exists():
                return str(candidate)
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise CudaFailure("no CUDA compiler (nvcc) was found when it was built")
    return nvcc


def output_of(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise CudaFailure(f"{command[0]} does not run: {error}") from error
    if done.returncode != 0:
        last_lines = " ".join((done.stderr or done.stdout).strip().splitlines()[-3:])
        raise CudaFailure(f"{Path(command[0]).name} failed when it was built: {last_lines}")
    return done.stdout + done.stderr


def code_generation(nvcc: str) -> list[str]:
    """nvcc's -gencode flags. Two virtual architectures: without clusters (80) and with (90).

    Later devices compile the PTX of the largest one, if it has clusters: a library without them would
    run there and be launched in clusters.
    """
    asked = os.environ.get("FASTKD_CUDA_ARCHS")
    architectures = [int(number) for number in re.findall(r"\d+", asked or CUDA_ARCHITECTURES)]
    if not asked:
        known = output_of(nvcc, "--list-gpu-code").split()
        architectures = [number for number in architectures if f"sm_{number}" in known]
    flags = []
    for virtual, members in (
        (80, [number for number in architectures if number < 90]),
        (90, [number for number in architectures if number >= 90]),
    ):
        if members:
            codes = [f"sm_{number}" for number in members]
            if virtual == 90:
                codes.append("compute_90")
            flags.append(f"-gencode=arch=compute_{virtual},code=[{','.join(codes)}]")
    return flags


def compile_cuda(folder: str) -> tuple[list[str], list[str]]:
    """Compile the CUDA kernels; return object files and link flags."""
    nvcc, target = find_nvcc(), str(Path(folder, "launch.cuda.o"))
    output_of(nvcc, "--options-file", NVCC_OPTIONS, *code_generation(nvcc), "-c", CUDA_SOURCE, "-o", target)
    # Only nvcc knows the path of the static runtime.
    paths = re.findall(r'"(-L[^"]+)"', output_of(nvcc, "--dryrun", "-shared", target, "-o", "unused.so"))
    libraries = ["-lcudart_static", "-lrt", "-lpthread", "-ldl", "-Wl,--exclude-libs,ALL"]
    return [target], [*dict.fromkeys(paths), *libraries]


class BuildNative(build_ext):
    """Compiles the extension in parallel; a failure does not stop the install."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:  # e.g. no compiler, or an unknown platform
            self.note_failure(error)

    def build_extension(self, ext: Extension) -> None:
        if sys.platform not in ("linux", "darwin"):
            raise RuntimeError(f"the native backend is built on Linux and macOS, not on {sys.platform}")
        Path(self.build_temp).mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(max(2, os.cpu_count() or 1)) as pool:
            cuda = pool.submit(compile_cuda, self.build_temp)
            compiled = list(
                pool.map(self.compile, [source for source in ext.sources if source != CUDA_ABSENT])
            )
            objects = [path for paths in compiled for path in paths]
            try:
                cuda_objects, cuda_libraries = cuda.result()
                self.link(ext, objects + cuda_objects, cuda_libraries)
            except Exception as error:
                reason = (
                    str(error) if isinstance(error, CudaFailure) else f"its link with CUDA failed: {error}"
                )
                print(f"fastkd: the native library gets no CUDA kernels: {reason}", file=sys.stderr)
                literal = '"' + re.sub(r'[^ -~]|["\\\\]', "'", reason) + '"'
                self.link(ext, objects + self.compile(CUDA_ABSENT, [("FASTKD_CUDA_ABSENT", literal)]), [])

    def compile(self, source: str, macros: list[tuple[str, str]] | None = None) -> list[str]:
        flags = COMPILE_FLAGS + ([] if self.is_clang() else GCC_FLAGS)
        return self.compiler.compile(
            [source], output_dir=self.build_temp, macros=macros or [], extra_postargs=flags, depends=HEADERS
        )

    def link(self, ext: Extension, objects: list[str], libraries: list[str]) -> None:
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            extra_postargs=libraries + (["-ldl"] if sys.platform == "linux" else []),
            build_temp=self.build_temp,
            target_lang="c++",
        )

    def is_clang(self) -> bool:
        command = self.compiler.compiler_so[0] if getattr(self.compiler, "compiler_so", None) else ""
        return "clang" in os.path.basename(command) or sys.platform == "darwin"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []  # not a Python module: there is no PyInit function

    def note_failure(self, error: Exception) -> None:
        message = f"{type(error).__name__}: {error}"
        print(
            f"fastkd: the native backend was not built, the install continues without it ({message})",
            file=sys.stderr,
        )
        in_source = self.inplace or getattr(self, "editable_mode", False)
        target = FAILURE_NOTE if in_source else Path(self.build_lib, FAILURE_NOTE)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(message + "\n")
        self.extensions = []

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if os.path.exists(path)]


# A free-threaded Python has no limited API before 3.15, and setuptools refuses the tag there. The library
# does not use it: only the name of the wheel changes, to that of this Python alone.
LIMITED_API = not sysconfig.get_config_var("Py_GIL_DISABLED")

check_environment()
setup(
    ext_modules=[
        Extension("fastkd.ops._native", SOURCES, depends=HEADERS, language="c++", py_limited_api=LIMITED_API),
    ],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if LIMITED_API else {},
)
