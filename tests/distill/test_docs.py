"""Runs the example of a custom method in docs/own-method.md."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_own_method_of_the_docs_trains_from_a_recipe(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "own-method.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"<!-- own method.*?-->\n```python\n(.*?)```", text, re.DOTALL)
    assert len([line for line in code.split("class ")[1].splitlines() if line.strip()]) <= 10
    (tmp_path / "my_methods.py").write_text(code)
    command = [sys.executable, "-m", "fastkd", "train", "fashion-mnist/student"]
    options = ["method=my_methods:TTM", "method.gamma=0.5", "teacher.name=small_cnn", "teacher.width=4"]
    short = ["data.synthetic=8", "train.epochs=1", "train.device=cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    done = run(*options, *short)
    assert done.returncode == 0, done.stderr
    assert "ttm" in done.stdout
    (saved,) = tmp_path.glob("runs/*/recipe.yaml")
    assert "method: my_methods:TTM\n" in saved.read_text()
    wrong = run(*options, *short, "method.gama=0.5")
    assert (wrong.returncode, "did you mean method.gamma" in wrong.stderr) == (2, True)
