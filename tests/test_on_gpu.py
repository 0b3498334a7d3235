"""benchmarks/on_gpu.sh with a program in place of Python: steps that fail, hang and succeed; its tables."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from fastkd.bench import paths
from fastkd.bench.report import write_report
from fastkd.bench.results import read
from fastkd.ops.plan import NATIVE_CLASSES

ROOT = Path(__file__).parents[1]
MEASURED = ROOT / "benchmarks/results/gpu-h200-paths-2026-11-26.jsonl"
BENCHMARKS = ["suite", "paths", "plans", "compiled", "steps", "throughput", "methods", "forms", "all"]
STEPS = ["unpack", "doctor", "check", "accuracy", "tests", *BENCHMARKS, "report"]
# Prints what it was called with; the check fails, the accuracy table never ends, a benchmark writes its file.
PYTHON = """#!/bin/bash
echo "called with $*"
all="$*"
output=${all##*--output }
case "$all" in
  "-c import xdist") exit 1;;
  *fastkd.check*) echo "no such device" >&2; exit 3;;
  *accuracy.py*) sleep 60;;
  *--report*"--output $FOLDER/"*) mkdir "$output"; echo "the tables" > "$output/report.md";;
  *"--output $FOLDER/"*) echo "{}" > "${output%% *}";;
esac
"""


@pytest.mark.parametrize("dry", ["", "1"])
def test_the_script_survives_a_step_that_fails_and_one_that_does_not_end(tmp_path, dry):
    program, out = tmp_path / "bin/python3", tmp_path / "out"
    program.parent.mkdir()
    program.write_text(PYTHON)
    program.chmod(0o755)
    path = f"{program.parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "DRY": dry, "FOLDER": str(out), "KERNELS": "k.tar.xz"}
    command = ["bash", "benchmarks/on_gpu.sh", str(out), "5"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=60)
    assert done.returncode == 1, done.stderr
    steps = [name for name in [*STEPS, "kernels"] if dry or name != "kernels"]
    status = {name: int((out / f"{name}.status").read_text()) for name in steps}
    assert status == {**dict.fromkeys(steps, 0), "check": 3, "accuracy": 124}
    assert "no such device" in done.stdout, "the end of a failing step's errors is shown"
    calls = {name: (out / f"{name}.txt").read_text() for name in steps}
    assert all(calls.values())
    assert all(f"--device {'cpu' if dry else 'cuda'}" in calls[name] for name in BENCHMARKS)
    files = re.search(r"--report (.*) --output", calls["report"])[1].split()
    assert [Path(file).stem for file in files] == ["suite", "paths", "compiled", "all", "steps", "forms"]
    assert done.stdout.rstrip().endswith("the tables")

    again = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=60)
    assert again.returncode == 1
    assert "File exists" in again.stderr


def test_the_choice_of_auto_from_measured_times(tmp_path):
    """From the committed record of an H200."""
    report = write_report([MEASURED], tmp_path / "report").read_text()
    assert f"There now: `{NATIVE_CLASSES}`" in report
    assert "    NATIVE_CLASSES = {('softmax', False): 8193," in report
    assert "- ('softmax', False), 2048 x 8192: kd 1.17, lskd 0.80" in report

    _, records = read(MEASURED)
    measured = paths.ratios(records)
    assert paths.fewest_classes(measured["softmax", False]) == 8193  # KD at 8192 is slower
    mixed = {(128, 100): {"a": 1.2}, (128, 1000): {"a": 0.9, "b": 1.1}, (128, 5000): {"a": 0.9}}
    assert paths.fewest_classes(mixed) == 1001
    assert paths.fewest_classes(mixed | {(4, 9000): {"a": 2.0}}) == 1001
    assert paths.fewest_classes({(128, 100): {"a": 0.8}}) == 100
    assert paths.fewest_classes({(128, 100): {"a": 0.8}, (128, 200): {"a": 1.0}}) is None
    assert paths.fewest_classes({(63, 100): {"a": 0.8}}) is None
    assert paths.section([record for record in records if record["variant"] != "native"]) == ""
