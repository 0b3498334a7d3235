"""Loading a recipe: a file or a name, overrides, and the checks of every value.

A recipe file is flat YAML, one dotted key per line (``train.epochs: 6``). Nothing in it is evaluated, unknown
keys are refused, and values are never converted silently. ``sections`` has the models of the values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from fastkd.distill.method import Method, find_method
from fastkd.distill.options import OptionError, check_options, is_file, options_of
from fastkd.errors import RecipeError
from fastkd.files.paths import user_path
from fastkd.messages import nearest

from .files import find_recipe, parse_flat_yaml, parse_scalar
from .names import description_of, name_of
from .sections import DATA_SECTIONS, Model, Optimization, Recipe, Section, Teacher, Train

SECTIONS = ("data", "student", "teacher", "method", "train")
# The teacher's section defaults to these values of train.
_SHARED = [name for name in Optimization.model_fields if name != "seed"]


def load_recipe(name_or_path: str, overrides: Iterable[str] = ()) -> tuple[str, Recipe]:
    """Read a recipe by name (``glyphs/kd``) or path, apply ``key=value`` overrides, and validate it.

    Returns the recipe's name and the recipe. Raises ``RecipeError``.
    """
    found = find_recipe(name_or_path)
    values = parse_flat_yaml(found.text, found.origin)
    given: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise RecipeError(f"override {override!r}: expected key=value, for instance train.epochs=3")
        given[key] = parse_scalar(text, key)
    recipe = make_recipe(_overridden(values, given), found.origin)
    changed = {key: value for key, value in given.items() if values.get(key) != value}
    if "description" not in given:
        text = description_of(found.name, recipe.description, recipe.method, changed)
        recipe = recipe.model_copy(update={"description": text})
    return name_of(found.name, changed), recipe


# Terms that any method may have beside its own, and that read the teacher.
_TERMS = ("method.hint_weight", "method.distance_weight", "method.angle_weight")


def _overridden(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` overridden by ``given``; what was for a replaced method, network or source is dropped."""
    kept = dict(values)
    if given.get("method", values.get("method")) != values.get("method"):
        # The options in the recipe are for its own method, and cross-entropy alone does not read its teacher.
        read = any(given.get(key) for key in _TERMS) or any(key.startswith("teacher.") for key in given)
        alone = given["method"] == "cross_entropy" and not read
        dropped = ("method.", "teacher.") if alone else ("method.",)
        kept = {key: value for key, value in kept.items() if not key.startswith(dropped)}
    if given.get("teacher.checkpoint") is not None:
        kept.pop("teacher.weights", None)
    for section in ("student", "teacher"):
        if f"{section}.name" in given and given[f"{section}.name"] != values.get(f"{section}.name"):
            kept.pop(f"{section}.width", None)
    return {**kept, **given}


def without_effect(recipe: Recipe, overrides: Iterable[str]) -> list[str]:
    """Notes on overrides of the teacher's training when the teacher is not trained."""
    teacher = recipe.teacher
    made = ("checkpoint", "weights")  # a cache must be of a teacher that was trained as the recipe says
    source = next((key for key in made if teacher is not None and getattr(teacher, key) is not None), None)
    keys = [override.partition("=")[0] for override in overrides]
    # batch_size is used to validate it.
    training = [f"teacher.{name}" for name in Optimization.model_fields if name != "batch_size"]
    return [
        f"{key} has no effect: the teacher comes from teacher.{source}"
        for key in keys
        if source is not None and key in training
    ]


def make_recipe(values: Mapping[str, Any], origin: str) -> Recipe:
    """Validate flat dotted values. Errors (``RecipeError``) begin with ``origin``."""
    method, data = choices(values, origin)
    valid = valid_keys(method, data)
    nested: dict[str, Any] = {}
    for key, value in values.items():
        if key in valid:
            section, _, option = key.partition(".")
            if option:
                nested.setdefault("options" if section == "method" else section, {})[option] = value
            else:
                nested[section] = value
        elif isinstance(value, Mapping) and key in SECTIONS:
            raise RecipeError(
                f"{origin}: {key}: recipes are flat, one dotted key per line, for instance "
                f"`{key}.{next(iter(value), 'name')}: …`"
            )
        else:
            raise RecipeError(f"{origin}: unknown key {key!r}{nearest(key, valid)}")
    if "teacher" in nested:
        if nested["teacher"].get("name") is None:
            option = next((f"teacher.{key}" for key in nested["teacher"]), "teacher")
            raise RecipeError(
                f"{origin}: {option} is given, but there is no teacher: teacher.name (and teacher.width, for "
                "networks that have one) says which network it is"
            )
        nested["teacher"] = {
            **{key: nested["train"][key] for key in _SHARED if key in nested.get("train", {})},
            **nested["teacher"],
        }
    try:
        nested["options"] = check_options(method, nested.get("options", {}), prefix="method.")
        recipe = Recipe.model_validate(nested)
    except OptionError as error:
        raise RecipeError(f"{origin}: {error}") from None
    except ValidationError as error:
        raise RecipeError(_explain(error, origin)) from None
    return _with_absolute_paths(recipe)


def choices(values: Mapping[str, Any], origin: str) -> tuple[type[Method], type[Section]]:
    """The classes of the method and the data section, which decide the other valid keys."""
    name = values.get("method")
    if isinstance(name, Mapping):
        raise RecipeError(
            f"{origin}: method: recipes are flat: `method: dkd`, and `method.alpha: 1.0` for its options"
        )
    if not isinstance(name, str):
        raise RecipeError(
            f"{origin}: method " + ("is missing" if name is None else f"= {name!r}: not a name")
        )
    try:
        method = find_method(name)
    except ValueError as error:
        raise RecipeError(f"{origin}: {error}") from None
    data = values.get("data.name", "glyphs")
    if not isinstance(data, str) or data not in DATA_SECTIONS:
        near = nearest(str(data), DATA_SECTIONS)
        raise RecipeError(
            f"{origin}: data.name = {data!r} is unknown{near}; expected one of {', '.join(DATA_SECTIONS)}"
        )
    return method, DATA_SECTIONS[data]


def valid_keys(method: type[Method], data: type[Section]) -> list[str]:
    options: dict[str, Iterable[str]] = {
        "data": data.model_fields,
        "student": Model.model_fields,
        "teacher": Teacher.model_fields,
        "method": options_of(method),
        "train": Train.model_fields,
    }
    dotted = [f"{section}.{option}" for section, names in options.items() for option in names]
    return ["description", "method", *dotted]


def _explain(error: ValidationError, origin: str) -> str:
    lines = []
    for item in error.errors():
        # For data options pydantic inserts the discriminator's tag after "data"; it is not part of the key.
        parts = [str(part) for part in item["loc"]]
        if parts[:1] == ["data"] and len(parts) > 1:
            del parts[1]
        key = ".".join(parts)
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "missing":
            lines.append(f"{key} is missing")
        elif item["type"] == "value_error":
            lines.append(f"{key}: {message}" if key else message)
        else:
            expected = message[0].lower() + message[1:]
            value = repr(item["input"])
            value = value if len(value) <= 100 else f"{value[:97]}..."
            lines.append(f"{key} = {value} ({type(item['input']).__name__}): {expected}")
    return "\n".join(f"{origin}: {line}" for line in lines)


def _with_absolute_paths(recipe: Recipe) -> Recipe:
    # The recipe in a run folder must not depend on the working directory.
    def absolute(section: Section, key: str) -> Section:
        value = getattr(section, key, None)
        return section.model_copy(update={key: _absolute(value)}) if value is not None else section

    data: Section = recipe.data
    for key in ("fonts", "folder", "root"):
        data = absolute(data, key)
    teacher = recipe.teacher and absolute(absolute(recipe.teacher, "checkpoint"), "cache")
    declared = options_of(find_method(recipe.method))
    options = {
        name: _absolute(value) if value is not None and is_file(declared[name].annotation) else value
        for name, value in recipe.options.items()
    }
    return recipe.model_copy(update={"data": data, "teacher": teacher, "options": options})


def _absolute(path: str) -> str:
    return str(user_path(path).absolute())
