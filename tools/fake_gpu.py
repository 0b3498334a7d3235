"""A GPU for Triton's JIT where there is none: a driver that reports one, and a stub of libcuda.

Triton's interpreter and its ahead-of-time compiler skip parts of the JIT: the binder that is generated from
the parameter names, the specialisation of the arguments, the launcher in C. ``on_target`` lets the library
launch its kernels on CPU tensors as if they were on one of TARGETS. The memory is never accessed.

Import it before any kernel, so that the kernels are not defined for the interpreter.
"""

import atexit
import ctypes
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fastkd.ops.triton import launch as launcher

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
NVIDIA = Path(triton.__file__).parent / "backends/nvidia"


class Driver:
    """A fake driver with one device per target, so that the JIT caches kernels per target."""

    device = 0

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return list(TARGETS.values())[self.device]

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        from triton.backends.nvidia.driver import ty_to_cpp

        return ty_to_cpp(ty)

    @property
    def utils(self) -> Any:
        return self._nvidia().CudaUtils()

    @property
    def launcher_cls(self) -> Any:
        return self._nvidia().CudaLauncher

    @cache  # noqa: B019, there is one driver
    def _nvidia(self) -> Any:
        stub_libcuda()
        from triton.backends.nvidia import driver as nvidia

        return nvidia


@cache
def stub_libcuda() -> ctypes.CDLL:
    """A stub of libcuda whose functions succeed without effect, loaded and found by Triton's builds.

    ``fastkd_launches`` counts the launches."""
    folder = Path(tempfile.mkdtemp(prefix="fastkd-libcuda-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    texts = [(NVIDIA / name).read_text() for name in ("driver.c", "driver.py")]
    names = {name for text in texts for name in re.findall(r"\bcu[A-Z]\w+", text)}
    own = {
        "cuDeviceGetAttribute": "(int *value) { *value = 200 << 10; return 0; }",
        "cuFuncGetAttribute": "(int *value) { *value = 1024; return 0; }",
        "cuDriverGetVersion": "(int *value) { *value = 13000; return 0; }",
        "cuGetErrorString": '(int code, const char **text) { *text = "error"; return 0; }',
        "cuPointerGetAttribute": "(void **value, int which, void *pointer) { *value = pointer; return 0; }",
        "cuLaunchKernelEx": "(void) { ++fastkd_launches; return 0; }",
    }
    functions = (f"int {name}{own.get(name, '(void) { return 0; }')}" for name in sorted(names | set(own)))
    source, library = folder / "stub.c", folder / "libcuda.so.1"
    source.write_text("\n".join(["int fastkd_launches;", *functions]))
    command = ["cc", "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", "-o", str(library), str(source)]
    subprocess.run(command, check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


@contextmanager
def on_target(name: str) -> Iterator[Driver]:
    """Make ``name`` of TARGETS the current device, for Triton, for the planner and in ``torch.version``."""
    fake, target = Driver(), TARGETS[name]
    fake.device = list(TARGETS).index(name)
    driver.set_active(fake)
    hip, device_of = torch.version.hip, launcher.device_of
    torch.version.hip = "6.4" if target.backend == "hip" else None
    capability = divmod(target.arch, 10) if target.backend == "cuda" else (9, 4)
    launcher.device_of = lambda device: device_of(device)._replace(capability=capability)
    try:
        yield fake
    finally:
        torch.version.hip, launcher.device_of = hip, device_of
