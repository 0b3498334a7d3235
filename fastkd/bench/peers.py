"""The peers that a loss is compared with, each as its users write it, and why one cannot run here."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd
from fastkd.bench.cases import FASTKD, Loss
from fastkd.ops import backend
from fastkd.ops.spec import CASES

# In the order of tables and pictures.
VARIANTS = (
    "fastkd", "native", "triton", "fastkd-compiled", "fastkd-in-place", "eager", "compiled", "liger", "quack",
)  # fmt: skip
# fastkd on its other fused backend.
BACKENDS = ("native", "triton")
# fastkd in compiled code, without and with its pass for Inductor; measured where they are asked for.
IN_COMPILED_CODE = ("fastkd-compiled", "fastkd-in-place")
T_KD, T_BINARY, T_STANDARDIZED = 4.0, 2.0, 2.0


def _kd(s: Tensor, t: Tensor, temperature: float) -> Tensor:
    log_q, p = F.log_softmax(s / temperature, 1), F.softmax(t / temperature, 1)
    return F.kl_div(log_q, p, reduction="none").sum(1).mean() * temperature**2


def eager_kd(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return _kd(s, t, T_KD)


def masked_dkd(s: Tensor, t: Tensor, y: Tensor, *, beta: float, temperature: float) -> Tensor:
    """DKD as it is widely used: masks, probabilities of two classes, -1000 on the label."""
    label = torch.zeros_like(s).scatter_(1, y[:, None], 1).bool()
    q, p = F.softmax(s / temperature, 1), F.softmax(t / temperature, 1)
    two_q, two_p = (torch.stack([(x * label).sum(1), (x * ~label).sum(1)], 1) for x in (q, p))
    tckd = F.kl_div(two_q.log(), two_p, reduction="sum") * temperature**2 / s.shape[0]
    rest_p = F.softmax(t / temperature - 1000.0 * label, 1)
    rest_q = F.log_softmax(s / temperature - 1000.0 * label, 1)
    return tckd + beta * F.kl_div(rest_q, rest_p, reduction="sum") * temperature**2 / s.shape[0]


def eager_dkd(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return masked_dkd(s, t, y, beta=8.0, temperature=T_KD)


def eager_binary_kl_norm(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """BinaryKL-Norm as released: both halves of a Bernoulli KL, clamped away from 0 and 1."""
    q = torch.sigmoid((s - t) / T_BINARY).clamp(1e-8, 1 - 1e-8)
    row = 0.5 * torch.log(0.5 / q) + 0.5 * torch.log(0.5 / (1 - q))
    return row.sum(1).mean() * T_BINARY**2


def eager_ce_kd(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return 0.1 * F.cross_entropy(s, y) + 0.9 * eager_kd(s, t, y)


def eager_lskd(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    s, t = ((z - z.mean(1, keepdim=True)) / (z.std(1, keepdim=True) + 1e-7) for z in (s, t))
    return _kd(s, t, T_STANDARDIZED)


def eager_jsd(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """JSD at beta 1/2 as the trainers of language models compute it."""
    log_q, log_p = F.log_softmax(s, -1), F.log_softmax(t, -1)
    log_m = torch.logsumexp(torch.stack([log_q, log_p]), dim=0) - math.log(2)
    teacher, student = (F.kl_div(log_m, z, reduction="none", log_target=True) for z in (log_p, log_q))
    return (0.5 * teacher + 0.5 * student).sum() / s.shape[0]


def eager_tvd(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return (F.softmax(t, -1) - F.softmax(s, -1)).abs().sum(-1).mean() / 2


def eager_skew_kl(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """KL(p || 0.1 p + 0.9 q) from log-probabilities."""
    log_q, log_p = F.log_softmax(s, -1), F.log_softmax(t, -1)
    log_m = torch.logaddexp(log_p + math.log(0.1), log_q + math.log(0.9))
    return (log_p.exp() * (log_p - log_m)).sum(-1).mean()


def _reference(name: str) -> Loss:
    """Return the specification of a case, in plain torch: for losses without a usual form above."""
    loss, case = CASES[name]
    return lambda s, t, y: loss.rows(s, t, y, *case.options)[0].mean()


_USUAL: dict[str, Loss] = {
    "kd": eager_kd,
    "dkd": eager_dkd,
    "binary-kl-norm": eager_binary_kl_norm,
    "ce-kd": eager_ce_kd,
    "lskd": eager_lskd,
    "jsd": eager_jsd,
    "tvd": eager_tvd,
    "skew-kl": eager_skew_kl,
}
EAGER: dict[str, Loss] = {name: _USUAL.get(name) or _reference(name) for name in FASTKD}


def liger(loss: str) -> Loss | None:
    """Return Liger-Kernel's loss with what its users write around it, or None if it lacks the loss."""
    if loss == "kd":
        from liger_kernel.transformers.kl_div import LigerKLDIVLoss

        kl: Callable[..., Tensor] = LigerKLDIVLoss(reduction="batchmean")
        return lambda s, t, y: kl(F.log_softmax(s / T_KD, 1), F.softmax(t / T_KD, 1)) * T_KD**2
    if loss == "jsd":
        from liger_kernel.transformers.jsd import LigerJSD

        jsd: Callable[..., Tensor] = LigerJSD(beta=0.5)
        return lambda s, t, y: jsd(F.log_softmax(s, -1), F.log_softmax(t, -1))
    return None


def quack(loss: str) -> Loss | None:
    """Return quack's cross-entropy for KD: what a kernel with one input and one output reaches."""
    if loss != "kd":
        return None
    from quack.cross_entropy import cross_entropy

    return lambda s, t, y: cross_entropy(s, y)


def _on_backend(name: str, loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with backend.use_backend(name):
            return loss(s, t, y)

    return run


def in_force(device: str) -> str:
    """Return the backend that the variant ``fastkd`` runs on."""
    return backend.resolve(backend.get_backend(), device, torch.float32)


def not_measured(device: str) -> dict[str, str]:
    """Return the peers that cannot run here, each with the reason."""
    reasons = {}
    for name in BACKENDS:
        reason = backend.missing(name, device)
        if (name, device) == ("triton", "cpu"):
            reasons[name] = "runs on GPUs only, this run is on the CPU"
        elif reason is not None:
            reasons[name] = reason
    for name, package in (("liger", "liger_kernel"), ("quack", "quack")):
        if device != "cuda":
            reasons[name] = "runs on GPUs only, this run is on the CPU"
        elif (reason := missing_package(package)) is not None:
            reasons[name] = reason
        elif torch.version.hip is not None and name == "quack":
            reasons[name] = "runs on NVIDIA GPUs only"
        elif name == "quack" and torch.cuda.get_device_capability()[0] < 9:
            reasons[name] = "needs compute capability 9.0 or later"
    return reasons


def variants(loss: str, peers: set[str], device: str) -> dict[str, Any]:
    """Return the variants of a loss: fastkd, and those of ``peers`` that have it.

    A peer whose import fails is represented by the error's text.
    """
    chosen: dict[str, Any] = {"fastkd": FASTKD[loss]}
    for name in BACKENDS:
        # On a GPU fastkd takes one or the other by shape: both are measured beside it.
        if name in peers and (device == "cuda" or name != in_force(device)):
            chosen[name] = _on_backend(name, FASTKD[loss])
    if "fastkd-compiled" in peers:
        chosen["fastkd-compiled"] = torch.compile(FASTKD[loss], dynamic=False)
    if "fastkd-in-place" in peers:
        in_place: dict[str, Any] = {"post_grad_custom_post_pass": fastkd.ScaleInPlace()}
        chosen["fastkd-in-place"] = torch.compile(FASTKD[loss], dynamic=False, options=in_place)
    if "eager" in peers:
        chosen["eager"] = EAGER[loss]
    if "compiled" in peers:
        chosen["compiled"] = torch.compile(EAGER[loss], dynamic=False)
    for name, make in (("liger", liger), ("quack", quack)):
        if name in peers and (peer := made(partial(make, loss))) is not None:
            chosen[name] = peer
    return chosen


def missing_package(package: str) -> str | None:
    return None if importlib.util.find_spec(package) else f"the package {package} is not installed"


def made(make: Callable[[], Any]) -> Any:
    """A peer's loss, None if it has none, or the error's text if its import fails."""
    try:
        return make()
    except Exception as error:  # a half-installed peer must not end the run
        return f"does not import: {type(error).__name__}: {error}"
