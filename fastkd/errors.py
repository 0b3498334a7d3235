"""Errors caused by input or environment; the command line prints their message without a traceback."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType


class TrainError(Exception):
    """Base of the errors that a user can fix; the message says what is wrong and what to do."""


class RecipeError(TrainError):
    """A recipe cannot be found, read or validated."""


class DataError(TrainError):
    """A data folder is missing or does not contain what is expected."""


class CheckpointError(TrainError):
    """A checkpoint is missing, damaged or belongs to something else."""


class NonFiniteLossError(TrainError):
    """The loss, or a weight, became NaN or infinite; training stopped before or soon after that step."""

    epoch = 0  # from 1
    step = 0  # of the epoch, from 1; 0 if it is not known
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

    @classmethod
    def of_weights(cls, epoch: int, step: int) -> NonFiniteLossError:
        """A weight was found not to be finite after ``step``; the loss was so until then."""
        error = cls(
            f"weights are NaN or infinite after epoch {epoch}, step {step}, though every loss was finite: "
            "the gradient of that step, or of one before it, was not; usual causes are the derivative of a "
            "square root or a norm at 0, and a learning rate that is too high"
        )
        error.epoch = epoch
        return error


class StorageError(TrainError):
    """A file cannot be written: a full disk, a read-only folder."""


class FolderInUseError(TrainError):
    """Another process is writing to the run folder."""


class LaunchError(TrainError):
    """The processes of a training cannot start together: one is missing, or they do not fit together."""


class Preempted(Exception):
    """SIGTERM or SIGUSR1 stopped training after a checkpoint; the exit status asks for a requeue."""


class Stopped(KeyboardInterrupt):
    """Ctrl-C in a command; the message says that, and what was written and how to resume."""
