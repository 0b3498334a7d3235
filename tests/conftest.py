"""What every test shares: the backends that run on this machine, and a fixed seed."""

import os

# Beside another worker a second thread of torch waits for time slices; set before torch is imported, and
# inherited by the processes that tests start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# Where there is no GPU the Triton kernels run in its interpreter, which is chosen before Triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import fastkd
from fastkd.ops.backend import missing
from tests import cuda_emulation

FUSED = [("native", "cpu"), ("triton", "cuda" if torch.cuda.is_available() else "cpu")]
# Without a CUDA compiler at its build the extension has no kernels for GPUs; `fastkd doctor` says so.
if torch.cuda.is_available() and missing("native", "cuda") is None:
    FUSED.append(("native", "cuda"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=FUSED, ids=[f"{name}-{device}" for name, device in FUSED])
def fused(request):
    """A fused backend in force for the test; gives the device its tensors belong on."""
    name, device = request.param
    reason = missing(name, device)
    # A backend that cannot run is a failure, not a skip: it would hide that nothing was tested.
    assert reason is None, f"{name} cannot run on {device}: {reason}"
    with fastkd.use_backend(name):
        yield device


@pytest.fixture(scope="session")
def emulated_library(tmp_path_factory):
    """The CUDA kernels compiled for the host."""
    if cuda_emulation.COMPILER is None:
        pytest.skip("no C++ compiler")
    return cuda_emulation.build(tmp_path_factory.mktemp("emulation"))
