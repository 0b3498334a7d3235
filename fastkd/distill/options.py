"""Options of a method: the keyword arguments of its ``__init__``, checked against its signature.

The annotations define what is valid, for recipes, for calls from Python and for the documentation.
``**shared`` in a signature means "and the options of the base class".
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

from annotated_types import Ge, Gt, Le, Lt

from fastkd.messages import nearest

if TYPE_CHECKING:
    from pydantic import BaseModel

Weight = Annotated[float, Ge(0.0), Lt(float("inf"))]
Positive = Annotated[float, Gt(0.0), Lt(float("inf"))]
Fraction = Annotated[float, Ge(0.0), Le(1.0)]
Count = Annotated[int, Ge(1)]
Epochs = Annotated[int, Ge(0)]
File = Annotated[str, "file"]  # made absolute in recipes, which must not depend on the working directory

# Arguments of every method that are not options: the models, and a batch for shapes.
GIVEN = ("self", "student", "teacher", "example")


class OptionError(ValueError):
    """An unknown option of a method, or an invalid value."""


@dataclass(frozen=True)
class Option:
    annotation: Any
    default: Any  # ``inspect.Parameter.empty`` if there is none


def options_of(cls: type) -> dict[str, Option]:
    """All options of a method class by name, its own first."""
    options: dict[str, Option] = {}
    for owner in cls.__mro__:
        if "__init__" not in owner.__dict__:
            continue
        init = owner.__dict__["__init__"]
        try:
            hints = get_type_hints(init, include_extras=True)
        except NameError:  # names imported only for type checkers: not checked
            hints = {}
        parameters = inspect.signature(init).parameters.values()
        for parameter in parameters:
            if parameter.name not in GIVEN and parameter.kind not in (
                parameter.VAR_KEYWORD,
                parameter.VAR_POSITIONAL,
            ):
                option = Option(hints.get(parameter.name, Any), parameter.default)
                options.setdefault(parameter.name, option)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return options


def check_options(
    cls: type, values: Mapping[str, Any], *, prefix: str = "", partial: bool = False
) -> dict[str, Any]:
    """Check ``values`` and add the defaults. ``prefix`` is put before names in messages.

    ``partial``: options without a default may be missing (they are given by position). Raises ``OptionError``
    for an unknown option (with similar names), a missing one, or a wrong type or value.
    """
    options = options_of(cls)
    for name in values:
        if name not in options:
            known = ", ".join(options) or "none"
            raise OptionError(f"unknown option {prefix}{name}{nearest(name, options)}; there are {known}")
    return checked_by(_model_of(cls, partial), values, prefix)


# Prefix of field names: pydantic forbids some, such as "model_x" and "copy".
_PREFIX = "option_"


def checked_by(model: type[BaseModel], values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Check ``values`` by a model of ``model_of``; return them and defaults. Raises ``OptionError``."""
    from pydantic import ValidationError

    try:
        checked = model(**{_PREFIX + name: value for name, value in values.items()})
    except ValidationError as error:
        of_values: dict[tuple[str, str], list[Any]] = {}  # several of a value: one for each type of a union
        for item in error.errors():
            of_values.setdefault((str(item["loc"][0]), repr(item["input"])), []).append(item)
        raise OptionError("; ".join(_explain(items, prefix) for items in of_values.values())) from None
    return {name.removeprefix(_PREFIX): getattr(checked, name) for name in model.model_fields}


def model_of(fields: Mapping[str, tuple[Any, Any]]) -> type[BaseModel]:
    """The strict model of options by name: annotation, and default or ``...``."""
    from pydantic import ConfigDict, create_model

    config = ConfigDict(strict=True, arbitrary_types_allowed=True)
    named: dict[str, Any] = {_PREFIX + name: field for name, field in fields.items()}
    return create_model("Options", __config__=config, **named)


@functools.lru_cache(maxsize=256)
def _model_of(cls: type, partial: bool) -> type[BaseModel]:
    absent = None if partial else ...
    return model_of(
        {
            name: (
                option.annotation,
                absent if option.default is inspect.Parameter.empty else option.default,
            )
            for name, option in options_of(cls).items()
        }
    )


def meanings_of(cls: type) -> dict[str, str]:
    """What each option means, from the ``Args:`` of the docstrings of a method class and its bases."""
    meanings: dict[str, str] = {}
    for owner in cls.__mro__:
        document = inspect.cleandoc(owner.__dict__.get("__doc__") or "")
        _, _, arguments = document.partition("\nArgs:\n")
        found: dict[str, list[str]] = {}
        entry: list[str] = []
        for line in arguments.splitlines():
            if line and not line.startswith(" "):
                break  # the next section
            if match := _ARGUMENT.fullmatch(line):
                entry = [match[2]]
                found |= {name.strip(): entry for name in match[1].split(",")}
            elif line.strip():
                entry.append(line.strip())
        for name, words in found.items():
            meanings.setdefault(name, " ".join(words).replace("``", ""))
    return {name: meanings[name] for name in options_of(cls) if name in meanings}


_ARGUMENT = re.compile(r" {4}([A-Za-z]\w*(?:, [A-Za-z]\w*)*): (.*)")


def is_file(annotation: Any) -> bool:
    """Whether ``File`` is in an annotation, such as ``File | None``."""
    return "file" in getattr(annotation, "__metadata__", ()) or any(map(is_file, get_args(annotation)))


def _explain(items: list[Any], prefix: str) -> str:
    name = prefix + str(items[0]["loc"][0]).removeprefix(_PREFIX)
    value = items[0]["input"]
    if items[0]["type"] == "missing":
        return f"{name} is missing"
    first, *more = dict.fromkeys(item["msg"].removeprefix("Value error, ") for item in items)
    message = ", or ".join([first, *(one.removeprefix("Input should be ") for one in more)])
    return f"{name} = {value!r} ({type(value).__name__}): {message[0].lower()}{message[1:]}"
