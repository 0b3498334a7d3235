"""The `fastkd` command line. A command's module is imported when its name is given: torch takes seconds."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from fastkd import environment
from fastkd.command import run_command
from fastkd.errors import Preempted, TrainError
from fastkd.messages import nearest, one_line
from fastkd.version import __version__

# Each module has ``add_arguments(parser)`` and ``run(args)``, which returns the exit status.
_COMMANDS = {
    "train": (
        "fastkd.train.commands.train",
        "train a recipe: first the teacher if it is not trained yet, then the student",
    ),
    "demo": (
        "fastkd.train.commands.demo",
        "a teacher, a student and what distillation gains, in under a minute",
    ),
    "recipes": ("fastkd.train.commands.recipes", "list the recipes that come with fastkd, or print one"),
    "cache-teacher": (
        "fastkd.train.commands.cache_teacher",
        "store the teacher's logits, to train without the teacher",
    ),
    "plot": ("fastkd.train.commands.plot", "compare runs in one figure"),
    "export": (
        "fastkd.train.commands.export",
        "write the student as safetensors, state dict, program or ONNX model",
    ),
    "doctor": ("fastkd.doctor", "show which backends work here, and why others do not"),
    "check": ("fastkd.check", "check every loss on every backend here against float64"),
    "bench": ("fastkd.bench.command", "time the losses beside their peers; report and compare"),
}
_WITH_OVERRIDES = ("train", "cache-teacher")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    0 on success; 2 for bad input; 75 after SIGTERM or SIGUSR1, with a checkpoint written; 130 after Ctrl-C;
    141 if the reader of the output has closed the pipe.
    """
    return run_command(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    words = sys.argv[1:] if argv is None else list(argv)
    parser = _parser(words)
    args, extra = parser.parse_known_args(words)
    if args.command in _WITH_OVERRIDES:
        # argparse does not collect key=value words that follow an option.
        args.words += [word for word in extra if not word.startswith("-")]
        # key=value after --resume is an override, unless a folder has that name.
        if getattr(args, "resume", None) and "=" in args.resume and not os.path.isdir(args.resume):
            args.words, args.resume = [*args.words, args.resume], ""
        extra = [word for word in extra if word.startswith("-")]
    if extra:
        return _unknown(parser, args.command, extra, words)
    if not getattr(args, "help", False) or args.words:
        return _run(args, in_python=argv is not None)
    args.parser.print_help()
    return 0


def _unknown(parser: argparse.ArgumentParser, command: str, extra: list[str], words: list[str]) -> int:
    """Exit status 2, and one line for an option that is written as an override."""
    if command in _WITH_OVERRIDES:
        from fastkd.recipe.hints import hint

        if (override := hint(extra[0], words)) is not None:
            option = extra[0].partition("=")[0]
            text = f"{option} is not an option of fastkd {command}; use {override}"
            print(f"fastkd: error: {text}", file=sys.stderr)
            return 2
    near = nearest(extra[0], _options_of(parser, command))
    parser.error(f"unknown arguments: {' '.join(extra)}{near}")


def _options_of(parser: argparse.ArgumentParser, command: str) -> list[str]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return list(action.choices[command]._option_string_actions)
    return []


def _run(args: argparse.Namespace, *, in_python: bool) -> int:
    """``in_python``: the process goes on after the command. One that ends keeps ignoring signals."""
    process = ""
    if environment.count("WORLD_SIZE", 1, least=1) > 1:
        process = f" (rank {environment.count('RANK', 0)})"
    try:
        status: int = args.run(args)
    except TrainError as error:
        print(f"fastkd: error{process}: {error}", file=sys.stderr)
        return 2
    except Preempted as stop:
        from fastkd.train.signals import REQUEUE_STATUS

        print(f"fastkd{process}: {stop}", file=sys.stderr)
        return REQUEUE_STATUS
    except BrokenPipeError:
        raise  # see run_command
    except (OSError, RuntimeError, MemoryError) as error:
        if (text := _of_the_machine(error)) is None:
            raise
        print(f"fastkd: error{process}: {text}", file=sys.stderr)
        return 2
    finally:
        if in_python and "fastkd.train.signals" in sys.modules:
            from fastkd.train.signals import restore_handlers

            restore_handlers()
    return status


def _of_the_machine(error: Exception) -> str | None:
    """The message, in one line, for an error of the machine such as full memory; None for other errors."""
    from fastkd.data.files import of_workers
    from fastkd.train.joining import of_lost_peer

    text = one_line(error)
    if isinstance(error, OSError):
        return text if error.errno is not None else None
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text:
        asked = text.partition("DefaultCPUAllocator: ")[2].partition(" Error")[0] or text
        return f"out of memory{': ' + asked if asked else ''}"
    return of_workers(error) or of_lost_peer(error) if isinstance(error, RuntimeError) else None


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of all commands, of which only the one in ``words`` knows its arguments."""
    parser = argparse.ArgumentParser(
        prog="fastkd",
        description="Fused knowledge distillation losses and a small, resumable trainer.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fastkd {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    wanted = next((word for word in words if not word.startswith("-")), None)
    for name, (module_name, description) in _COMMANDS.items():
        # Without abbreviations: --seed 3 must not mean --seeds 3. `train` has a --help of its own.
        command = commands.add_parser(
            name, help=description, description=description, allow_abbrev=False, add_help=name != "train"
        )
        if name == wanted:
            module = importlib.import_module(module_name)
            module.add_arguments(command)
            command.set_defaults(run=module.run, parser=command)
    return parser
