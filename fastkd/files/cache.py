"""The folder of what can be computed again at any time."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``FASTKD_CACHE``, or by default ``fastkd`` in the user's cache folder."""
    if override := os.environ.get("FASTKD_CACHE"):
        return Path(override).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fastkd"
