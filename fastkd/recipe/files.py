"""Finding recipe files, and reading and writing their flat YAML."""

from __future__ import annotations

import importlib.resources
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import yaml

from fastkd.errors import RecipeError
from fastkd.files.paths import user_path
from fastkd.files.regular import read_regular
from fastkd.messages import nearest

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable  # from Python 3.11


@dataclass(frozen=True)
class RecipeFile:
    name: str  # "glyphs/kd", or the stem of a user's file
    origin: str  # its name in errors
    text: str


def find_recipe(name_or_path: str) -> RecipeFile:
    """The recipe file at a path, or the recipe of that name that comes with fastkd."""
    path = user_path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise RecipeError(f"no recipe file {name_or_path}")
        try:
            return RecipeFile(_name_of(path), name_or_path, read_regular(path).decode("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{name_or_path}: cannot be read: {error}") from None
    shipped = shipped_recipes()
    if name_or_path not in shipped:
        raise RecipeError(
            f"unknown recipe {name_or_path!r}{nearest(name_or_path, shipped)}; "
            f"`fastkd recipes` lists them, and a path to a .yaml file is accepted too"
        )
    text = shipped[name_or_path].read_text(encoding="utf-8")
    return RecipeFile(name_or_path, f"recipe {name_or_path}", text)


def _name_of(path: Path) -> str:
    """The file's stem; for the recipe in a run folder, the name of the recipe it was made from."""
    if path.name == "recipe.yaml":
        try:
            name = json.loads(read_regular(path.parent / "run.json"))["name"]
            if isinstance(name, str) and name.isprintable():
                return name
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            pass
    return path.stem


def shipped_recipes() -> dict[str, Traversable]:
    """The recipes that come with fastkd, by name, from the wheel or from a checkout."""
    root: Traversable
    try:
        root = importlib.resources.files("fastkd.recipes")
    except ModuleNotFoundError:
        checkout = Path(__file__).resolve().parents[2]
        root = checkout / "recipes"
        # Otherwise a wheel without its recipes would read an unrelated site-packages/recipes.
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
    """Parse a mapping; refuse duplicate keys and anything but a mapping."""
    values = _parse(text, origin)
    if not isinstance(values, dict):
        raise RecipeError(f"{origin}: expected lines of `key: value`, found {type(values).__name__}")
    return values


def parse_scalar(text: str, key: str) -> Any:
    """Parse the value of a ``key=value`` override as YAML."""
    return _parse(text, f"{key}={_short(text)}")


def _parse(text: str, origin: str) -> Any:
    if len(text) > _LARGEST:
        raise RecipeError(f"{origin}: {len(text):,} characters; expected at most {_LARGEST:,}")
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader: builds plain values only
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise RecipeError(f"{origin}: not valid YAML: {problem}{where}") from None


_LARGEST = 1_000_000  # characters


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def dump_flat_yaml(values: Mapping[str, Any]) -> str:
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)


def dump_scalar(value: Any) -> str:
    """A value as it is written after ``key=`` on the command line."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...")


class _Loader(yaml.SafeLoader):
    """Loads YAML without anchors, tags, deep nesting and non-decimal numbers.

    A scalar is null, true or false, a decimal number, or a string: ``0x1``, ``01``, ``1_0``, ``1:30`` and
    ``yes`` are strings, which are refused where a number is expected.
    """

    yaml_implicit_resolvers: ClassVar[dict[Any, Any]] = {}  # without the defaults of YAML 1.1

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            # Ten lines of aliases can expand to more values than fit into memory.
            raise _refused("anchors and aliases (&, *) are not allowed in a recipe", event.start_mark)
        if getattr(event, "tag", None) is not None:
            raise _refused(f"tags such as {event.tag[:40]!r} are not allowed in a recipe", event.start_mark)
        self._depth += 1
        if self._depth > _MOST_NESTED:
            raise _refused("lists or mappings are nested too deeply", event.start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _refused("a key is a list or a mapping, expected a name", key_node.start_mark)
            if key_node.value in mapping:
                raise _refused(f"key {_short(key_node.value)!r} is given twice", key_node.start_mark)
            mapping[key_node.value] = self.construct_object(value_node, deep=deep)
        return mapping

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        if _INTEGER.fullmatch(node.value) and len(node.value) < 20:
            return int(node.value)
        number = float(node.value)
        digits = node.value.lower().partition("e")[0]
        if math.isinf(number) or (number == 0 and any(digit in digits for digit in "123456789")):
            raise _refused(
                f"the number {_short(node.value)!r} is beyond the range of float64", node.start_mark
            )
        return number


_MOST_NESTED = 8
_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9]*)")
# Integers of more than 18 digits stay strings, which are refused where a number is expected.
_NUMBER = re.compile(
    r"[-+]?(?:(?:0|[1-9][0-9]{0,17})"
    r"|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?[eE][-+]?[0-9]+|(?:0|[1-9][0-9]*)\.[0-9]*|\.[0-9]+(?:[eE][-+]?[0-9]+)?)$"
)
_Loader.add_implicit_resolver("tag:fastkd,number", _NUMBER, list("-+.0123456789"))
_Loader.add_constructor("tag:fastkd,number", _Loader.construct_number)
for _tag, _pattern, _first in (
    ("null", r"(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("float", r"[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$", list("-+.")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


def _refused(problem: str, mark: Any) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, mark)


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that ``_Loader`` would otherwise read as numbers."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+.0123456789"))
