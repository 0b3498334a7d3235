"""Fused knowledge-distillation losses for PyTorch, and a small, resumable trainer that uses them."""

from typing import TYPE_CHECKING, Any

from fastkd.backend import BackendUnavailable, get_backend, set_backend, use_backend
from fastkd.checks import check_labels
from fastkd.functional import (
    binary_kl_loss,
    binary_kl_norm_loss,
    dckd_loss,
    distill_loss,
    dkd_loss,
    jsd_loss,
    kd_loss,
    nkd_loss,
    reverse_kl_loss,
    ttm_loss,
)
from fastkd.losses import (
    BinaryKLLoss,
    BinaryKLNormLoss,
    DCKDLoss,
    DistillLoss,
    DKDLoss,
    JSDLoss,
    KDLoss,
    NKDLoss,
    ReverseKLLoss,
    TTMLoss,
)
from fastkd.ops.plan import explain
from fastkd.version import __version__

if TYPE_CHECKING:
    from fastkd.train import fit


__all__ = [
    "BackendUnavailable",
    "BinaryKLLoss",
    "BinaryKLNormLoss",
    "DCKDLoss",
    "DKDLoss",
    "DistillLoss",
    "JSDLoss",
    "KDLoss",
    "NKDLoss",
    "ReverseKLLoss",
    "TTMLoss",
    "__version__",
    "binary_kl_loss",
    "binary_kl_norm_loss",
    "check_labels",
    "dckd_loss",
    "distill_loss",
    "dkd_loss",
    "explain",
    "fit",
    "get_backend",
    "jsd_loss",
    "kd_loss",
    "nkd_loss",
    "reverse_kl_loss",
    "set_backend",
    "ttm_loss",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    # The trainer is imported on first use: who only swaps a loss needs none of its libraries.
    if name == "fit":
        from fastkd.train import fit

        return fit
    raise AttributeError(f"module 'fastkd' has no attribute {name!r}")
