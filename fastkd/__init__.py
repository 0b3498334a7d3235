"""Fused knowledge-distillation losses for PyTorch, and a small, resumable trainer that uses them."""

from typing import TYPE_CHECKING, Any

from fastkd import losses
from fastkd.explanation import explain
from fastkd.losses import *  # noqa: F403
from fastkd.losses.arguments import check_labels
from fastkd.ops.backend import BackendUnavailable, get_backend, set_backend, use_backend
from fastkd.version import __version__

__all__ = [
    "BackendUnavailable",
    "__version__",
    "check_labels",
    "explain",
    "fit",
    "get_backend",
    "set_backend",
    "use_backend",
]
__all__ += losses.__all__

if TYPE_CHECKING:
    from fastkd.train import fit
else:

    def __getattr__(name: str) -> Any:
        # The trainer is imported on first use: a program that only uses a loss needs none of its libraries.
        if name == "fit":
            from fastkd.train import fit

            return fit
        raise AttributeError(f"module 'fastkd' has no attribute {name!r}")
