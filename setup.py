"""Builds the native backend: one shared library that needs neither torch nor Python to build or to load.

It talks to torch through the stable C ABI (csrc/torch_abi.h), so an isolated build installs no second torch,
and one wheel serves every Python from 3.10 and every torch from 2.10. Where it cannot be built the install
goes on without it: `fastkd doctor` says what is missing, and the losses run on another backend.
docs/building.md weighs the alternatives.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = sorted(str(path) for path in Path("csrc").glob("**/*.cpp"))
HEADERS = sorted(str(path) for path in Path("csrc").glob("**/*.h"))
FAILURE_NOTE = Path("fastkd/ops/_native_build_error.txt")
# Fusion is set, not left to the compiler's default: csrc/cpu/vector.h guards where it would harm.
COMPILE_FLAGS = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fvisibility=hidden", "-g0"]


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
        flags = COMPILE_FLAGS + ([] if self.is_clang() else ["-Wno-psabi", "-Wno-ignored-attributes"])
        ext.extra_compile_args = flags
        ext.extra_link_args = ["-ldl"] if sys.platform == "linux" else []
        super().build_extension(ext)

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


setup(
    ext_modules=[
        Extension("fastkd.ops._native", SOURCES, depends=HEADERS, language="c++", py_limited_api=True),
    ],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
