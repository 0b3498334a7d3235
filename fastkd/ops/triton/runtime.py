"""Whether the Triton kernels can run on a device: compiled on a GPU, interpreted on the CPU."""

import importlib.util
import os
import sys
from functools import cache

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
    return None


def interpreting() -> bool:
    """Whether kernels defined from now on are interpreted on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")
