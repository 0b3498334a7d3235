"""Imports within fastkd follow the layers, have no cycles, and work in any order."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Lowest first: a module imports only from its own layer and from layers above it in this table. Names are
# modules and packages of fastkd.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("version", "environment", "errors", "imports", "messages", "files"),
    ("reference",),
    ("ops",),
    ("command",),
    ("losses",),
    ("explanation",),
    ("models",),
    ("distill",),
    ("recipe",),
    ("data",),
    ("train",),
    ("",),  # fastkd/__init__.py: the public names, of which `fit` is the trainer's
    ("integrations",),
    ("bench", "check", "doctor"),
    ("cli",),
    ("__main__",),
)


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted((ROOT / "fastkd").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(module: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of fastkd that ``module`` imports.

    Imports in functions and under ``if TYPE_CHECKING`` count: a cycle among them fails once one moves to the
    top of its file. Importing a module also imports its package; that counts only if the package's own names
    are used.
    """
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                target = f"{base}.{alias.name}"
                if target in known or base in known:
                    yield target if target in known else base


def graph() -> dict[str, set[str]]:
    known = modules()
    return {module: set(imports_of(module, path, known)) - {module} for module, path in known.items()}


def cycles(edges: dict[str, set[str]]) -> list[set[str]]:
    """Strongly connected components of more than one module, by Tarjan's algorithm."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in sorted(edges[module]):
            if other not in index:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            start = stack.index(module)
            component = set(stack[start:])
            del stack[start:]
            if len(component) > 1:
                found.append(component)

    for module in edges:
        if module not in index:
            visit(module)
    return found


def layer_of(module: str) -> int:
    name = module.partition(".")[2]
    for number, names in enumerate(LAYERS):
        if name.partition(".")[0] in names:
            return number
    raise AssertionError(f"{module} is in no layer: add it to LAYERS")


def test_no_cycle() -> None:
    assert cycles(graph()) == []


def test_a_cycle_is_found() -> None:
    edges = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}
    assert cycles(edges) == [{"b", "c"}]


def test_imports_follow_the_layers() -> None:
    wrong = [
        f"{module} imports {other}"
        for module, others in graph().items()
        for other in sorted(others)
        if layer_of(other) > layer_of(module)
    ]
    assert not wrong, "\n".join(wrong)


def test_layers_name_existing_modules() -> None:
    existing = {module.partition(".")[2].partition(".")[0] for module in modules()}
    assert not {name for names in LAYERS for name in names} - existing


def test_every_package_is_installed() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    packages = [module for module, path in modules().items() if path.name == "__init__.py"]
    assert [name for name in packages if f'"{name}"' not in text] == []


# Each module is imported in a forked process with nothing of fastkd imported. torch and other dependencies
# are imported once, before the forks.
IMPORT_EACH = """
import importlib, os, sys, traceback
for name in ("torch", "numpy", "triton", "torchvision", "pydantic", "rich.progress", "yaml", "torch._dynamo"):
    try:
        importlib.import_module(name)
    except ImportError:
        pass
assert not any(name.partition(".")[0] == "fastkd" for name in sys.modules)
failed = []
for module in sys.argv[1:]:
    child = os.fork()
    if not child:
        try:
            importlib.import_module(module)
        except BaseException as error:
            reason = error
            while reason is not None and not isinstance(reason, ModuleNotFoundError):
                reason = reason.__cause__
            if reason is not None and (reason.name or "fastkd").partition(".")[0] != "fastkd":
                os._exit(0)  # an optional library is not installed
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        failed.append(module)
sys.exit(", ".join(failed) or 0)
"""


def test_every_module_can_be_imported_first() -> None:
    names = [name for name in modules() if not name.endswith("__main__")]  # those are run, not imported
    command = [sys.executable, "-c", IMPORT_EACH, *names, "fastkd.no_such_module"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    # The last one shows that a failure is noticed.
    assert done.stderr.splitlines()[-1] == "fastkd.no_such_module", done.stderr
