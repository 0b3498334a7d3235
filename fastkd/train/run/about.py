"""What an exported student says about itself: its network, classes and transform, and the run it is from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field, ValidationError, model_validator

from fastkd.data.validation import ValidationTransform
from fastkd.errors import CheckpointError
from fastkd.recipe.sections import Count, Fraction, Natural, Recipe, Section

FORMAT: Final = "fastkd-student-1"


class Network(Section):
    """The arguments of ``fastkd.models.build_model``."""

    name: str
    num_classes: Annotated[int, Field(ge=2)]
    width: Count | None
    channels: Count
    size: Count


class Origin(Section):
    """The run: its recipe without paths, and the epoch and accuracies where they are of these weights."""

    name: str
    weights: Literal["best", "last"]
    epoch: Natural | None
    val_accuracy: Fraction | None
    val_top5_accuracy: Fraction | None
    recipe: dict[str, Any]


class About(Section):
    """Written as JSON; ``classes`` are names by label, null if the data have none."""

    format: Literal["fastkd-student-1"] = FORMAT
    fastkd: str  # the version that exported it
    network: Network
    classes: list[str] | None
    transform: ValidationTransform
    run: Origin

    @model_validator(mode="after")
    def _fits(self) -> About:
        network, transform = self.network, self.transform
        if self.classes is not None and len(self.classes) != network.num_classes:
            raise ValueError(
                f"classes has {len(self.classes)} names, but the network has {network.num_classes} classes"
            )
        for name, given, expected in (
            ("channels", transform.channels, network.channels),
            ("crop", transform.crop, network.size),
        ):
            if given != expected:
                raise ValueError(f"transform.{name} is {given}, but the network is for {expected}")
        return self

    @property
    def class_names(self) -> tuple[str, ...]:
        """By label; the labels' numbers where the data have no names."""
        return tuple(self.classes or map(str, range(self.network.num_classes)))

    @property
    def facts(self) -> dict[str, Any]:
        """As a checkpoint has them beside its weights."""
        return {"num_classes": self.network.num_classes, "classes": self.classes}

    def to_json(self) -> str:
        return self.model_dump_json(indent=2) + "\n"


def make_about(origin: Path, **parts: Any) -> About:
    """``About`` of plain values that ``origin`` holds. Raises ``CheckpointError``."""
    try:
        return About(**parts)
    except ValidationError as error:
        raise CheckpointError(f"{origin}: {_explained(error)}") from None


def read_about(text: str | bytes, origin: Path) -> About:
    """Raises ``CheckpointError`` for text that is not of ``About.to_json``."""
    try:
        return About.model_validate_json(text)
    except ValidationError as error:
        raise CheckpointError(
            f"{origin}: its description is not one that this fastkd writes ({FORMAT}): {_explained(error)}"
        ) from None


def without_paths(recipe: Recipe) -> dict[str, Any]:
    """Its values by dotted key, without the paths of this machine."""
    # A loaded recipe's paths are absolute.
    flat = recipe.flat()
    return {k: v for k, v in flat.items() if not (isinstance(v, str) and Path(v).is_absolute())}


def _explained(error: ValidationError) -> str:
    faults = []
    for item in error.errors()[:5]:
        key = ".".join(map(str, item["loc"]))
        text = item["msg"].removeprefix("Value error, ")
        faults.append(f"{key}: {text}" if key else text)
    return "; ".join(faults)
