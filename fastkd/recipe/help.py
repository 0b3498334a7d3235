"""The text of ``fastkd train RECIPE --help``: every key of a recipe, its value, type, default and meaning."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import Any

from .files import dump_scalar, find_recipe, parse_flat_yaml
from .keys import REQUIRED, Key, keys_of
from .schema import choices
from .sections import Recipe

_INDENT = 8


def help_text(name_or_path: str, overrides: Iterable[str], recipe: Recipe, width: int) -> str:
    """``width``: of the lines, of which only keys and values that do not fit are longer."""
    found = find_recipe(name_or_path)
    written = set(parse_flat_yaml(found.text, found.origin))
    written |= {override.partition("=")[0] for override in overrides}
    values = recipe.flat()
    method, data = choices(values, found.origin)
    about = {"data": (data.__doc__ or ""), "method": (method.__doc__ or "")}
    lines = [
        *_wrapped(f"{found.name}: {recipe.description}", width),
        "",
        *_wrapped(
            f"Override any key after the recipe: fastkd train {name_or_path} train.epochs=3. "
            "Values that the recipe or the command line gives are marked *, all others are defaults.",
            width,
        ),
    ]
    for section, keys in keys_of(method, data).items():
        if section:
            first = about.get(section, "").strip().partition("\n\n")[0]
            title = f"{section}: {' '.join(first.split())}" if first else section
            if section == "teacher" and recipe.teacher is None:
                title = "teacher: none; teacher.name adds one"
            lines += ["", *_wrapped(title, width)]
        for key in keys:
            lines += _described(key, values, key.name in written, width)
    return "\n".join(lines)


def _described(key: Key, values: dict[str, Any], given: bool, width: int) -> list[str]:
    if key.name == "description":  # it is the title
        value = ""
    elif key.name in values:
        value = f" = {dump_scalar(values[key.name])}"
    else:
        value = "" if key.name.startswith("teacher.") and "teacher.name" not in values else " = null"
    kind = key.kind
    if key.default is REQUIRED:
        kind += "; required"
    elif str(key.default).startswith("that of "):
        kind += f"; default: {key.default}"
    elif key.default is not None and (given or not value):
        kind += f"; default {dump_scalar(key.default)}"
    text = f"{key.meaning.removesuffix('.')} ({kind})" if key.meaning else f"({kind})"
    return [f"{'*' if given else ' '} {key.name}{value}", *_wrapped(text, width, " " * _INDENT)]


def _wrapped(text: str, width: int, indent: str = "") -> list[str]:
    return textwrap.wrap(
        text,
        max(width, 40),
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
