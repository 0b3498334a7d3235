"""Errors whose message is written for the person at the keyboard: the command line prints them bare."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType


class TrainError(Exception):
    """Base of every error a user can cause and mend; its text says what is wrong and what to do."""


class RecipeError(TrainError):
    """A recipe that cannot be found, read or validated."""


class DataError(TrainError):
    """A data folder that is missing or does not hold what is expected."""


class CheckpointError(TrainError):
    """A checkpoint that is missing, truncated or made for something else."""


class NonFiniteLossError(TrainError):
    """The loss became NaN or infinite; training stopped before or right after that step."""

    epoch = 0  # from 1
    step = 0  # of the epoch, from 1
    terms: Mapping[str, float] = MappingProxyType({})

    @classmethod
    def at(cls, epoch: int, step: int, terms: dict[str, float]) -> NonFiniteLossError:
        error = cls(
            f"the loss is not finite in epoch {epoch}, step {step}: "
            + ", ".join(f"{name} {value:.6g}" for name, value in terms.items())
            + "; a lower learning rate or a higher temperature often helps"
        )
        error.epoch, error.step, error.terms = epoch, step, terms
        return error


class StorageError(TrainError):
    """A file that cannot be written: a full disk, a folder that is read-only."""


class FolderInUseError(TrainError):
    """A run folder that another process writes to."""


class Preempted(Exception):
    """SIGTERM or SIGUSR1: a checkpoint was written, and the process ends with a status to requeue on."""
