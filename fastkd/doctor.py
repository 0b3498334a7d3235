"""``fastkd doctor``: which backends run on this machine, and what the others lack."""

from __future__ import annotations

import argparse
import platform
from importlib import metadata
from typing import Any

import torch

from fastkd.command import add_json, print_json
from fastkd.ops import backend
from fastkd.version import __version__

PACKAGES = ("torch", "triton", "torchvision", "numpy", "matplotlib", "pydantic")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    found = facts()
    if args.json:
        print_json(found)
    else:
        print(report(found))
    return 0


def facts() -> dict[str, Any]:
    """Versions, devices, and for each backend on each device whether it runs or what is missing."""
    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            gpus.append({"name": properties.name, "gib": round(properties.total_memory / 2**30)})
    backends: dict[str, dict[str, dict[str, Any]]] = {}
    for device in ("cpu", "cuda")[: 1 + torch.cuda.is_available()]:
        reasons = {name: backend.missing(name, device) for name in ("triton", "native", "eager")}
        backends[device] = {
            name: {"runs": reason is None, "detail": _detail(name, device) if reason is None else reason}
            for name, reason in reasons.items()
        }
    return {
        "fastkd": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "native_cuda_kernels": _cuda_kernels(),
        "current_backend": backend.get_backend(),
        "backends": backends,
        "auto": {device: backend.resolve("auto", device, torch.float32) for device in backends},
    }


def report(found: dict[str, Any] | None = None) -> str:
    """``found``, or the present ``facts()``, as text."""
    found = found or facts()
    lines = [f"fastkd {found['fastkd']}, Python {found['python']}, {found['platform']}"]
    lines.append("packages: " + ", ".join(f"{name} {text}" for name, text in found["packages"].items()))
    lines.append(f"CPU: {found['threads']} threads")
    lines += [f"GPU {index}: {gpu['name']}, {gpu['gib']} GiB" for index, gpu in enumerate(found["gpus"])]
    if not found["gpus"]:
        lines.append("GPU: none that torch can use")
    lines.append(f"native CUDA kernels: {found['native_cuda_kernels']}")
    lines.append(f"current backend: {found['current_backend']} (FASTKD_BACKEND or fastkd.set_backend)")
    for device, backends in found["backends"].items():
        lines.append(f"backends on {device}:")
        for name, of in backends.items():
            lines.append(f"  {name:7s} {'runs' if of['runs'] else 'no: '}{of['detail']}")
        lines.append(f"  auto takes {found['auto'][device]}")
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
    return "built" if absent is None else f"not built: {absent}"


def _detail(name: str, device: str) -> str:
    if name == "native":
        from fastkd.ops import native

        kernels = "CUDA" if device == "cuda" else native.instruction_set()
        return f" ({kernels} kernels, {native.library_path()})"
    if name == "triton" and device == "cpu":
        return " in Triton's interpreter: for tests, slow"
    return ""
