"""Fused knowledge-distillation losses for PyTorch, and a small, resumable trainer that uses them."""

from typing import TYPE_CHECKING, Any

from fastkd.version import __version__

__all__ = [
    "BackendUnavailable",
    "BinaryKLLoss",
    "BinaryKLNormLoss",
    "DCKDLoss",
    "DKDLoss",
    "DistillLoss",
    "JSDLoss",
    "KDLoss",
    "LinearDistillLoss",
    "LinearLogits",
    "Loaded",
    "NKDLoss",
    "ReverseKLLoss",
    "ScaleInPlace",
    "ShardedLogits",
    "SkewKLLoss",
    "TTMLoss",
    "TVDLoss",
    "TopKLogits",
    "ValidationTransform",
    "__version__",
    "binary_kl_loss",
    "binary_kl_norm_loss",
    "check_labels",
    "check_top_k",
    "dckd_loss",
    "distill_loss",
    "dkd_loss",
    "explain",
    "fit",
    "get_backend",
    "jsd_loss",
    "kd_loss",
    "load",
    "nkd_loss",
    "reverse_kl_loss",
    "set_backend",
    "skew_kl_loss",
    "top_k",
    "ttm_loss",
    "tvd_loss",
    "use_backend",
]

if TYPE_CHECKING:
    from fastkd.data.validation import ValidationTransform
    from fastkd.explanation import explain
    from fastkd.losses import *  # noqa: F403
    from fastkd.losses.arguments import check_labels
    from fastkd.ops.backend import BackendUnavailable, get_backend, set_backend, use_backend
    from fastkd.ops.inductor import ScaleInPlace
    from fastkd.train import fit
    from fastkd.train.loading import Loaded, load
else:
    # Imported on first use, so that `fastkd --help` does not wait for torch, and a program that only uses a
    # loss needs none of the trainer's libraries.
    _NAMES = {
        "explain": "explanation",
        "check_labels": "losses.arguments",
        "BackendUnavailable": "ops.backend",
        "get_backend": "ops.backend",
        "set_backend": "ops.backend",
        "use_backend": "ops.backend",
        "ScaleInPlace": "ops.inductor",
        "fit": "train",
        "Loaded": "train.loading",
        "load": "train.loading",
        "ValidationTransform": "data.validation",
    }

    def __getattr__(name: str) -> Any:
        from importlib import import_module, util

        if name.startswith("__"):  # asked for by the import system
            raise AttributeError(f"module 'fastkd' has no attribute {name!r}")
        if name in _NAMES:
            found = getattr(import_module(f"fastkd.{_NAMES[name]}"), name)
        elif name not in __all__:
            # Submodules need no import of their own, as if the losses had imported them.
            if util.find_spec(f"fastkd.{name}") is None:
                raise AttributeError(f"module 'fastkd' has no attribute {name!r}")
            return import_module(f"fastkd.{name}")
        else:
            found = getattr(import_module("fastkd.losses"), name)
        globals()[name] = found
        return found

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
