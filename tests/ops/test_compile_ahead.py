"""tools/compile_ahead.py: kernels compiled here are found by a Triton whose library has other bytes."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
TOOL = str(ROOT / "tools/compile_ahead.py")
TEST = "tests/losses/test_losses.py::test_equal_logits_give_an_exactly_zero_gradient[triton-cpu-binary-kl]"
# Triton's key of its own library is another one; then the test launches its kernels.
ELSEWHERE = f"""
import sys

import pytest
from triton.runtime import cache

cache.triton_key = lambda: "of another Python"
sys.path.insert(0, {str(ROOT / "tools")!r})
import compile_ahead

if sys.argv[1] == "unpack":
    sys.argv[0] = {TOOL!r}
    compile_ahead.main()
else:
    compile_ahead.pretend("sm_90")
    sys.exit(pytest.main(["-q", "--assert=plain", "-p", "no:cacheprovider", {TEST!r}]))
"""


def run(*command, **environment):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment = {**kept, "TRITON_INTERPRET": "0", "PYTHONOPTIMIZE": "1", **environment}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300
    )


def test_kernels_are_found_and_not_compiled_again(tmp_path):
    archive, cache = tmp_path / "kernels.tar.xz", tmp_path / "cache"
    selected = "triton-cpu-binary-kl and not norm and test_equal_logits"
    packed = run(TOOL, "pack", str(archive), "--no-benchmarks", "--tests", selected)
    assert packed.returncode == 0, packed.stdout + packed.stderr
    with tarfile.open(archive) as tar:
        kernels = json.load(tar.extractfile("index.json"))["kernels"]
        assert {Path(name).suffix for name in tar.getnames()} == {".json", ".cubin"}
    assert len(kernels) >= 2

    unpacked = run("-c", ELSEWHERE, "unpack", str(archive), TRITON_CACHE_DIR=str(cache))
    assert unpacked.returncode == 0, unpacked.stdout + unpacked.stderr
    there = {path.parent.name for path in cache.glob("*/*.cubin")}
    assert len(there) == len(kernels)
    assert not there & set(kernels), "the folders are named after the library too"
    launched = run("-c", ELSEWHERE, "launch", TRITON_CACHE_DIR=str(cache))
    assert "1 passed" in launched.stdout, launched.stdout + launched.stderr
    assert {path.parent.name for path in cache.glob("*/*.cubin")} == there
    assert not list(cache.glob("*/*.ptx")), "which a compiler leaves"


def test_another_release_is_refused(tmp_path):
    archive, index = tmp_path / "kernels.tar.xz", tmp_path / "index.json"
    index.write_text(json.dumps({"triton": "3.1.0", "kernels": {}}))
    with tarfile.open(archive, "w:xz") as tar:
        tar.add(index, arcname="index.json")
    refused = run(TOOL, "unpack", str(archive), TRITON_CACHE_DIR=str(tmp_path / "cache"))
    assert refused.returncode == 1
    assert "is for Triton 3.1.0, not " in refused.stderr
