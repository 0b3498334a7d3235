"""The values of a recipe: frozen, validated models of everything that defines a training run.

The meaning of every key is its field's description, from which ``fastkd train RECIPE --help`` is made.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from fastkd.distill.method import find_method
from fastkd.distill.options import options_of

from .durations import seconds_of

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Weight = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Natural = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Precision = Literal["float32", "bfloat16", "float16"]


def _steps_or_time(value: int | str) -> int | str:
    if isinstance(value, str):
        seconds_of(value)
    elif value < 1:
        raise ValueError(f"expected at least 1, got {value}")
    return value


Interval = Annotated[int | str, Field(union_mode="left_to_right"), AfterValidator(_steps_or_time)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def check_crop(resize: int | None, name: str, side: int) -> None:
    """Raise ``ValueError`` if the central crop, of the side ``name``, is larger than the resized image."""
    if resize is not None and resize < side:
        raise ValueError(
            f"resize = {resize} is less than {name} = {side}: the central crop would be padded with black; "
            f"expected at least {side}"
        )


class GlyphsData(Section):
    """Characters rendered from font files."""

    name: Literal["glyphs"] = Field(default="glyphs", description="the kind of data")
    fonts: str | None = Field(
        default=None, description="folder of TTF, OTF and TTC files; null: the DejaVu faces of matplotlib"
    )
    holdout: list[str] | None = Field(
        default=None, description="names of the validation faces; null: every fourth font file"
    )
    exclude: list[str] | None = Field(default=None, description="names of faces to leave out altogether")
    characters: str | None = Field(
        default=None,
        description='ranges of code points such as "41-5A,4E00-9FA5"; null: all common characters',
    )
    coverage: Fraction = Field(
        default=0.95, description="a face with a smaller share of data.characters is left out"
    )
    augment: Annotated[float, Field(ge=0.0, le=4.0)] = Field(
        default=1.0, description="strength of distortion and noise; 0: none"
    )


class _Images(Section):
    augment: bool = Field(default=True, description="random crops and flips")
    mixup: Weight = Field(default=0.0, description="alpha of MixUp's beta distribution; 0: off")
    cutmix: Weight = Field(
        default=0.0, description="alpha of CutMix; 0: off. If both are on, each batch gets one of them"
    )
    synthetic: Count | None = Field(
        default=None, description="this many random images of the same shape, to try a recipe without files"
    )


class MemoryImages(_Images):
    folder: str | None = Field(default=None, description="folder of the files")
    holdout: Count | None = Field(
        default=None, description="validate on this many training images instead of the test images"
    )


class ImageData(MemoryImages):
    """A torchvision data set that fits into memory."""

    name: Literal["fashion_mnist", "cifar100"] = Field(description="the kind of data")
    download: bool = Field(default=False, description="download into the folder if the files are missing")


class ArraysData(MemoryImages):
    """Images and labels in train.npz and test.npz, which fit into memory."""

    name: Literal["arrays"] = Field(description="the kind of data")


class SyntheticData(Section):
    """Random images, to measure throughput."""

    name: Literal["synthetic"] = Field(description="the kind of data")
    images: Count = Field(default=1024, description="number of training images")
    classes: Annotated[int, Field(ge=2)] = Field(default=1000, description="number of classes")
    channels: Count = Field(default=3, description="channels of an image")
    size: Count = Field(default=224, description="side of an image in pixels")


class _FileImages(_Images):
    root: str | None = Field(default=None, description="folder of the images")
    size: Count = Field(default=224, description="side of the images that networks get, in pixels")
    resize: Count | None = Field(
        default=None, description="shorter side before the central crop; null: 8/7 of data.size"
    )
    workers: Annotated[int, Field(ge=0, le=256)] = Field(
        default=8, description="processes that decode images"
    )
    decoder: Literal["pillow", "torchcodec"] = Field(
        default="pillow", description="decoder of JPEG files; torchcodec is faster, needs fastkd[torchcodec]"
    )
    corrupt_limit: Natural = Field(default=10, description="unreadable images to skip before giving up")

    @model_validator(mode="after")
    def _crop_fits(self) -> _FileImages:
        check_crop(self.resize, "size", self.size)
        return self


class FolderData(_FileImages):
    """Folders of image files, one folder per class."""

    name: Literal["imagefolder"] = Field(description="the kind of data")
    train: str = Field(default="train", description='training images, below data.root; "." is the root')
    val: str = Field(default="val", description="validation images, below data.root")
    holdout: Count | None = Field(
        default=None, description="validate on this many training images instead of data.val"
    )


class ShardData(_FileImages):
    """Tar shards in the WebDataset format: files KEY.jpg (or png, webp) and KEY.cls side by side."""

    name: Literal["webdataset"] = Field(description="the kind of data")
    train: str = Field(
        default="train-*.tar",
        description="training shards, below data.root; train-{0000..0127}.tar is a pattern too",
    )
    val: str = Field(default="val-*.tar", description="validation shards, below data.root")
    classes: Annotated[int, Field(ge=2)] | None = Field(
        default=None, description="number of classes; null: the largest label + 1"
    )


DataSection = GlyphsData | ImageData | ArraysData | FolderData | ShardData | SyntheticData


class Model(Section):
    name: str = Field(
        default="glyph_cnn",
        description="a network of fastkd.models, torchvision/NAME, timm/NAME or module:callable",
    )
    width: Count | None = Field(default=None, description="width, for networks that have one")

    @model_validator(mode="after")
    def _exists(self) -> Model:
        from fastkd.models import check_model

        check_model(self.name, self.width)
        return self


class Optimization(Section):
    epochs: Count = Field(description="passes over the training images")
    batch_size: Count = Field(default=256, description="images per step, over all ranks")
    optimizer: Literal["adamw", "sgd"] = Field(default="adamw", description="the optimizer")
    lr: Positive = Field(default=6e-3, description="learning rate, the largest of the schedule")
    momentum: Fraction = Field(default=0.9, description="momentum of sgd")
    weight_decay: Weight = Field(default=1e-2, description="weight decay of the optimizer")
    schedule: Literal["one_cycle", "cosine", "steps", "constant"] = Field(
        default="one_cycle", description="how the learning rate changes during training"
    )
    milestones: list[Count] = Field(
        default=[], description="for steps: divide the learning rate by 10 after each of these epochs"
    )
    warmup_epochs: Annotated[float, Field(ge=0.0)] = Field(
        default=0.0, description="epochs of linear growth at the start; not for one_cycle, which has its own"
    )
    seed: Seed = Field(default=0, description="seed of the weights, the order of images and the augmentation")

    @model_validator(mode="after")
    def _schedule_fits(self) -> Optimization:
        if self.warmup_epochs and self.schedule == "one_cycle":
            raise ValueError("warmup_epochs: one_cycle has a warm-up of its own; choose another schedule")
        if self.schedule == "steps" and not self.milestones:
            raise ValueError("milestones: schedule steps needs epochs after which lr falls, as in [30, 60]")
        return self


class Teacher(Optimization, Model):
    checkpoint: str | None = Field(default=None, description="a file to load instead of training")
    weights: str | None = Field(
        default=None, description="or: a member of torchvision's weights enum, such as IMAGENET1K_V1"
    )
    cache: str | None = Field(
        default=None, description="folder of `fastkd cache-teacher`, used in place of the teacher"
    )

    @model_validator(mode="after")
    def _one_source(self) -> Teacher:
        if self.checkpoint is not None and self.weights is not None:
            raise ValueError("give either teacher.checkpoint or teacher.weights, not both")
        if self.weights is not None and not self.name.startswith("torchvision/"):
            raise ValueError(f"teacher.weights are torchvision's, but teacher.name is {self.name}")
        return self


class Train(Optimization):
    clip_norm: Positive | None = Field(
        default=None, description="largest gradient norm, clipped after the method's gradient alignment"
    )
    device: str = Field(default="auto", description="cpu, cuda or another torch device; auto: cuda if any")
    precision: Precision = Field(default="float32", description="of networks and heads, by autocast")
    teacher_precision: Precision | None = Field(
        default=None, description="of the teacher; null: same as train.precision"
    )
    threads: Count | None = Field(default=None, description="CPU threads; null: torch's choice")
    channels_last: bool = Field(default=False, description="that memory format, for convolutions")
    compile: bool = Field(
        default=False, description="torch.compile networks whose inner layers the method does not read"
    )
    accumulate: Count = Field(default=1, description="micro-batches per step and rank, to save memory")
    sync_batchnorm: bool = Field(
        default=False, description="batch statistics over all ranks; on several GPUs"
    )
    ema: Annotated[float, Field(gt=0.0, lt=1.0)] | None = Field(
        default=None, description="decay of averaged weights, which are then validated; null: no average"
    )
    nonfinite: Literal["stop", "skip"] = Field(
        default="stop", description="what to do when the loss is NaN or infinite"
    )
    log_every: Count | None = Field(
        default=None, description="steps between fetching losses; null: 1 on a CPU, else 20"
    )
    checkpoint_every: Interval | None = Field(
        default=None, description="steps or a time such as 15min between states; null: after every epoch only"
    )
    keep_every: Count | None = Field(
        default=None, description="epochs between states that are never deleted; null: none"
    )
    val_batch_size: Count | None = Field(
        default=None, description="images per batch of validation, over all ranks; null: as train.batch_size"
    )
    tensorboard: bool = Field(
        default=False, description="write curves for TensorBoard; needs fastkd[tensorboard]"
    )
    csv: bool = Field(default=False, description="write metrics.csv, one line per epoch")
    wandb: bool = Field(
        default=False,
        description="log to Weights & Biases, in the project WANDB_PROJECT or fastkd; needs fastkd[wandb]",
    )

    @model_validator(mode="after")
    def _parts_of_a_batch(self) -> Train:
        if self.accumulate > self.batch_size:
            raise ValueError(f"accumulate = {self.accumulate} is more than batch_size = {self.batch_size}")
        return self


class Recipe(Section):
    """One run: data, student, optional teacher, method with its options, optimisation."""

    description: Annotated[str, Field(min_length=1)] = Field(description="the row of a table of results")
    data: Annotated[DataSection, Field(discriminator="name")] = GlyphsData()
    student: Model
    teacher: Teacher | None = None
    method: str = Field(description="the distillation method, or module:Class")
    options: dict[str, Any] = {}  # of the method; `method.OPTION` in a recipe
    train: Train

    @model_validator(mode="after")
    def _teacher_if_needed(self) -> Recipe:
        if self.teacher is None and find_method(self.method).uses_teacher:
            raise ValueError(f"method {self.method} needs a teacher: give teacher.name and teacher.epochs")
        return self

    def flat(self) -> dict[str, Any]:
        """All values by dotted key, in order of declaration, without those that are None by default."""
        flat: dict[str, Any] = {}
        for key, value in self.model_dump(exclude_none=True).items():
            if key == "options":
                # An option of a method may be None where its default is something else.
                declared = options_of(find_method(self.method))
                for name, option in self.options.items():
                    if option is not None or declared[name].default is not None:
                        flat[f"method.{name}"] = option
            elif isinstance(value, dict):
                flat.update({f"{key}.{k}": v for k, v in value.items() if v is not None})
            else:
                flat[key] = value
        return flat


DATA_SECTIONS: dict[str, type[Section]] = {
    name: section
    for section in get_args(DataSection)
    for name in get_args(section.model_fields["name"].annotation)
}
