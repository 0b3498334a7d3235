"""The trainer. Imported lazily, because the losses need none of its libraries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .evaluation import evaluate
    from .loop import FitResult, fit, fit_method
    from .watcher import Watcher

__all__ = ["FitResult", "Watcher", "evaluate", "fit", "fit_method"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from . import loop

        return getattr(loop, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
