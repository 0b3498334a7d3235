"""The `fastkd` command line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastkd.command import run_command
from fastkd.messages import one_line


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    0 on success; 2 for bad input; 75 after SIGTERM or SIGUSR1, with a checkpoint written; 130 after Ctrl-C;
    141 if the reader of the output has closed the pipe.
    """
    return run_command(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    parser = _parser()
    args, extra = parser.parse_known_args(argv)
    if args.command in ("train", "cache-teacher"):
        # argparse does not collect key=value words that follow an option.
        args.words += [word for word in extra if not word.startswith("-")]
        # key=value after --resume is an override, unless a folder has that name.
        if getattr(args, "resume", None) and "=" in args.resume and not os.path.isdir(args.resume):
            args.words, args.resume = [*args.words, args.resume], ""
        extra = [word for word in extra if word.startswith("-")]
    if extra:
        parser.error(f"unknown arguments: {' '.join(extra)}")
    from fastkd.errors import Preempted, TrainError
    from fastkd.train.distributed import number

    process = ""
    try:
        if number("WORLD_SIZE", 1, least=1) > 1:
            process = f" (rank {number('RANK', 0)})"
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
    except KeyboardInterrupt as stop:
        folder = getattr(stop, "folder", None)
        print(
            f"\nstopped; to resume: fastkd train --resume {folder}"
            if folder
            else "\nstopped before anything was written",
            file=sys.stderr,
        )
        return 130
    finally:
        if argv is not None:  # called from Python; a process that ends keeps ignoring signals
            from fastkd.train.signals import restore_handlers

            restore_handlers()
    return status


def _of_the_machine(error: Exception) -> str | None:
    """The message, in one line, for an error of the machine such as full memory; None for other errors."""
    from fastkd.data.files import of_workers

    text = one_line(error)
    if isinstance(error, OSError):
        return text if error.errno is not None else None
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text:
        asked = text.partition("DefaultCPUAllocator: ")[2].partition(" Error")[0] or text
        return f"out of memory{': ' + asked if asked else ''}"
    return of_workers(error) if isinstance(error, RuntimeError) else None


def _parser() -> argparse.ArgumentParser:
    from fastkd import check as check_command
    from fastkd.bench import command as bench

    parser = argparse.ArgumentParser(
        prog="fastkd", description="Fused knowledge distillation losses and a small, resumable trainer."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train", help="train a recipe: first the teacher if it is not trained yet, then the student"
    )
    train.add_argument(
        "words",
        nargs="*",
        metavar="RECIPE [key=value …]",
        help="a name that `fastkd recipes` lists or a .yaml file, then overrides such as train.epochs=3",
    )
    train.add_argument(
        "--seeds", type=bench.positive, metavar="N", help="run N seeds; print mean ± standard deviation"
    )
    train.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="RUN_FOLDER",
        help="resume a stopped run; without a folder, the newest run of the recipe",
    )
    train.add_argument(
        "--eval-only",
        action="store_true",
        help="only validate the networks of --resume RUN_FOLDER or teacher.checkpoint",
    )
    train.add_argument(
        "--runs",
        type=Path,
        default=Path("runs"),
        metavar="FOLDER",
        help="where run folders are created (default: runs)",
    )
    train.set_defaults(run=_train)

    from fastkd.train.commands import cache_teacher, export, plot

    _add_command(
        commands, "cache-teacher", cache_teacher, "store the teacher's logits, to train without the teacher"
    )
    _add_command(commands, "plot", plot, "compare runs in one figure")
    _add_command(commands, "export", export, "write the student as a state dict, program or ONNX model")

    recipes = commands.add_parser("recipes", help="list the recipes that come with fastkd")
    recipes.set_defaults(run=_recipes)
    doctor = commands.add_parser("doctor", help="show which backends work here, and why others do not")
    doctor.set_defaults(run=_doctor)

    _add_command(commands, "check", check_command, "check every loss on every backend here against float64")
    _add_command(commands, "bench", bench, "time the losses beside their peers; report and compare")
    return parser


def _add_command(commands: Any, name: str, module: Any, description: str) -> None:
    """A command of a module of its own, which has ``add_arguments(parser)`` and ``run(args)``."""
    parser = commands.add_parser(name, help=description)
    module.add_arguments(parser)
    parser.set_defaults(run=module.run)


def _train(args: argparse.Namespace) -> int:
    from fastkd.train.distributed import launched

    with launched():
        return _train_launched(args)


def _train_launched(args: argparse.Namespace) -> int:
    from fastkd.errors import RecipeError
    from fastkd.recipe.schema import load_recipe, without_effect
    from fastkd.train import distributed
    from fastkd.train.display.console import make_console
    from fastkd.train.run.folder import find_run
    from fastkd.train.run.results import print_results
    from fastkd.train.run.run import run_recipe
    from fastkd.train.run.seeds import is_seed_group, run_seeds, seed_count

    console = make_console(quiet=not distributed.is_first())
    runs: Path = args.runs
    folder: Path | None = Path(args.resume) if args.resume else None
    count: int | None = args.seeds
    if count and distributed.world() > 1:
        raise RecipeError("--seeds needs a single process; start each seed on its own: train.seed=…")
    if folder is not None:
        if count or any("=" not in word for word in args.words):
            raise RecipeError(
                "--resume RUN_FOLDER takes neither a recipe nor --seeds; train.epochs=N may follow"
            )
        if not (folder / "recipe.yaml").is_file():
            raise RecipeError(f"--resume {folder}: not a run folder (it has no recipe.yaml)")
        if args.words and is_seed_group(folder):
            raise RecipeError(
                f"--resume {folder}: a group of seeds; extend each run on its own, --resume {folder}/seed-0 …"
            )
        name, recipe = load_recipe(str(folder / "recipe.yaml"), args.words)
        # Teachers are stored beside the runs that use them.
        runs = folder.parent
        count = seed_count(folder) if is_seed_group(folder) else None
        if is_seed_group(runs):
            runs = runs.parent
    else:
        if not args.words or "=" in args.words[0]:
            raise RecipeError(
                "the recipe is missing; `fastkd recipes` lists them, for example: fastkd train glyphs/kd"
            )
        name, recipe = load_recipe(args.words[0], args.words[1:])
        for note in without_effect(recipe, args.words[1:]):
            console.print(note, markup=False)
        if args.resume is not None:
            if count:
                raise RecipeError("--resume with --seeds needs the run folder")
            folder = distributed.from_first(find_run(runs, name, recipe) if distributed.is_first() else None)
            console.print(f"resuming {folder}" if folder else "no run of this recipe yet", markup=False)
    if args.eval_only:
        from fastkd.train.commands.evaluate import evaluate_networks

        evaluate_networks(name, recipe, folder, console)
        return 0

    if count is None:
        summaries = [run_recipe(name, recipe, runs=runs, console=console, folder=folder)]
        folder = Path(summaries[0]["folder"])
    else:
        folder, summaries = run_seeds(name, recipe, count, runs=runs, console=console, folder=folder)
    try:
        print_results(summaries, recipe, folder, runs, console)
    except Exception as error:  # the run is complete: a table must not make it fail
        console.print(
            f"the table of results could not be shown: {type(error).__name__}: {error}", markup=False
        )
    console.print(f"run folder: {folder}", soft_wrap=True, markup=False)
    return 0


def _recipes(args: argparse.Namespace) -> int:
    from fastkd.recipe.files import shipped_recipes
    from fastkd.recipe.schema import load_recipe

    loaded = {name: load_recipe(name)[1] for name in shipped_recipes()}
    width = max(map(len, loaded), default=0)
    for name, recipe in loaded.items():
        print(f"{name:{width}}  {recipe.description}")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from fastkd import doctor

    print(doctor.report())
    return 0
