"""Shared by all tests: the backends that run on this machine, and a fixed seed."""

import os
import signal
import sys

# One torch thread per worker avoids oversubscription. Set before torch is imported, and inherited by
# subprocesses.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell ignores Ctrl-C in what it starts in the background, and so do the processes of tests about it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch
from filelock import FileLock

# Without a GPU the Triton kernels run in the interpreter, which must be selected before Triton is imported.
if sys.platform == "linux" and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import fastkd
from fastkd.ops import native
from fastkd.ops.backend import missing
from tests import cuda_emulation

# The first backward pass of a process starts autograd's threads: none on a CPU, but several once a tensor was
# fake (torch.compile, torch.export), and then no forked child can compute a gradient.
torch.ones(1, requires_grad=True).sum().backward()

FUSED = [("native", "cpu")]
if sys.platform == "linux":  # elsewhere fastkd does not require Triton
    FUSED.append(("triton", "cuda" if torch.cuda.is_available() else "cpu"))
# An extension built without nvcc has no kernels for GPUs; `fastkd doctor` says so.
if torch.cuda.is_available() and missing("native", "cuda") is None:
    FUSED.append(("native", "cuda"))
# Those that this processor runs beside the one that the suite uses; FASTKD_ISA selects one for a process.
LOWER_INSTRUCTION_SETS: list[str] = []
if missing("native", "cpu") is None:
    LEVELS = ["portable", "avx2", "avx512"]
    LOWER_INSTRUCTION_SETS = LEVELS[: LEVELS.index(native.instruction_set())]


def pytest_report_header():
    reason = missing("native", "cpu")
    if reason is not None:
        return f"native CPU kernels: none, {reason}"
    lower = ", ".join(LOWER_INSTRUCTION_SETS) or "none"
    return f"native CPU kernels: {native.instruction_set()}; lower ones for the matrix of losses: {lower}"


@pytest.fixture(autouse=True, scope="session")
def interpreter():
    """What speeds Triton's interpreter up, or None where the kernels are compiled."""
    if sys.platform != "linux" or os.environ.get("TRITON_INTERPRET") != "1":
        yield None
        return
    from tests import triton_interpreter

    with pytest.MonkeyPatch.context() as monkeypatch:
        triton_interpreter.speed_up(monkeypatch)
        yield monkeypatch


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _used(request):
    name, device = request.param
    reason = missing(name, device)
    # A failure rather than a skip, which would hide that nothing was tested.
    assert reason is None, f"{name} cannot run on {device}: {reason}"
    with fastkd.use_backend(name):
        yield device


def _fixture(backends):
    return pytest.fixture(params=backends, ids=[f"{name}-{device}" for name, device in backends])


@_fixture(FUSED)
def fused(request):
    """Run the test on a fused backend; return the device for its tensors."""
    yield from _used(request)


@_fixture([*FUSED, ("eager", FUSED[-1][1])])
def each_backend(request):
    """As ``fused``, and on the eager backend."""
    yield from _used(request)


@pytest.fixture(scope="session")
def emulated_library(tmp_path_factory):
    """The CUDA kernels compiled for the host, once for all processes of the session."""
    if cuda_emulation.COMPILER is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with FileLock(folder / "emulation.lock"):
        library = folder / "emulation.so"
        return library if library.exists() else cuda_emulation.build(library)


@pytest.fixture
def emulated(emulated_library, monkeypatch):
    """The emulated kernels as the native backend."""
    emulation = cuda_emulation.Emulation(emulated_library)
    monkeypatch.setattr(native, "row_loss", emulation.row_loss)
    monkeypatch.setattr(native, "scale_rows_", emulation.scale_rows_)
    with fastkd.use_backend("native"):
        yield emulation
