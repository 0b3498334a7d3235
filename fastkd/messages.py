"""Helpers for messages: lists of names, other errors in one line."""

from __future__ import annotations

import difflib
import itertools
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path


def some(items: Sequence[str], count: int = 5) -> str:
    """The first ``count`` items, and how many more there are."""
    more = f" and {len(items) - count} more" if len(items) > count else ""
    return ", ".join(items[:count]) + more


def one_line(error: BaseException) -> str:
    """The text of the error in one line, or its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of the error's text, or its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip()


def kind_and_text(error: BaseException) -> str:
    """``ValueError: its text`` in one line; only the type if there is no text."""
    kind, text = type(error).__name__, " ".join(str(error).split())
    return f"{kind}: {text}" if text else kind


def printable(text: str) -> str:
    """With escapes for the bytes of a file's name that are not UTF-8, which streams and log files refuse."""
    return text.encode("utf-8", "backslashreplace").decode()


def not_utf8(names: Iterable[str]) -> str | None:
    """The first name that has no UTF-8, such as that of a file with other bytes; None if there is none."""
    return next((name for name in names if name.encode("utf-8", "ignore").decode() != name), None)


def resume_command(folder: Path) -> str:
    """The command to paste that resumes the run or group in ``folder``."""
    return shlex.join(["fastkd", "train", "--resume", str(folder)])


def other_class(found: Sequence[str], expected: Sequence[str]) -> str | None:
    """The first label whose class has another name, in words; None if the names are equal."""
    for label, (is_, wanted) in enumerate(itertools.zip_longest(found, expected)):
        if is_ != wanted:
            there = "missing" if is_ is None else repr(is_)
            return f"class {label} is {there}, expected {'none' if wanted is None else repr(wanted)}"
    return None


def nearest(word: str, possible: Iterable[str]) -> str:
    """`` (did you mean a, b?)``, or an empty string if no name is similar."""
    possible = list(possible)
    # A bare option name (`epochs`) is far from `train.epochs` by edit distance.
    near = [name for name in possible if name.endswith((f".{word}", f"/{word}"))]
    near += [n for n in difflib.get_close_matches(word, possible, n=3, cutoff=0.6) if n not in near]
    return f" (did you mean {', '.join(near)}?)" if near else ""
