"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path


def user_path(path: str | os.PathLike[str]) -> Path:
    """The path with ``~`` expanded, which bash leaves in ``--runs=~/x``; an unknown ``~user`` is kept."""
    return Path(os.path.expanduser(path))
