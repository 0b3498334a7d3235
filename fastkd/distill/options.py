"""Options of a method: the keyword arguments of its ``__init__``, checked against its signature.

The annotations are the one statement of what is valid: a recipe, a call from Python and the documentation of
a method all go by them. ``**shared`` in a signature means "and those of the class above".
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

from annotated_types import Ge, Gt, Le, Lt

if TYPE_CHECKING:
    from pydantic import BaseModel

Weight = Annotated[float, Ge(0.0), Lt(float("inf"))]
Positive = Annotated[float, Gt(0.0), Lt(float("inf"))]
Fraction = Annotated[float, Ge(0.0), Le(1.0)]
Count = Annotated[int, Ge(1)]
Epochs = Annotated[int, Ge(0)]
File = Annotated[str, "file"]  # a recipe makes it absolute, so that it means the same from any folder

# What every method is given beside its options: the models, and a batch to learn shapes from.
GIVEN = ("self", "student", "teacher", "example")


class OptionError(ValueError):
    """An option that a method does not have, or a value that it cannot take."""


@dataclass(frozen=True)
class Option:
    annotation: Any
    default: Any  # ``inspect.Parameter.empty`` where there is none


def options_of(cls: type) -> dict[str, Option]:
    """Every option of a method class by name, its own first."""
    options: dict[str, Option] = {}
    for owner in cls.__mro__:
        if "__init__" not in owner.__dict__:
            continue
        init = owner.__dict__["__init__"]
        try:
            hints = get_type_hints(init, include_extras=True)
        except NameError:  # names that only a type checker sees: such an option is not checked
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
    """``values`` and, for what they leave out, the defaults. ``prefix`` stands before names in messages.

    ``partial``: an option without a default may be left out (it is given by position). Raises
    ``OptionError``: an unknown option (with the nearest valid names), a missing one, a wrong type or value.
    """
    from pydantic import ValidationError  # wanted here only

    options = options_of(cls)
    for name in values:
        if name not in options:
            known = ", ".join(options) or "none"
            raise OptionError(f"unknown option {prefix}{name}{nearest(name, options)}; there are {known}")
    try:
        checked = _model_of(cls, partial)(**{_PREFIX + name: value for name, value in values.items()})
    except ValidationError as error:
        raise OptionError("; ".join(_explain(item, prefix) for item in error.errors())) from None
    return {name: getattr(checked, _PREFIX + name) for name in options}


# Before names of fields, which pydantic does not allow to be such as "model_x" or "copy".
_PREFIX = "option_"


@functools.lru_cache(maxsize=256)
def _model_of(cls: type, partial: bool) -> type[BaseModel]:
    from pydantic import ConfigDict, create_model

    absent = None if partial else ...
    fields: dict[str, Any] = {
        _PREFIX + name: (
            option.annotation,
            absent if option.default is inspect.Parameter.empty else option.default,
        )
        for name, option in options_of(cls).items()
    }
    config = ConfigDict(strict=True, arbitrary_types_allowed=True)
    return create_model("Options", __config__=config, **fields)


def is_file(annotation: Any) -> bool:
    """Whether ``File`` is in an annotation, such as ``File | None``."""
    return "file" in getattr(annotation, "__metadata__", ()) or any(map(is_file, get_args(annotation)))


def nearest(word: str, possible: Iterable[str]) -> str:
    """`` (did you mean a, b?)``, or nothing when no name is near."""
    near = difflib.get_close_matches(word, list(possible), n=3, cutoff=0.6)
    return f" (did you mean {', '.join(near)}?)" if near else ""


def _explain(item: Any, prefix: str) -> str:
    name = prefix + str(item["loc"][0]).removeprefix(_PREFIX)
    if item["type"] == "missing":
        return f"{name} is missing"
    message = item["msg"]
    return f"{name} = {item['input']!r} ({type(item['input']).__name__}): {message[0].lower()}{message[1:]}"
