"""The keys of a recipe with type, default and meaning, from the models and signatures that validate them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from fastkd.distill.method import Method
from fastkd.distill.options import meanings_of, options_of

from .sections import DATA_SECTIONS, Model, Optimization, Recipe, Section, Teacher, Train

REQUIRED = inspect.Parameter.empty  # in place of the default of a key that has none


@dataclass(frozen=True)
class Key:
    """``name`` is dotted, ``kind`` says in words what values are valid."""

    name: str
    kind: str
    default: Any
    meaning: str


def keys_of(method: type[Method], data: type[Section]) -> dict[str, list[Key]]:
    """All keys of a recipe with this method and this kind of data, by section."""
    description = Recipe.model_fields["description"].description or ""
    known = ", ".join(sorted(Method._known))
    return {
        "": [Key("description", "text", REQUIRED, description)],
        "data": [*_fields("data", data, {"name": f"{_meaning(data, 'name')}: {', '.join(DATA_SECTIONS)}"})],
        "student": [*_fields("student", Model)],
        "teacher": [*_fields("teacher", Teacher)],
        "method": [
            Key("method", "text", REQUIRED, f"{Recipe.model_fields['method'].description}: {known}"),
            *_options(method),
        ],
        "train": [*_fields("train", Train)],
    }


def every_key() -> list[Key]:
    """The keys of all methods and kinds of data, those of ``train`` first."""
    found: dict[str, Key] = {}
    for section in DATA_SECTIONS.values():
        for method in Method._known.values():
            for key in (key for keys in keys_of(method, section).values() for key in keys):
                found.setdefault(key.name, key)
    order = ["train", "method", "data", "student", "teacher", "description"]
    return sorted(found.values(), key=lambda key: order.index(key.name.partition(".")[0]))


def _meaning(model: type[Section], name: str) -> str:
    return model.model_fields[name].description or ""


def _fields(section: str, model: type[Section], meanings: dict[str, str] | None = None) -> Iterator[Key]:
    hints = get_type_hints(model, include_extras=True)
    for name, field in model.model_fields.items():
        default = REQUIRED if field.is_required() else field.default
        # A teacher is trained as the student where its recipe says nothing else; see schema.make_recipe.
        if section == "teacher" and name in Optimization.model_fields and name != "seed":
            default = f"that of train.{name}"
        meaning = (meanings or {}).get(name) or _meaning(model, name)
        yield Key(f"{section}.{name}", kind_of(hints[name]), default, meaning)


def _options(method: type[Method]) -> Iterator[Key]:
    meanings = meanings_of(method)
    for name, option in options_of(method).items():
        yield Key(f"method.{name}", kind_of(option.annotation), option.default, meanings.get(name, ""))


_PLAIN = {bool: "true or false", str: "text", int: "whole number", float: "number", NoneType: "null"}


def kind_of(annotation: Any) -> str:
    """An annotation in words: ``Annotated[int, Ge(1)] | None`` is "whole number from 1, or null"."""
    kinds = _kinds(annotation)
    if "null" in kinds and len(kinds) > 1:
        kinds.remove("null")
        return f"{_either(kinds)}, or null"
    return _either(kinds)


def _either(kinds: list[str]) -> str:
    *first, last = dict.fromkeys(kinds)
    return f"{', '.join(first)} or {last}" if first else last


def _kinds(annotation: Any) -> list[str]:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner, *metadata = arguments
        if "file" in metadata:
            return ["file"]
        bounds = _bounds(metadata)
        return [f"{kind} {bounds}" if bounds and "number" in kind else kind for kind in _kinds(inner)]
    if origin is Literal:
        return [str(value) for value in arguments]
    if origin is list:
        return [f"list of {_either(_kinds(arguments[0]))}"]
    if origin is dict:
        return ["mapping"]
    if arguments:  # a union
        return [kind for argument in arguments for kind in _kinds(argument)]
    return [
        _PLAIN.get(annotation, "any value" if annotation is Any else getattr(annotation, "__name__", "?"))
    ]


def _bounds(metadata: list[Any]) -> str:
    """ "from 0 to 1", "above 0"; limits that only keep numbers finite are left out."""
    flat = [
        part for entry in metadata for part in (entry.metadata if isinstance(entry, FieldInfo) else [entry])
    ]
    words = []
    for part in flat:
        match part:
            case Ge(ge=limit):
                words.append(f"from {limit:g}")
            case Gt(gt=limit):
                words.append(f"above {limit:g}")
            case Le(le=limit):
                words.append(f"to {limit:g}")
            case Lt(lt=limit) if limit not in (math.inf, 2**31):
                words.append(f"below {limit:g}")
    return " and ".join(words) if words[:1] == ["above 0"] else " ".join(words)
