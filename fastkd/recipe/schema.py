"""The values of a recipe: frozen, validated models of everything that defines a training run.

A recipe file is flat YAML, one dotted key per line (``train.epochs: 6``). Nothing in it is evaluated, unknown
keys are refused, and values are never converted silently.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fastkd.distill.method import Method, find_method
from fastkd.distill.options import OptionError, check_options, is_file, options_of
from fastkd.errors import RecipeError
from fastkd.messages import nearest

from .durations import seconds_of
from .files import find_recipe, parse_flat_yaml, parse_scalar
from .names import description_of, name_of

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Weight = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Precision = Literal["float32", "bfloat16", "float16"]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class GlyphsData(_Section):
    """Characters rendered from font files."""

    name: Literal["glyphs"] = "glyphs"
    fonts: str | None = None  # folder of TTF, OTF, TTC; None: the DejaVu faces that matplotlib ships
    holdout: list[str] | None = None  # names of the validation faces; None: see data.glyphs.fonts.split_faces
    exclude: list[str] | None = None  # names of faces to leave out altogether
    characters: str | None = None  # "4E00-9FA5", several ranges with commas; None: all common characters
    coverage: Fraction = 0.95  # a face with a smaller share of `characters` is left out
    augment: Annotated[float, Field(ge=0.0, le=4.0)] = 1.0  # strength of distortion and noise; 0: none


class _Images(_Section):
    augment: bool = True  # random crops and flips
    mixup: Weight = 0.0  # alpha of MixUp's beta distribution; 0: off
    cutmix: Weight = 0.0  # alpha of CutMix; if both are on, each batch gets one of them
    synthetic: Count | None = None  # this many random images of the same shape, without the files


class MemoryImages(_Images):
    folder: str | None = None
    holdout: Count | None = None  # validate on this many training images instead of the test images


class ImageData(MemoryImages):
    """A torchvision data set that fits into memory."""

    name: Literal["fashion_mnist", "cifar100"]
    download: bool = False  # into the folder, if it is missing


class ArraysData(MemoryImages):
    """Images and labels in train.npz and test.npz, which fit into memory."""

    name: Literal["arrays"]


class SyntheticData(_Section):
    """Random images, to measure throughput."""

    name: Literal["synthetic"]
    images: Count = 1024
    classes: Annotated[int, Field(ge=2)] = 1000
    channels: Count = 3
    size: Count = 224


class _FileImages(_Images):
    root: str | None = None
    size: Count = 224  # side of the images that networks get
    resize: Count | None = None  # shorter side before the central crop; None: 8/7 of size
    workers: Annotated[int, Field(ge=0, le=256)] = 8  # processes that decode images
    corrupt_limit: Annotated[int, Field(ge=0)] = 10  # unreadable images to skip before giving up


class FolderData(_FileImages):
    """Folders of image files, one folder per class."""

    name: Literal["imagefolder"]
    train: str = "train"  # below root; "." is root itself
    val: str = "val"
    holdout: Count | None = None  # validate on this many training images instead of `val`


class ShardData(_FileImages):
    """Tar shards in the WebDataset format: files KEY.jpg (or png, webp) and KEY.cls side by side."""

    name: Literal["webdataset"]
    train: str = "train-*.tar"  # below root; patterns such as train-{0000..0127}.tar too
    val: str = "val-*.tar"
    classes: Annotated[int, Field(ge=2)] | None = None  # None: the largest label + 1


DataSection = GlyphsData | ImageData | ArraysData | FolderData | ShardData | SyntheticData


class Model(_Section):
    name: str = "glyph_cnn"  # of fastkd.models, torchvision/NAME, timm/NAME or module:callable
    width: Count | None = None  # for networks that have one

    @model_validator(mode="after")
    def _exists(self) -> Model:
        from fastkd.models import check_model

        check_model(self.name, self.width)
        return self


class Optimization(_Section):
    epochs: Count
    batch_size: Count = 256  # per step, over all ranks
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: Positive = 6e-3
    momentum: Fraction = 0.9  # of sgd
    weight_decay: Weight = 1e-2
    schedule: Literal["one_cycle", "cosine", "steps", "constant"] = "one_cycle"
    milestones: list[Count] = []  # for steps: divide the learning rate by 10 after each of these epochs
    warmup_epochs: Annotated[float, Field(ge=0.0)] = 0.0  # epochs of linear growth at the start
    seed: Seed = 0

    @model_validator(mode="after")
    def _one_warmup(self) -> Optimization:
        if self.warmup_epochs and self.schedule == "one_cycle":
            raise ValueError("warmup_epochs: one_cycle has a warm-up of its own; choose another schedule")
        return self


class Teacher(Optimization, Model):
    checkpoint: str | None = None  # a file to load instead of training
    weights: str | None = None  # or: a member of torchvision's weights enum, such as IMAGENET1K_V1
    cache: str | None = None  # folder of `fastkd cache-teacher`, used in place of the teacher

    @model_validator(mode="after")
    def _one_source(self) -> Teacher:
        if self.checkpoint is not None and self.weights is not None:
            raise ValueError("give either teacher.checkpoint or teacher.weights, not both")
        if self.weights is not None and not self.name.startswith("torchvision/"):
            raise ValueError(f"teacher.weights are torchvision's, but teacher.name is {self.name}")
        return self


class Train(Optimization):
    clip_norm: Positive | None = None  # largest gradient norm, clipped after the method's gradient alignment
    device: str = "auto"
    precision: Precision = "float32"
    teacher_precision: Precision | None = None  # None: same as precision
    threads: Count | None = None  # CPU threads; None: torch's choice
    channels_last: bool = False
    compile: bool = False  # networks whose inner layers the method does not read
    accumulate: Count = 1  # micro-batches per step and rank
    sync_batchnorm: bool = False  # statistics over the batch of all ranks; on GPUs
    ema: Annotated[float, Field(gt=0.0, lt=1.0)] | None = (
        None  # decay of averaged weights, which are then validated
    )
    nonfinite: Literal["stop", "skip"] = "stop"  # what to do when the loss is NaN or infinite
    log_every: Count | None = None  # steps between fetching losses; None: 1 on a CPU, else 20
    checkpoint_every: Annotated[int | str, Field(union_mode="left_to_right")] | None = None  # steps, "15min"
    keep_every: Count | None = None  # epochs between states that are never deleted
    val_batch_size: Count | None = None  # for validation, over all ranks; None: same as batch_size
    tensorboard: bool = False

    @field_validator("checkpoint_every")
    @classmethod
    def _steps_or_time(cls, value: int | str | None) -> int | str | None:
        if isinstance(value, str):
            seconds_of(value)
        elif value is not None and value < 1:
            raise ValueError(f"expected at least 1, got {value}")
        return value

    @model_validator(mode="after")
    def _parts_of_a_batch(self) -> Train:
        if self.accumulate > self.batch_size:
            raise ValueError(f"accumulate = {self.accumulate} is more than batch_size = {self.batch_size}")
        return self


class Recipe(_Section):
    """One run: data, student, optional teacher, method with its options, optimisation."""

    description: Annotated[str, Field(min_length=1)]
    data: Annotated[DataSection, Field(discriminator="name")] = GlyphsData()
    student: Model
    teacher: Teacher | None = None
    method: str
    options: dict[str, Any] = {}  # of the method; `method.OPTION` in a recipe
    train: Train

    @model_validator(mode="after")
    def _teacher_if_needed(self) -> Recipe:
        if self.teacher is None and find_method(self.method).uses_teacher:
            raise ValueError(f"method {self.method} needs a teacher: give teacher.name and teacher.epochs")
        return self

    def flat(self) -> dict[str, Any]:
        """All values by dotted key, in order of declaration."""
        flat: dict[str, Any] = {}
        for key, value in self.model_dump(exclude_none=True).items():
            if isinstance(value, dict):
                prefix = "method" if key == "options" else key
                flat.update({f"{prefix}.{k}": v for k, v in value.items() if v is not None})
            else:
                flat[key] = value
        return flat


_DATA: dict[str, type[_Section]] = {
    name: section
    for section in get_args(DataSection)
    for name in get_args(section.model_fields["name"].annotation)
}
_SECTIONS = ("data", "student", "teacher", "method", "train")
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


def _overridden(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` overridden by ``given``; options of a replaced method, network or source are dropped."""
    kept = dict(values)
    if "method" in given:  # the options in the recipe are for its own method
        kept = {key: value for key, value in kept.items() if not key.startswith("method.")}
    if "teacher.checkpoint" in given:
        kept.pop("teacher.weights", None)
    for section in ("student", "teacher"):
        if f"{section}.name" in given and given[f"{section}.name"] != values.get(f"{section}.name"):
            kept.pop(f"{section}.width", None)
    return {**kept, **given}


def without_effect(recipe: Recipe, overrides: Iterable[str]) -> list[str]:
    """Notes on overrides of the teacher's training when the teacher is not trained."""
    teacher = recipe.teacher
    made = ("cache", "checkpoint", "weights")
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
    method, data = _choices(values, origin)
    valid = _valid_keys(method, data)
    nested: dict[str, Any] = {}
    for key, value in values.items():
        if key in valid:
            section, _, option = key.partition(".")
            if option:
                nested.setdefault("options" if section == "method" else section, {})[option] = value
            else:
                nested[section] = value
        elif isinstance(value, Mapping) and key in _SECTIONS:
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


def _choices(values: Mapping[str, Any], origin: str) -> tuple[type[Method], type[_Section]]:
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
    if not isinstance(data, str) or data not in _DATA:
        near = nearest(str(data), _DATA)
        raise RecipeError(
            f"{origin}: data.name = {data!r} is unknown{near}; expected one of {', '.join(_DATA)}"
        )
    return method, _DATA[data]


def _valid_keys(method: type[Method], data: type[_Section]) -> list[str]:
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
    def absolute(section: _Section, key: str) -> _Section:
        value = getattr(section, key, None)
        return section.model_copy(update={key: _absolute(value)}) if value is not None else section

    data: _Section = recipe.data
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
    return str(Path(path).expanduser().absolute())
