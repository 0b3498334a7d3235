"""Shared by all command lines of fastkd: errors of the environment in one line, closed pipes, JSON.

Imports nothing slow: `fastkd --help` passes through here.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from fastkd.environment import EnvironmentValueError
from fastkd.errors import Stopped
from fastkd.messages import printable

# Of a process that the signal ended, as the shell reports it.
INTERRUPTED_STATUS = 130  # SIGINT
BROKEN_PIPE_STATUS = 141  # SIGPIPE


def run_command(work: Callable[[], int]) -> int:
    """The exit status of ``work()``, or 2 for an invalid environment variable and 130 after Ctrl-C, with one
    line on stderr.

    When a reader closes the pipe (``fastkd recipes | head -1``), Python raises at the next write or at the
    flush on exit; the command then ends silently.
    """
    _open_closed_streams()
    try:
        try:
            # Without the variable and the module there is nothing to check, and torch can wait.
            if os.environ.get("FASTKD_BACKEND") or "fastkd.ops.backend" in sys.modules:
                from fastkd.ops import backend

                backend.get_backend()
            return work()
        except EnvironmentValueError as error:
            print(f"fastkd: error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt as stop:
            print(f"\n{stop}" if isinstance(stop, Stopped) else "\nstopped", file=sys.stderr)
            return INTERRUPTED_STATUS
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        discard(sys.stdout, sys.stderr)
        return BROKEN_PIPE_STATUS


def _open_closed_streams() -> None:
    """Discard output to a stream that the shell has closed (``>&-``), for which Python has None.

    Its number is taken by that, and not by a file that libraries would then print into.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


def discard(*streams: TextIO) -> None:
    """Discard what is left in their buffers; otherwise Python fails when it flushes them at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``, which means the same for every command that has it."""
    parser.add_argument(
        "--json", action="store_true", help="print the summary as one JSON object; all else goes to stderr"
    )


def print_json(summary: Mapping[str, Any]) -> None:
    """Print one JSON object on stdout. NaN and infinity, which JSON lacks, become null."""
    # Python's escapes of a file's name that is not UTF-8 are JSON's.
    print(printable(json.dumps(_plain(summary), ensure_ascii=False, allow_nan=False)), flush=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float) else str(value)


def number_from_0(text: str) -> float:
    """Parse a finite number from 0, for argparse."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a number from 0")
    return number


def positive(text: str) -> int:
    """Parse a whole number from 1, for argparse."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected at least 1")
    return int(text)
