"""Which backend runs a call: what is set, what each device has, and what was measured to be faster."""

import warnings

import pytest
import torch

import fastkd
from fastkd.ops import backend, plan

HALF, WIDE, DOUBLE = torch.bfloat16, torch.float32, torch.float64


def test_an_error_in_a_block_restores_the_backend():
    with fastkd.use_backend("native"):
        with pytest.raises(KeyError), fastkd.use_backend("eager"):
            raise KeyError
        assert fastkd.get_backend() == "native"


@pytest.mark.parametrize("dtypes", [(DOUBLE, WIDE), (WIDE, DOUBLE), (DOUBLE, DOUBLE)])
def test_one_dtype_that_no_kernel_takes_decides(dtypes):
    assert backend.resolve("auto", "cpu", *dtypes) == "eager"
    with pytest.raises(fastkd.BackendUnavailable, match=r"not torch\.float64"):
        backend.resolve("native", "cpu", *dtypes)
    assert backend.resolve("native", "cpu", WIDE, HALF) == "native"


@pytest.mark.parametrize(
    ("absent", "chosen", "warned"),
    [
        ({}, "triton", None),
        ({"triton": "no Triton"}, "native", None),
        ({"native": "no nvcc"}, "triton", None),
        (
            {"triton": "no Triton", "native": "no nvcc"},
            "eager",
            "no Triton; and native is not available: no nvcc",
        ),
    ],
)
def test_auto_on_a_gpu(absent, chosen, warned, monkeypatch):
    monkeypatch.setattr(backend, "missing", lambda name, device_type: absent.get(name))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert backend._automatic.__wrapped__("cuda") == chosen
        assert backend._automatic.__wrapped__("mps") == "eager"  # for which there are no kernels
    assert [warned in str(one.message) for one in caught] == ([True] if warned else [])


def test_devices_beyond_those_there_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert backend.checked_device("cuda:1", "device") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="device is 'cuda:2', but torch finds 2 CUDA devices here"):
        backend.checked_device("cuda:2", "device")


@pytest.fixture
def gpu(monkeypatch):
    """A GPU as it was measured; what of it a test changes."""
    found = {"capability": (9, 0), "missing": None}
    monkeypatch.setattr(backend, "missing", lambda name, device_type: found["missing"])
    monkeypatch.setattr(backend, "device_of", lambda device: plan.Device(132, found["capability"]))
    monkeypatch.setattr(backend, "native_may_be_faster", backend.native_may_be_faster.__wrapped__)
    return found


def faster(
    chosen="triton", device="cuda", rows=128, classes=8193, dtype=HALF, family="softmax", labelled=False
):
    return backend.faster_for(chosen, torch.device(device), family, labelled, rows, classes, dtype)


def test_auto_takes_native_where_it_was_measured_to_be_faster(gpu):
    with fastkd.use_backend("auto"):
        assert (
            faster()
            == faster(labelled=True, classes=4097)
            == faster(family="mixture", classes=4097)
            == "native"
        )
        assert faster(rows=127) == faster(classes=8192) == faster(labelled=True, classes=4096) == "triton"
        assert (
            faster(dtype=WIDE)
            == faster(family="pointwise", classes=100_000)
            == faster(device="cpu")
            == "triton"
        )
        assert faster(chosen="eager") == "eager"


@pytest.mark.parametrize("change", [{"capability": (10, 0)}, {"capability": (8, 0)}, {"missing": "no nvcc"}])
def test_auto_keeps_triton_on_other_gpus_and_without_native_kernels(gpu, change):
    gpu.update(change)
    with fastkd.use_backend("auto"):
        assert faster() == "triton"


def test_a_backend_asked_for_by_name_is_kept(gpu):
    with fastkd.use_backend("triton"):
        assert faster() == "triton"
