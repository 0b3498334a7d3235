"""Launches of the Triton kernels through the JIT's binder, specialisation, compiler and launcher.

Without a GPU, in separate processes: in this one the kernels are defined for Triton's interpreter, which
skips all of these.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from fastkd.ops.triton import launch_options

ROOT = Path(__file__).parents[2]


def run_tool(name: str, *arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "tools" / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_launches_are_bound_and_specialised(target):
    """Every 17th of 280,000: no argument has a multiple of 17 values. `.ci/run` binds them all."""
    run_tool("jit_launches.py", "--bind", "17", "--target", target)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_launches_with_every_value_of_every_argument_are_compiled(target):
    """And for NVIDIA launched into a stub of libcuda. `FULL=1 .ci/run` covers all pairs of values."""
    output = run_tool("jit_launches.py", "--compile", "1", "--target", target)
    if target == "sm_90":
        assert " 0 launched" not in output


def test_a_compiled_kernel_is_launched_without_the_jit():
    """Which takes a quarter of the host's time, for each kernel that is launched directly."""
    if not launch_options._KNOWN:
        pytest.skip("by Triton's JIT with this release, or on this GPU")
    *_, row = run_tool("host_time.py", "--losses", "kd").splitlines()
    name, launch, jit, *_ = row.strip("| ").split(" | ")
    assert name == "kd"
    assert float(launch) < 0.6 * float(jit)
