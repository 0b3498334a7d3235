"""Peers compute what fastkd does, on what their name says; packages that are not here have a stand-in."""

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

import fastkd
from fastkd.bench import cases, peers
from fastkd.bench.cases import FASTKD, Case


@pytest.fixture
def liger(monkeypatch):
    """The two losses of Liger-Kernel by its documentation, in torch."""

    def kl(reduction):
        return lambda log_q, p: F.kl_div(log_q, p, reduction=reduction)

    def jsd(beta):
        def loss(log_q, log_p):
            p, q = log_p.exp(), log_q.exp()
            mixture = beta * p + (1 - beta) * q
            rows = beta * p * (log_p - mixture.log()) + (1 - beta) * q * (log_q - mixture.log())
            return rows.sum() / len(p)

        return loss

    for name, attributes in {"kl_div": {"LigerKLDIVLoss": kl}, "jsd": {"LigerJSD": jsd}}.items():
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, f"liger_kernel.transformers.{name}", module)
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))


@pytest.mark.parametrize("loss", ["kd", "jsd"])
def test_liger_computes_the_same_loss(loss, liger):
    inputs = cases.make_inputs(Case(loss, 8, 50, "float32", "forward"), "cpu")
    torch.testing.assert_close(peers.liger(loss)(*inputs), FASTKD[loss](*inputs), rtol=1e-4, atol=1e-5)
    assert peers.liger("dkd") is None


def test_variants_are_what_they_are_called(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda loss, **options: compiled.append((loss, options)) or loss)
    names = {"eager", "compiled", "fastkd-compiled", "fastkd-in-place"}
    found = peers.variants("kd", names, "cpu")
    assert list(found) == ["fastkd", "fastkd-compiled", "fastkd-in-place", "eager", "compiled"]
    assert found["fastkd"] is FASTKD["kd"]
    assert found["eager"] is peers.EAGER["kd"]
    (ours, plain), (again, in_place), (theirs, _) = compiled
    assert ours is again is FASTKD["kd"]
    assert theirs is peers.EAGER["kd"]
    assert plain == {"dynamic": False}
    (used,) = in_place["options"].values()
    assert isinstance(used, fastkd.ScaleInPlace)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_backends_beside_the_one_in_force(device, monkeypatch):
    """On a CPU not the same one twice; on a GPU ``fastkd`` takes either by shape, so both are beside it."""
    monkeypatch.setattr(peers, "in_force", lambda device: "native")
    monkeypatch.setitem(FASTKD, "kd", lambda *_: fastkd.get_backend())
    found = peers.variants("kd", {"native", "triton"}, device)
    beside = ["triton"] if device == "cpu" else ["native", "triton"]
    assert list(found) == ["fastkd", *beside]
    assert [found[name](1, 2, 3) for name in beside] == beside


def test_the_backend_in_force_is_the_one_that_is_set():
    with fastkd.use_backend("eager"):
        assert peers.in_force("cpu") == "eager"


@pytest.mark.parametrize(
    ("capability", "hip", "reason"),
    [
        ((9, 0), None, None),
        ((8, 9), None, "needs compute capability 9.0"),
        ((9, 4), "6.0", "NVIDIA GPUs only"),
    ],
)
def test_where_quack_runs(capability, hip, reason, monkeypatch):
    monkeypatch.setattr(peers, "missing_package", lambda package: None)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    absent = peers.not_measured("cuda")
    assert "liger" not in absent
    assert ("quack" in absent) == (reason is not None)
    assert (reason or "") in absent.get("quack", "")


def test_a_peer_that_does_not_import_says_so():
    def fails():
        raise OSError("libcudart.so: no such file")

    assert peers.made(fails) == "does not import: OSError: libcudart.so: no such file"
    assert peers.made(lambda: None) is None


def test_triton_on_a_cpu_is_not_measured():
    """Its interpreter, with which the tests run, takes minutes."""
    assert "GPUs only" in peers.not_measured("cpu")["triton"]
