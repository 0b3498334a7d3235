"""Whether the Triton kernels can run on a device: compiled on a GPU, interpreted on the CPU."""

import importlib.util
import os
import re
import sys
from functools import cache
from importlib import metadata

import torch


@cache
def missing(device_type: str) -> str | None:
    """Why the Triton kernels cannot run on this type of device, or None.

    On the CPU they run slowly, in Triton's interpreter: for tests and debugging. The interpreter is selected
    by an environment variable that Triton reads at import; this function sets it if there is no GPU and
    Triton is not imported yet.
    """
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (`pip install triton`)"
    if device_type == "cuda":
        if interpreting():
            return "TRITON_INTERPRET is set, and the interpreter works on CPU tensors"
        return None
    if device_type != "cpu":
        return f"the kernels are written for CUDA and ROCm GPUs, not for {device_type}"
    if "triton" not in sys.modules and "TRITON_INTERPRET" not in os.environ and not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    if not interpreting():
        return "on CPU tensors Triton only interprets; set TRITON_INTERPRET=1 before Python starts"
    return numpy_too_new(_version("triton"), _version("numpy"))


def numpy_too_new(triton: str, numpy: str) -> str | None:
    """Until Triton 3.7 the interpreter converts arrays of one element to int, an error since NumPy 2.4."""
    if not triton or _release(triton) >= (3, 7) or _release(numpy) < (2, 4):
        return None
    return f"the interpreter of Triton {triton} needs NumPy < 2.4, not {numpy} (`pip install 'numpy<2.4'`)"


def _version(package: str) -> str:
    """Empty if it is installed under another name, as for ROCm: then nothing is known to be wrong."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _release(version: str) -> tuple[int, ...]:
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return tuple(map(int, numbers.groups())) if numbers else ()


def interpreting() -> bool:
    """Whether kernels defined from now on are interpreted on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")
