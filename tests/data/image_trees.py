"""Real JPEG files for tests, made by tools/make_imagefolder.py."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def load_script(name: str) -> ModuleType:
    """A module of the folder ``tools``, which is no package."""
    path = Path(__file__).resolve().parents[2] / "tools" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


SCRIPT = load_script("make_imagefolder")


def make_tree(folder: Path, classes: int = 3, train: int = 4, val: int = 2) -> Path:
    SCRIPT.make_tree(folder, classes, train, val, scale=0.15)
    return folder


def make_shards(folder: Path, classes: int = 3, train: int = 4, val: int = 2) -> Path:
    SCRIPT.make_shards(folder, classes, train, val, 2, scale=0.15)
    return folder
