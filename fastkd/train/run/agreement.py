"""What the processes of one training must have in common, compared before anything is trained or written.

Machines that were started differently would otherwise wait for each other forever, or train on unlike data.
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import Any

from fastkd.data.data import Data
from fastkd.errors import LaunchError
from fastkd.files.sealed import short_digest_of
from fastkd.recipe.sections import Recipe
from fastkd.train import distributed

# Paths may differ, since ``check_content`` compares what is there; the others do not change what is computed.
_OF_THE_MACHINE = {
    "data.root", "data.folder", "data.fonts", "data.workers", "data.download", "teacher.checkpoint",
    "teacher.cache", "train.threads", "description",
}  # fmt: skip


def check_command(args: argparse.Namespace, recipe: Recipe) -> None:
    """The resolved recipe and the options of the command. Raises ``LaunchError``."""
    shown = {"--eval-only": args.eval_only, "--runs": str(args.runs)}
    if args.resume is not None:
        shown["--resume"] = args.resume or "given"
    settings = {key: value for key, value in recipe.flat().items() if key not in _OF_THE_MACHINE}
    distributed.check_agreement({**shown, **settings}, "start the same command on every machine")


def check_content(data: Data, teacher: str | None) -> None:
    """Data and teacher, by their content. Raises ``LaunchError``."""
    found: dict[str, Any] = {
        "the number of classes": data.num_classes,
        "the number of training images": data.samples,
        "the digest of the data": short_digest_of(data.fingerprint),
        "the digest of the teacher": teacher,
    }
    distributed.check_agreement(found, "every machine needs the same files")


def check_folder(folder: Path) -> None:
    """That every process sees the run folder, in which the first one writes. Raises ``LaunchError``."""
    seen = distributed.of_all_ranks(folder.is_dir())
    if distributed.world() == 1 or all(seen):
        return
    if distributed.is_first():
        with contextlib.suppress(OSError):
            folder.rmdir()  # just created, and empty
    blind = ", ".join(str(rank) for rank, sees in enumerate(seen) if not sees)
    raise LaunchError(
        f"the run folder {folder} of rank 0 does not exist for rank {blind}: --runs must name a folder on a "
        "file system that all machines share, in full or relative to the same folder"
    )


def check_state(state: dict[str, Any] | None) -> None:
    """The state that is resumed from. Raises ``LaunchError``."""
    position = "none"
    if state is not None:
        with contextlib.suppress(LookupError, TypeError):  # damaged: `load_state` says how
            step = state["position"]["meter"]["steps"] if state.get("position") else 0
            position = f"step {step} of epoch {len(state['history']) + 1}"
    distributed.check_agreement(
        {"the checkpoint": position}, "--runs must name a folder that all machines share"
    )
