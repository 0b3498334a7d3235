"""Numbers that launchers leave in environment variables."""

from __future__ import annotations

import os

from .errors import RecipeError


def number(name: str, default: int) -> int:
    """Of ``name``, which may be unset or empty. Raises ``RecipeError`` that names the variable."""
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise RecipeError(f"the environment variable {name} is {text!r}; expected a number, or none")
    return value
