"""Numbers that launchers leave in environment variables."""

from __future__ import annotations

from fastkd import environment

from .errors import RecipeError


def number(name: str, default: int, least: int = 0) -> int:
    """Of ``name``, which may be unset or empty. Raises ``RecipeError`` that names the variable."""
    try:
        return environment.count(name, default, least)
    except ValueError as error:
        raise RecipeError(str(error)) from None
