"""Durations in recipes, such as ``15min``."""

from __future__ import annotations


def seconds_of(text: str) -> float:
    """Seconds of ``"15min"``, ``"900s"`` or ``"2h"``. Raises ``ValueError``."""
    for unit, seconds in (("min", 60.0), ("s", 1.0), ("h", 3600.0)):
        number = text.removesuffix(unit)
        if number != text:
            try:
                value = float(number) * seconds
            except ValueError:
                break
            if 0 < value < float("inf"):
                return value
    raise ValueError(f"expected a number of steps, or a time such as 15min, 900s, 2h, got {text!r}")
