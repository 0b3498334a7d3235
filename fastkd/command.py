"""What every command line of fastkd does around its work: environment errors in a line, closed pipes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TextIO

from fastkd.environment import EnvironmentValueError
from fastkd.ops import backend

BROKEN_PIPE_STATUS = 141  # of a process that SIGPIPE ended, as the shell reports it


def run_command(work: Callable[[], int]) -> int:
    """The exit status of ``work()``; 2 and a line where the environment holds a value that fastkd refuses.

    A reader that has seen enough (``fastkd recipes | head -1``) closes the pipe, which Python reports at the
    next write or when it flushes at exit: the command then ends without a word.
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
    """What is left in their buffers has no reader: Python would end with an error of its own at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
