"""The folder of what can be computed again at any time."""

from __future__ import annotations

import os
from pathlib import Path

from .paths import user_path


def cache_folder() -> Path:
    """``FASTKD_CACHE``, or by default ``fastkd`` in the user's cache folder."""
    if override := os.environ.get("FASTKD_CACHE"):
        return user_path(override)
    return user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "fastkd"
