"""``fastkd doctor``: which backends run on this machine, and what the others lack."""

import platform
from importlib import metadata

import torch

from fastkd.ops import backend
from fastkd.version import __version__

PACKAGES = ("torch", "triton", "torchvision", "numpy", "matplotlib", "pydantic")


def report() -> str:
    """Return versions, devices, and for each backend on each device whether it runs or what is missing."""
    lines = [f"fastkd {__version__}, Python {platform.python_version()}, {platform.platform()}"]
    lines.append("packages: " + ", ".join(f"{name} {_version(name)}" for name in PACKAGES))
    lines.append(f"CPU: {torch.get_num_threads()} threads")
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            memory = properties.total_memory / 2**30
            lines.append(f"GPU {index}: {properties.name}, {memory:.0f} GiB")
    else:
        lines.append("GPU: none that torch can use")
    lines.append(f"native CUDA kernels: {_cuda_kernels()}")
    lines.append(f"current backend: {backend.get_backend()} (FASTKD_BACKEND or fastkd.set_backend)")
    for device in devices:
        lines.append(f"backends on {device}:")
        for name in ("triton", "native", "eager"):
            reason = backend.missing(name, device)
            lines.append(
                f"  {name:7s} {'runs' + _detail(name, device) if reason is None else 'no: ' + reason}"
            )
        chosen = backend.resolve("auto", device, torch.float32)
        lines.append(f"  auto takes {chosen}")
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cuda_kernels() -> str:
    from fastkd.ops import native

    if native.missing("cpu") is not None:
        return "none, the extension is missing"
    absent = native.cuda_kernels_absent()
    return "built, untested on hardware" if absent is None else f"not built: {absent}"


def _detail(name: str, device: str) -> str:
    if name == "native":
        from fastkd.ops import native

        kernels = "CUDA" if device == "cuda" else native.instruction_set()
        return f" ({kernels} kernels, {native.library_path()})"
    if name == "triton" and device == "cpu":
        return " in Triton's interpreter: for tests, slow"
    return ""
