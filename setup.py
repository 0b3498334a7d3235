"""Builds the native backend: one shared library that needs neither torch nor Python to build or to load.

It talks to torch through the stable C ABI (csrc/torch_abi.h), so an isolated build installs no second torch,
and one wheel serves every Python from 3.10 and every torch from 2.10. Where it cannot be built the install
goes on without it: `fastkd doctor` says what is missing, and the losses run on another backend.
The CUDA kernels join it where nvcc is found; where they cannot be compiled, the library is built without them
and says why. docs/building.md weighs the alternatives.
"""

import os
import re
import shutil
import subprocess
import sys
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
# Fusion is set, not left to the compiler's default: csrc/cpu/vector.h guards where it would harm.
COMPILE_FLAGS = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fvisibility=hidden", "-g0"]


# GCC 12 warns thousands of times of its own headers' deliberately uninitialised vectors.
GCC_FLAGS = ["-Wno-psabi", "-Wno-ignored-attributes", "-Wno-maybe-uninitialized"]
# Binaries by compute capability, where the compiler knows them, and PTX for later devices.
CUDA_ARCHITECTURES = "80 90 100 120"


class CudaFailure(Exception):
    """Why there will be no CUDA kernels."""


def check_environment() -> None:
    """A value that is not understood stops the build, rather than building something else."""
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
    """nvcc's flags for the architectures asked for. Two virtual ones serve all: with clusters and without."""
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
            codes = [f"sm_{number}" for number in members] + [f"compute_{virtual}"] * (
                max(architectures) in members
            )
            flags.append(f"-gencode=arch=compute_{virtual},code=[{','.join(codes)}]")
    return flags


def compile_cuda(folder: str) -> tuple[list[str], list[str]]:
    """The object file of the CUDA kernels and what it is linked with."""
    nvcc, target = find_nvcc(), str(Path(folder, "launch.cuda.o"))
    output_of(nvcc, "--options-file", NVCC_OPTIONS, *code_generation(nvcc), "-c", CUDA_SOURCE, "-o", target)
    # Where the static runtime lies, nvcc alone knows.
    places = re.findall(r'"(-L[^"]+)"', output_of(nvcc, "--dryrun", "-shared", target, "-o", "unused.so"))
    libraries = ["-lcudart_static", "-lrt", "-lpthread", "-ldl", "-Wl,--exclude-libs,ALL"]
    return [target], [*dict.fromkeys(places), *libraries]


class BuildNative(build_ext):
    """Compiles the extension, with as many processes as there are cores, and survives a failure."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:  # no compiler, an old one, an unknown platform: the install must go on
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
        return []  # a plain shared library: there is no PyInit function to export

    def note_failure(self, error: Exception) -> None:
        message = f"{type(error).__name__}: {error}"
        print(
            f"fastkd: the native backend was not built, the install goes on without it ({message})",
            file=sys.stderr,
        )
        beside_the_source = self.inplace or getattr(self, "editable_mode", False)
        target = FAILURE_NOTE if beside_the_source else Path(self.build_lib, FAILURE_NOTE)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(message + "\n")
        self.extensions = []

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if os.path.exists(path)]


check_environment()
setup(
    ext_modules=[
        Extension("fastkd.ops._native", SOURCES, depends=HEADERS, language="c++", py_limited_api=True),
    ],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
