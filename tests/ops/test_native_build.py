"""The extension's build: the declared torch ABI, every instruction set, a wheel for any Python and torch."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from fastkd.ops import native
from tests.cases import CASES
from tests.conftest import LOWER_INSTRUCTION_SETS

ROOT = Path(__file__).parents[2]
# The first is the one that a build here takes.
COMPILERS = [os.environ["CXX"]] if os.environ.get("CXX") else []
COMPILERS += [path for name in ("g++", "clang++") if (path := shutil.which(name)) and path not in COMPILERS]
COMPILER = COMPILERS[0] if COMPILERS else "c++"


def test_the_declared_abi_is_torchs_own(tmp_path):
    """Both declarations in one source file: a differing signature is a compile error."""
    source = tmp_path / "both.cpp"
    source.write_text('#include <torch/csrc/stable/c/shim.h>\n#include "torch_abi.h"\n')
    include = Path(torch.__file__).parent / "include"
    command = [
        COMPILER,
        "-std=c++20",
        "-fsyntax-only",
        "-DUSE_CUDA",
        f"-I{include}",
        f"-I{ROOT / 'csrc'}",
        source,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    declared = (ROOT / "csrc/torch_abi.h").read_text()
    source.write_text('#include <torch/csrc/stable/c/shim.h>\n#include "changed.h"\n')
    for ours, wrong in (
        ("int64_t* ret_numel", "int32_t* ret_numel"),
        ("void** ret_stream", "void* ret_stream"),
    ):
        assert ours in declared
        (tmp_path / "changed.h").write_text(declared.replace(ours, wrong))
        assert subprocess.run(command, capture_output=True).returncode != 0, "a wrong declaration compiled"


@pytest.mark.parametrize("instruction_set", LOWER_INSTRUCTION_SETS)
def test_the_matrix_of_losses_at_every_lower_instruction_set(instruction_set):
    """The rest of the suite runs only the fastest one. All cases, dtypes, tails, layouts and reductions."""
    command = [sys.executable, "-m", "pytest", "tests/losses/test_losses.py", "-k", "native-cpu"]
    command += ["-p", "no:cacheprovider"]
    environment = {**os.environ, "FASTKD_ISA": instruction_set}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert f"native CPU kernels: {instruction_set}" in done.stdout
    passed = re.search(r"(\d+) passed", done.stdout)
    assert int(passed[1]) > 30 * len(CASES)


@pytest.mark.parametrize("instruction_set", [*LOWER_INSTRUCTION_SETS, ""], ids=lambda name: name or "fastest")
def test_half_conversions_are_torchs(instruction_set):
    """All 65,536 half values: converted in software, or by instructions.

    That of AVX-512 for bfloat16 writes 0 for a subnormal number.
    """
    code = """
import torch
from fastkd.ops import native
bits = torch.arange(65536, dtype=torch.int32).to(torch.int16)
for dtype in (torch.float16, torch.bfloat16):
    values = bits.view(dtype)
    values = values[~values.isnan()].view(1, -1)
    for factor in (-1.0, 0.3, 1e-3, 1.5):  # of the last, half the products are ties
        scaled = values.clone()
        native.scale_rows_(scaled, torch.tensor([factor]))
        exact = values.float() * factor
        expected, subnormal = exact.to(dtype), exact.abs() < torch.finfo(dtype).tiny
        if dtype == torch.bfloat16 and (scaled[subnormal] == 0).all():
            scaled[subnormal] = expected[subnormal] = 0
        assert torch.equal(scaled, expected), (dtype, factor)
    nans = torch.tensor([0x7FC0, 0x7F81, -1, -0x7F], dtype=torch.int16).view(dtype).view(1, -1)
    if dtype == torch.bfloat16:
        native.scale_rows_(nans, torch.tensor([0.5]))
        assert nans.isnan().all()
"""
    environment = {**os.environ, "FASTKD_ISA": instruction_set}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


def test_what_is_missing_on_a_gpu_is_reported():
    assert native.missing("mps") == "it runs on CPUs and CUDA devices, not on mps"
    absent = native.cuda_kernels_absent()
    reason = native.missing("cuda")
    if absent is not None:
        assert reason == f"its extension has no CUDA kernels: {absent}"
    elif not torch.cuda.is_available():
        without = torch.version.cuda is None
        assert reason == ("this torch is built without CUDA" if without else "torch finds no CUDA device")
    dispatched = torch._C._dispatch_has_kernel_for_dispatch_key("fastkd_native::row_loss", "CUDA")
    assert dispatched == (absent is None and torch.version.cuda is not None)


def test_the_library_needs_neither_torch_nor_python():
    if not shutil.which("readelf"):
        pytest.skip("readelf is not installed")
    needed = subprocess.run(
        ["readelf", "-d", str(native.library_path())], capture_output=True, text=True, check=True
    ).stdout
    assert "libtorch" not in needed
    assert "libpython" not in needed


@pytest.fixture
def source_tree(tmp_path):
    """A copy of the build's inputs, so that builds do not write to the checkout."""
    tree = tmp_path / "source"
    for name in ("csrc", "fastkd", "recipes"):
        shutil.copytree(
            ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "*build_error*")
        )
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    return tree


def build_wheel(tree: Path, destination: Path, **environment: str) -> tuple[zipfile.ZipFile, str]:
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(destination)],
        capture_output=True, text=True, cwd=tree, env={**os.environ, **environment}, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = destination.glob("*.whl")
    return zipfile.ZipFile(wheel), done.stdout + done.stderr


@pytest.mark.parametrize("compiler", COMPILERS, ids=lambda path: Path(path).name)
def test_the_wheel_serves_every_python_and_torch(source_tree, tmp_path, compiler):
    """Also if the CUDA compiler fails: the CPU kernels are built, and the library records the reason."""
    broken = tmp_path / "cuda/bin/nvcc"
    broken.parent.mkdir(parents=True)
    broken.write_text("#!/bin/sh\necho 'no \"host\" compiler' >&2\nexit 1\n")
    broken.chmod(0o755)
    fast = tmp_path / Path(compiler).name  # to compile: the code is not run
    fast.write_text(f'#!/bin/sh\nexec {compiler} "$@" -O0\n')
    fast.chmod(0o755)
    variables = {"CUDA_HOME": str(tmp_path / "cuda"), "CC": str(fast), "CXX": str(fast)}
    wheel, output = build_wheel(source_tree, tmp_path / "dist", **variables)
    assert "the native library gets no CUDA kernels: nvcc failed" in output
    wheel.extractall(tmp_path / "site")
    (library,) = (tmp_path / "site/fastkd/ops").glob("_native*.so")
    absent = ctypes.CDLL(str(library)).fastkd_cuda_absent
    absent.restype = ctypes.c_char_p
    assert absent() == b"nvcc failed when it was built: no 'host' compiler"

    names = wheel.namelist()
    assert "-cp310-abi3-" in Path(wheel.filename).name
    assert any(name.endswith("fastkd/ops/_native.abi3.so") for name in names)
    assert any(name.endswith("recipes/glyphs/kd.yaml") for name in names)


FREE_THREADED = """
import setuptools, sys, sysconfig
sysconfig.get_config_vars()["Py_GIL_DISABLED"] = int(sys.argv[1])
from distutils.core import run_setup
wheel = run_setup("setup.py", ["bdist_wheel"], stop_after="commandline").get_command_obj("bdist_wheel")
wheel.ensure_finalized()
print(wheel.py_limited_api)
"""


@pytest.mark.parametrize(("free_threaded", "tag"), [("0", "cp310"), ("1", "False")])
def test_a_free_threaded_python_gets_a_wheel_of_its_own(source_tree, free_threaded, tag):
    """setuptools refuses the limited API's tag there. Simulated by the variable that setup.py reads."""
    command = [sys.executable, "-c", FREE_THREADED, free_threaded]
    done = subprocess.run(command, capture_output=True, text=True, cwd=source_tree)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == tag


@pytest.mark.parametrize(
    ("name", "value"),
    [("FASTKD_WITHOUT_CUDA", "no"), ("FASTKD_CUDA_ARCHS", "sm_80"), ("FASTKD_CUDA_ARCHS", "80,90")],
)
def test_an_invalid_variable_stops_the_build(source_tree, tmp_path, name, value):
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", str(tmp_path / "temp")],
        capture_output=True, text=True, cwd=source_tree, env={**os.environ, name: value},
    )  # fmt: skip
    assert done.returncode != 0
    assert f"the environment's {name} is '{value}'; expected" in done.stderr
    assert not (tmp_path / "temp").exists()


@pytest.mark.parametrize(
    ("architectures", "flags"),
    [
        ("80 89", ["-gencode=arch=compute_80,code=[sm_80,sm_89]"]),
        ("90", ["-gencode=arch=compute_90,code=[sm_90,compute_90]"]),
        (
            "120 80",
            ["-gencode=arch=compute_80,code=[sm_80]", "-gencode=arch=compute_90,code=[sm_120,compute_90]"],
        ),
    ],
)
def test_code_without_clusters_is_not_there_for_devices_that_have_them(architectures, flags):
    """The driver would compile PTX of 8.0 for a 9.0, where rows are given to clusters."""
    code = "import setuptools; setuptools.setup = dict; import setup; print(setup.code_generation(''))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "FASTKD_CUDA_ARCHS": architectures},
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == str(flags), done.stderr


def test_without_a_compiler_the_install_succeeds_and_reports_it(source_tree, tmp_path):
    wheel, output = build_wheel(
        source_tree,
        tmp_path / "dist",
        CC="/no/such/compiler",
        CXX="/no/such/compiler",
        FASTKD_WITHOUT_CUDA="1",
    )
    assert "the native backend was not built, the install continues without it" in output
    site = tmp_path / "site"
    wheel.extractall(site)
    code = "import fastkd; from fastkd import doctor; print(fastkd.__file__); print(doctor.report())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(site)},
    )  # fmt: skip
    assert str(site) in done.stdout, done.stderr
    assert "native  no: its extension could not be built when fastkd was installed" in done.stdout
