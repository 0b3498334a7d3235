"""Errors whose message is written for the person at the keyboard: the command line prints them bare."""

from __future__ import annotations


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
