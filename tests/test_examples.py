"""Every example runs, as a user starts it; those of packages that are not installed are skipped."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
ACCURACY = r"accuracy \d+\.\d %"
# Command line -> the package that it needs besides fastkd, and what it prints last.
COMMANDS = {
    "plain_loop.py --samples 500 --epochs 3": (None, ACCURACY),
    "language_model.py --steps 3": (None, "ms per step"),
    "class_parallel.py --steps 3": (None, r"step 3: ce \d+\.\d+, kd \d+\.\d+"),
    "fabric_loop.py --epochs 1": ("lightning_fabric", ACCURACY),
    "accelerate_loop.py --epochs 1": ("accelerate", ACCURACY),
    "timm_train.py --epochs 1": ("timm", "training " + ACCURACY),
    "torchdistill_yaml.py --epochs 1": ("torchdistill", ACCURACY),
    "torchdistill_yaml.py examples/torchdistill/dkd.yaml --epochs 1": ("torchdistill", ACCURACY),
}
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))


def run(*words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    # The interpreter's packages and this checkout, without installing it.
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )  # fmt: skip


def need(package: str | None) -> None:
    if package is not None and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


@pytest.mark.parametrize("command", COMMANDS)
def test_example(command: str) -> None:
    package, expected = COMMANDS[command]
    need(package)
    script, *options = command.split()
    done = run(EXAMPLES / script, *options)
    if "terminate called without an active exception" in done.stderr:
        # A thread of gloo's freed a tensor while Python ended, which torch does not prevent (pytorch#179291).
        done = run(EXAMPLES / script, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(expected, done.stdout.splitlines()[-1]), done.stdout


def test_timms_script_gets_the_task(tmp_path: Path) -> None:
    """timm's train.py is not part of its package: a script that imports the task as it does."""
    need("timm")
    script = tmp_path / "train.py"
    script.write_text(
        "import sys\nfrom timm.task import LogitDistillationTask as task\nprint(task, sys.argv[1:])\n"
    )
    done = run(EXAMPLES / "timm_train.py", script, "--model", "resnet18")
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "<class 'fastkd.integrations.timm.LogitDistillationTask'> ['--model', 'resnet18']\n"
    )


def test_every_script_is_run() -> None:
    assert {command.split()[0] for command in COMMANDS} == set(SCRIPTS)
    configs = {f"examples/torchdistill/{path.name}" for path in EXAMPLES.glob("torchdistill/*.yaml")}
    assert configs == {"examples/torchdistill/kd.yaml", "examples/torchdistill/dkd.yaml"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_is_short_and_names_its_package(script: str, tmp_path: Path) -> None:
    text = (EXAMPLES / script).read_text(encoding="utf-8")
    assert len(text.splitlines()) < 100
    head = "\n".join(text.splitlines()[:8])
    packages = {package for command, (package, _) in COMMANDS.items() if command.startswith(script)}
    for package in packages - {None}:
        assert f"pip install {package.replace('_', '-')}" in head.replace("'", "")
        # As if it were not installed: a module of that name that cannot be imported.
        blocked = tmp_path / f"{package}.py"
        blocked.write_text("raise ImportError('blocked')")
        (tmp_path / "lightning.py").write_text("raise ImportError('blocked')")
        done = run(EXAMPLES / script, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("this example needs ")
        assert "pip install" in done.stderr
    if packages == {None}:
        assert "Needs only fastkd" in text


def test_notebook_starts() -> None:
    """Its first cell, without Jupyter: the imports exist, and the data are found."""
    cells = json.loads((EXAMPLES / "glyphs.ipynb").read_text(encoding="utf-8"))["cells"]
    first = next("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    done = run("-c", first, MPLBACKEND="agg")
    assert done.returncode == 0, done.stderr
    assert "205 classes" in done.stdout


def test_notebook() -> None:
    nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(EXAMPLES / "glyphs.ipynb", as_version=4)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT)}})
    client.execute(env=environment)
    pictures = [
        o for cell in notebook.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})
    ]
    assert len(pictures) == 3


def test_notebook_is_committed_with_its_outputs() -> None:
    cells = json.loads((EXAMPLES / "glyphs.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert sum(len("".join(cell["source"]).splitlines()) for cell in code) < 100
    outputs = json.dumps([cell["outputs"] for cell in code])
    assert outputs.count('"image/png"') == 3
    assert "Traceback" not in outputs
    assert "Warning" not in outputs
