"""Result files: JSON lines, header first; written during the run, never over an existing file."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

import fastkd
from fastkd.bench import peers

Record = dict[str, Any]
# The fields of a record that name the case of a loss.
CASE = ("loss", "rows", "classes", "dtype", "pass")


class ResultFileError(Exception):
    """The result file exists already, is missing, or has another format."""


class Writer:
    """Appends records to a new file, one per line, and flushes each."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._file = path.open("x", encoding="utf-8")
        except FileExistsError:
            raise ResultFileError(f"{path} exists; results are never overwritten") from None

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, records: Iterable[Record]) -> None:
        for record in records:
            self._file.write(json.dumps(record) + "\n")
        self._file.flush()


def read(path: Path) -> tuple[Record, list[Record]]:
    """Return the header and the other records of a result file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines if line.strip()]
    except OSError as error:
        raise ResultFileError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise ResultFileError(f"{path} is no result file of `fastkd bench`: {error}") from None
    kinds = [record.get("kind") if isinstance(record, dict) else None for record in records]
    if kinds[:1] != ["header"] or None in kinds:
        raise ResultFileError(f"{path} is no result file of `fastkd bench`: its first line is no header")
    return records[0], records[1:]


def by_case(records: Iterable[Record]) -> dict[tuple, dict[str, Record]]:
    """The records of losses by case and variant."""
    found: dict[tuple, dict[str, Record]] = {}
    for record in records:
        found.setdefault(tuple(record[name] for name in CASE), {})[record["variant"]] = record
    return found


def name_of(case: tuple) -> str:
    """The case of a loss in words."""
    loss, rows, classes, dtype, mode = case
    return f"{loss} {rows} x {classes} {dtype} {mode}"


def header(device: str, not_measured: dict[str, str], **more: Any) -> Record:
    """Describe the device and the versions of a run."""
    about: Record = {
        "kind": "header",
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": device,
        "name": device_name(device),
        "fastkd": fastkd.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "backend": peers.in_force(device),
    }
    for package in ("triton", "liger-kernel", "quack-kernels", "trl", "orda-kernel"):
        try:
            about[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            about[package] = None
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        about.update(
            driver=_driver(),
            cuda=torch.version.cuda or torch.version.hip,
            memory=properties.total_memory,
            l2_cache=properties.L2_cache_size,
        )
    else:
        about["threads"] = torch.get_num_threads()
        about["cores"] = os.cpu_count()
        about["load"] = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
        if about["backend"] == "native":
            from fastkd.ops import native

            about["instruction_set"] = native.instruction_set()
    return {**about, "not_measured": not_measured, **more}


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _driver() -> str | None:
    """Return the NVIDIA driver's version, if nvidia-smi says it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return told.split("\n")[0].strip() or None
