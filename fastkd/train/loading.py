"""``fastkd.load``: a trained student and its transform, of a run or of an export."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from fastkd.data.validation import ValidationTransform
from fastkd.errors import CheckpointError
from fastkd.files.paths import user_path
from fastkd.messages import some

from .run.exported import load_exported
from .run.folder import is_seed_group
from .run.safetensors_file import SUFFIX
from .run.student import read_student

# Formats that are run by other programs.
_ELSEWHERE = {
    ".onnx": "run it with onnxruntime",
    ".pt2": "run it with torch.export.load(FILE).module()",
    ".pt": "a state dict does not say what network it is of",
    ".json": "it describes the file beside it",
}


@dataclass(frozen=True)
class Loaded:
    """What ``fastkd.load`` returns; ``network, transform = fastkd.load(…)`` takes the first two.

    Args:
        network: the student, in eval mode on the CPU.
        transform: what validation did to an image, to be called with a PIL image or a uint8 tensor.
        classes: names by label; the labels' numbers if the data have no names.
        about: the description that `fastkd export` writes beside the weights: network, transform, run with
            method, recipe and accuracies, version.
    """

    network: nn.Module
    transform: ValidationTransform
    classes: tuple[str, ...]
    about: dict[str, Any]

    def __iter__(self) -> Iterator[Any]:
        yield self.network
        yield self.transform


def load(
    path: str | os.PathLike[str],
    *,
    weights: Literal["best", "last"] = "best",
    network: nn.Module | None = None,
) -> Loaded:
    """A trained student with its weights, in eval mode, and the transform that its images need.

    No code from the file is run: weights are read as plain tensors, and the network is built by name.

    Args:
        path: a run folder, a ``.safetensors`` file of `fastkd export`, or a folder with one such file.
        weights: of a run, ``"best"`` or ``"last"``: of which epoch.
        network: into which the weights are loaded, for a network that is not part of fastkd, torchvision or
            timm. A run's ``module:callable`` is also imported from the working directory; a file's is not.

    Raises ``TrainError`` that names the path if it is neither, holds no checkpoint, is damaged, or does not
    fit the network; ``ValueError`` for other ``weights``.
    """
    if weights not in ("best", "last"):
        raise ValueError(f"weights is {weights!r}; expected 'best' or 'last'")
    path = user_path(path)
    if (path / "recipe.yaml").exists() or is_seed_group(path):
        return _loaded(*read_student(path, weights, network))
    file = _file_of(path)
    if weights != "best":
        raise ValueError(
            f"weights is {weights!r}, but {file} is an export, which has one epoch; leave it out"
        )
    return _loaded(*load_exported(file, network))


def _loaded(network: nn.Module, about: Any) -> Loaded:
    return Loaded(network, about.transform, about.class_names, about.model_dump())


def _file_of(path: Path) -> Path:
    """The safetensors file that ``path`` is or holds. Raises ``CheckpointError``."""
    what = f"expected a run folder, or a {SUFFIX} file of `fastkd export`"
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; {what}")
    if path.is_dir():
        files = sorted(path.glob(f"*{SUFFIX}"))
        if len(files) > 1:
            raise CheckpointError(f"{path} holds {some([file.name for file in files])}; name one of them")
        if not files:
            raise CheckpointError(f"{path} is neither a run folder nor an export; {what}")
        return files[0]
    if path.suffix in _ELSEWHERE:
        raise CheckpointError(f"{path} is not loaded: {_ELSEWHERE[path.suffix]}; {what}")
    return path
