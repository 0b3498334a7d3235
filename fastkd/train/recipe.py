"""Recipes: what one training run is, as frozen and validated values.

A recipe file is flat YAML, one dotted key a line (``train.epochs: 6``). It is data only: nothing in it is
evaluated, unknown keys are refused, and values are never silently converted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import RecipeError
from .recipe_files import find_recipe, parse_flat_yaml, parse_scalar, suggest

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Weight = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class GlyphsData(_Section):
    """Characters rendered from font files."""

    name: Literal["glyphs"] = "glyphs"
    fonts: str | None = None  # folder of TTF, OTF, TTC; None: the DejaVu faces that matplotlib ships
    holdout: list[str] | None = None  # names of the validation faces; None: see glyph_fonts.split_faces
    characters: str | None = None  # "4E00-9FA5", several ranges with commas; None: all common characters
    coverage: Fraction = 0.95  # a face with a smaller share of `characters` is left out
    augment: Annotated[float, Field(ge=0.0, le=4.0)] = 1.0  # strength of affine and noise; 0 is none


class Model(_Section):
    name: Literal["glyph_cnn"] = "glyph_cnn"
    width: Count


class Optimization(_Section):
    epochs: Count
    batch_size: Count = 256
    lr: Positive = 6e-3
    weight_decay: Weight = 1e-2
    schedule: Literal["one_cycle", "cosine", "constant"] = "one_cycle"
    seed: Seed = 0


class Teacher(Optimization, Model):
    checkpoint: str | None = None  # a file to load instead of training one


class Train(Optimization):
    device: str = "auto"
    precision: Literal["float32", "bfloat16"] = "float32"
    threads: Count | None = None  # CPU threads; None: torch's choice


class CrossEntropy(_Section):
    name: Literal["cross_entropy"]
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0


class Distill(_Section):
    """Cross-entropy with softmax distillation: KD, DKD and their standardised forms."""

    name: Literal["distill"]
    ce_weight: Weight
    kd_weight: Weight = 0.0
    tckd_weight: Weight = 0.0
    nckd_weight: Weight = 0.0
    temperature: Positive = 4.0
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    standardize: bool = False

    @model_validator(mode="after")
    def _distils(self) -> Distill:
        if not (self.kd_weight or self.tckd_weight or self.nckd_weight):
            raise ValueError("at least one of kd_weight, tckd_weight, nckd_weight must be above 0")
        return self


class BinaryKL(_Section):
    name: Literal["binary_kl"]
    ce_weight: Weight = 1.0
    weight: Positive = 1.0
    temperature: Positive = 2.0


class BinaryKLNorm(_Section):
    name: Literal["binary_kl_norm"]
    ce_weight: Weight = 1.0
    weight: Positive = 1.0
    temperature: Positive = 2.0


Loss = Annotated[CrossEntropy | Distill | BinaryKL | BinaryKLNorm, Field(discriminator="name")]


class Recipe(_Section):
    """One run: data, student, optional teacher, loss, optimisation."""

    description: Annotated[str, Field(min_length=1)]
    data: GlyphsData = GlyphsData()
    student: Model
    teacher: Teacher | None = None
    loss: Loss
    train: Train

    @model_validator(mode="after")
    def _teacher_if_needed(self) -> Recipe:
        if self.teacher is None and self.loss.name != "cross_entropy":
            raise ValueError(f"loss {self.loss.name} needs a teacher: give teacher.width and teacher.epochs")
        return self

    def flat(self) -> dict[str, Any]:
        """Every value under its dotted key, in the order of declaration."""
        flat: dict[str, Any] = {}
        for key, value in self.model_dump().items():
            if isinstance(value, dict):
                flat.update({f"{key}.{k}": v for k, v in value.items()})
            elif value is not None:
                flat[key] = value
        return flat


_LOSSES: dict[str, type[_Section]] = {
    get_args(loss.model_fields["name"].annotation)[0]: loss
    for loss in (CrossEntropy, Distill, BinaryKL, BinaryKLNorm)
}
_SECTIONS: dict[str, type[_Section]] = {
    "data": GlyphsData,
    "student": Model,
    "teacher": Teacher,
    "train": Train,
}


def load_recipe(name_or_path: str, overrides: Iterable[str] = ()) -> tuple[str, Recipe]:
    """Read a recipe by name (``glyphs/kd``) or path, apply ``key=value`` overrides, validate.

    Returns the recipe's name and the recipe. Raises ``RecipeError``.
    """
    found = find_recipe(name_or_path)
    values = parse_flat_yaml(found.text, found.origin)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise RecipeError(f"override {override!r}: expected key=value, for instance train.epochs=3")
        if key == "loss.name":
            _drop_options_of_other_loss(values, parse_scalar(text, key))
        values[key] = parse_scalar(text, key)
    return found.name, make_recipe(values, found.origin)


def make_recipe(values: Mapping[str, Any], origin: str) -> Recipe:
    """Validate flat dotted values; ``origin`` is named in errors. Raises ``RecipeError``."""
    valid = _valid_keys(values, origin)
    nested: dict[str, Any] = {}
    for key, value in values.items():
        if key in valid:
            section, _, option = key.partition(".")
            if option:
                nested.setdefault(section, {})[option] = value
            else:
                nested[section] = value
        elif isinstance(value, Mapping) and key in (*_SECTIONS, "loss"):
            raise RecipeError(
                f"{origin}: {key}: recipes are flat, one dotted key a line, for instance "
                f"`{key}.{next(iter(value), 'name')}: …`"
            )
        else:
            raise RecipeError(f"{origin}: unknown key {key!r}{suggest(key, valid)}")
    try:
        recipe = Recipe.model_validate(nested)
    except ValidationError as error:
        raise RecipeError(_explain(error, origin)) from None
    return _with_absolute_paths(recipe)


def _valid_keys(values: Mapping[str, Any], origin: str) -> list[str]:
    name = values.get("loss.name")
    if not isinstance(name, str) or name not in _LOSSES:
        given = "is missing" if name is None else f"= {name!r} is unknown{suggest(str(name), _LOSSES)}"
        raise RecipeError(f"{origin}: loss.name {given}; expected one of {', '.join(_LOSSES)}")
    sections = {**_SECTIONS, "loss": _LOSSES[name]}
    dotted = [f"{section}.{option}" for section, model in sections.items() for option in model.model_fields]
    return ["description", *dotted]


def _drop_options_of_other_loss(values: dict[str, Any], name: Any) -> None:
    # Choosing another loss on the command line would otherwise fail on the old one's options.
    if values.get("loss.name") != name and isinstance(name, str) and name in _LOSSES:
        kept = _LOSSES[name].model_fields
        for key in [k for k in values if k.startswith("loss.") and k.partition(".")[2] not in kept]:
            del values[key]


def _explain(error: ValidationError, origin: str) -> str:
    lines = []
    for item in error.errors():
        # The discriminator's tag appears in the location of a loss option; it is no part of the key.
        parts = [str(part) for part in item["loc"] if part not in _LOSSES]
        key = ".".join(parts)
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "missing":
            lines.append(f"{key} is missing")
        elif item["type"] == "value_error":
            lines.append(f"{key}: {message}" if key else message)
        else:
            expected = message[0].lower() + message[1:]
            lines.append(f"{key} = {item['input']!r} ({type(item['input']).__name__}): {expected}")
    return "\n".join(f"{origin}: {line}" for line in lines)


def _with_absolute_paths(recipe: Recipe) -> Recipe:
    # The resolved recipe in a run folder must mean the same from any working directory.
    data, teacher = recipe.data, recipe.teacher
    if data.fonts is not None:
        data = data.model_copy(update={"fonts": str(Path(data.fonts).expanduser().absolute())})
    if teacher is not None and teacher.checkpoint is not None:
        path = str(Path(teacher.checkpoint).expanduser().absolute())
        teacher = teacher.model_copy(update={"checkpoint": path})
    return recipe.model_copy(update={"data": data, "teacher": teacher})
