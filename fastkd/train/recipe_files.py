"""Where recipes are found and how their flat YAML is read and written."""

from __future__ import annotations

import difflib
import importlib.resources
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .errors import RecipeError

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable  # from Python 3.11


@dataclass(frozen=True)
class RecipeFile:
    name: str  # "glyphs/kd", or the stem of a user's file
    origin: str  # what errors call it
    text: str


def find_recipe(name_or_path: str) -> RecipeFile:
    """A user's file if there is one of that path, else the recipe of that name that ships with fastkd."""
    path = Path(name_or_path).expanduser()
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise RecipeError(f"no recipe file {name_or_path}")
        try:
            return RecipeFile(_name_of(path), name_or_path, path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{name_or_path}: cannot be read: {error}") from None
    shipped = shipped_recipes()
    if name_or_path not in shipped:
        raise RecipeError(
            f"unknown recipe {name_or_path!r}{suggest(name_or_path, shipped)}; "
            f"`fastkd recipes` lists them, and a path to a .yaml file is accepted too"
        )
    text = shipped[name_or_path].read_text(encoding="utf-8")
    return RecipeFile(name_or_path, f"recipe {name_or_path}", text)


def _name_of(path: Path) -> str:
    """A file's stem; for the resolved recipe in a run folder, the name of the recipe it came from."""
    if path.name == "recipe.yaml":
        try:
            return str(json.loads((path.parent / "run.json").read_text(encoding="utf-8"))["name"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
    return path.stem


def shipped_recipes() -> dict[str, Traversable]:
    """Name to file of every recipe that comes with fastkd, from the wheel or from a checkout."""
    root: Traversable
    try:
        root = importlib.resources.files("fastkd.recipes")
    except ModuleNotFoundError:
        checkout = Path(__file__).resolve().parents[2]
        root = checkout / "recipes"
        # Without this a wheel that lost its recipes would read a stranger's site-packages/recipes.
        if not (checkout / "csrc").is_dir():
            return {}
    return dict(sorted(_walk(root, "")))


def _walk(folder: Traversable, prefix: str) -> Iterable[tuple[str, Traversable]]:
    if not folder.is_dir():
        return
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _walk(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(".yaml"):
            yield prefix + entry.name.removesuffix(".yaml"), entry


def parse_flat_yaml(text: str, origin: str) -> dict[str, Any]:
    """The mapping in ``text``; duplicate keys and anything but a mapping are refused."""
    try:
        values = yaml.load(text, Loader=_Loader)  # a SafeLoader: builds plain values only
    except yaml.YAMLError as error:
        raise RecipeError(f"{origin}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{origin}: expected lines of `key: value`, found {type(values).__name__}")
    return {str(key): value for key, value in values.items()}


def parse_scalar(text: str, key: str) -> Any:
    """The value of a ``key=value`` override, read as YAML."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{key}={text}: the value is not valid YAML: {error}") from None


def dump_flat_yaml(values: Mapping[str, Any]) -> str:
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)


def dump_scalar(value: Any) -> str:
    """A value as it stands behind ``key=`` on the command line."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...")


def suggest(word: str, possible: Iterable[str]) -> str:
    """`` (did you mean a, b?)``, or nothing when no name is near."""
    possible = list(possible)
    # A bare option name (`epochs`) is far from `train.epochs` by edit distance, yet is what was meant.
    near = [name for name in possible if name.endswith((f".{word}", f"/{word}"))]
    near += [n for n in difflib.get_close_matches(word, possible, n=3, cutoff=0.6) if n not in near]
    return f" (did you mean {', '.join(near)}?)" if near else ""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as people write it: 6e-3 is a number, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                if key_node.value in seen:
                    mark = key_node.start_mark
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key_node.value!r} is given twice", mark
                    )
                seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


_EXPONENT_FLOAT = re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT_FLOAT, list("-+0123456789"))


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that ``_Loader`` would otherwise read as numbers."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT_FLOAT, list("-+0123456789"))
