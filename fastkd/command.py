"""Shared by all commands of fastkd: one-line errors of the environment, and closed pipes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TextIO

from fastkd.environment import EnvironmentValueError
from fastkd.ops import backend

BROKEN_PIPE_STATUS = 141  # of a process that SIGPIPE ended, as the shell reports it


def run_command(work: Callable[[], int]) -> int:
    """Return the exit status of ``work()``; 2 and one line for an invalid environment variable.

    A reader such as ``head -1`` closes the pipe when it is done, which Python reports at the next write or
    when it flushes at exit: the command then ends silently.
    """
    try:
        try:
            backend.get_backend()
            return work()
        except EnvironmentValueError as error:
            print(f"fastkd: error: {error}", file=sys.stderr)
            return 2
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        discard(sys.stdout, sys.stderr)
        return BROKEN_PIPE_STATUS


def discard(*streams: TextIO) -> None:
    """Discard what is left in the buffers; without a reader, Python would report an error at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
