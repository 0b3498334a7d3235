"""How messages list names and shorten what other code raised."""

from __future__ import annotations

from collections.abc import Sequence


def some(items: Sequence[str], count: int = 5) -> str:
    """The first ``count`` of them, and how many more there are."""
    more = f" and {len(items) - count} more" if len(items) > count else ""
    return ", ".join(items[:count]) + more


def one_line(error: BaseException) -> str:
    """Its text, or its kind where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def kind_and_text(error: BaseException) -> str:
    """``ValueError: its text``, in one line; the kind alone where there is no text."""
    kind, text = type(error).__name__, " ".join(str(error).split())
    return f"{kind}: {text}" if text else kind
