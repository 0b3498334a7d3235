"""Reading environment variables strictly: an unknown value is an error, an empty one counts as unset."""

from __future__ import annotations

import os
from collections.abc import Sequence


class EnvironmentValueError(ValueError):
    """An environment variable has a value that fastkd does not know."""


def check_choice(variable: str, value: str, allowed: Sequence[str]) -> None:
    """Raise ``EnvironmentValueError`` unless the variable's ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise EnvironmentValueError(
            f"the environment's {variable} is {value!r}; expected one of {', '.join(allowed)}, or nothing"
        )


def count(variable: str, default: int, least: int = 0) -> int:
    """Return the variable's value, an integer from ``least`` on; ``default`` if it is unset or empty."""
    value = os.environ.get(variable, "")
    if not value.strip():
        return default
    if not value.isascii() or not value.isdecimal() or int(value) < least:
        raise EnvironmentValueError(
            f"the environment's {variable} is {value!r}; expected an integer from {least} on, or nothing"
        )
    return int(value)
