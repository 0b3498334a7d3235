"""Shared by all command lines of fastkd: errors of the environment in one line, closed pipes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TextIO

from fastkd.environment import EnvironmentValueError
from fastkd.ops import backend

BROKEN_PIPE_STATUS = 141  # of a process that SIGPIPE ended, as the shell reports it


def run_command(work: Callable[[], int]) -> int:
    """The exit status of ``work()``; 2 and one line on stderr for an invalid environment variable.

    When a reader closes the pipe (``fastkd recipes | head -1``), Python raises at the next write or at the
    flush on exit; the command then ends silently.
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
    """Discard what is left in their buffers; otherwise Python fails when it flushes them at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
