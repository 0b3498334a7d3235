"""`fastkd train`: train a recipe, show its keys, print it or try it. Torch is imported after `--help`."""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastkd.command import add_json, positive, print_json
from fastkd.files.paths import user_path

if TYPE_CHECKING:
    from rich.console import Console

    from fastkd.recipe.sections import Recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train a recipe: first the teacher if it is not trained yet, then the student. `fastkd train RECIPE "
        "--help` lists the recipe's keys with type, default and meaning."
    )
    parser.add_argument("-h", "--help", action="store_true", help="this text; with a recipe, its keys")
    parser.add_argument(
        "words",
        nargs="*",
        metavar="RECIPE [key=value …]",
        help="a name that `fastkd recipes` lists or a .yaml file, then overrides such as train.epochs=3",
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--print", action="store_true", help="only print the recipe with overrides, as YAML")
    instead.add_argument(
        "--dry-run",
        action="store_true",
        help="only try it: data, networks, a training step and a validation batch; no run folder",
    )
    instead.add_argument(
        "--eval-only",
        action="store_true",
        help="only validate the networks of --resume RUN_FOLDER or teacher.checkpoint",
    )
    parser.add_argument("--seeds", type=positive, metavar="N", help="run N seeds; print mean ± deviation")
    parser.add_argument(
        "--resume",
        nargs="?",
        type=os.path.expanduser,
        const="",
        metavar="RUN_FOLDER",
        help="resume a stopped run; without a folder, the newest run of the recipe",
    )
    parser.add_argument(
        "--runs",
        type=user_path,
        default=Path("runs"),
        metavar="FOLDER",
        help="where run folders are created (default: runs)",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    if args.help or args.print:
        return _show(args)
    from fastkd.train.distributed import launched

    with launched():
        return _run_launched(args)


def _show(args: argparse.Namespace) -> int:
    """The keys of the recipe, or the recipe itself, without training."""
    from fastkd.recipe.files import dump_flat_yaml
    from fastkd.recipe.help import help_text
    from fastkd.recipe.schema import load_recipe

    words = args.words
    if args.resume:
        words = [str(Path(args.resume) / "recipe.yaml"), *words]
    name, recipe = load_recipe(_recipe_of(words), words[1:])
    if args.help:
        print(help_text(words[0], words[1:], recipe, shutil.get_terminal_size().columns))
    elif args.json:
        print_json({"name": name, "recipe": recipe.flat()})
    else:
        print(dump_flat_yaml(recipe.flat()), end="")
    return 0


def _recipe_of(words: list[str]) -> str:
    from fastkd.errors import RecipeError

    if not words or "=" in words[0]:
        raise RecipeError(
            "the recipe is missing; `fastkd recipes` lists them, for example: fastkd train glyphs/kd"
        )
    return words[0]


def _run_launched(args: argparse.Namespace) -> int:
    from fastkd.errors import RecipeError
    from fastkd.messages import resume_command
    from fastkd.recipe.schema import load_recipe, without_effect
    from fastkd.train import distributed
    from fastkd.train.display.console import make_console
    from fastkd.train.run.agreement import check_command
    from fastkd.train.run.folder import is_seed_group
    from fastkd.train.run.resume import find_run
    from fastkd.train.run.seeds import seed_count

    console = make_console(quiet=not distributed.is_first(), stderr=args.json)
    runs: Path = args.runs
    folder: Path | None = Path(args.resume) if args.resume else None
    count: int | None = args.seeds
    if folder is not None:
        if count or any("=" not in word for word in args.words):
            raise RecipeError(
                "--resume RUN_FOLDER takes neither a recipe nor --seeds; train.epochs=N may follow"
            )
        if not (folder / "recipe.yaml").is_file():
            raise RecipeError(f"--resume {folder}: not a run folder (it has no recipe.yaml)")
        if args.words and is_seed_group(folder):
            raise RecipeError(
                f"--resume {folder}: a group of seeds; extend each run on its own: "
                f"{resume_command(folder / 'seed-0')} …"
            )
        name, recipe = load_recipe(str(folder / "recipe.yaml"), args.words)
        check_command(args, recipe)
        # Teachers are stored beside the runs that use them.
        runs = _above(folder)
        if is_seed_group(runs):
            runs = _above(runs)
    else:
        name, recipe = load_recipe(_recipe_of(args.words), args.words[1:])
        check_command(args, recipe)
        for note in without_effect(recipe, args.words[1:]):
            console.print(note)
        if args.resume is not None:
            if count:
                raise RecipeError(
                    "--resume takes no --seeds, since a group has its own number of them: leave out --seeds "
                    "to resume the newest run or group of the recipe, or --resume to start a new one"
                )
            found = find_run(runs, name, recipe) if distributed.is_first() else None
            folder, nearest = distributed.from_first(found)
            unknown = "no run of this recipe yet" + (f": {nearest}" if nearest else "")
            console.print(f"resuming {folder}" if folder else unknown, soft_wrap=True)
    if folder is not None and is_seed_group(folder):
        if args.eval_only:
            raise RecipeError(
                f"--eval-only: {folder} is a group of seeds; name one of its runs: --resume {folder}/seed-…"
            )
        count = seed_count(folder)
    if count and distributed.world() > 1:
        raise RecipeError("--seeds needs a single process; start each seed on its own: train.seed=…")
    summary = _summary_of(args, name, recipe, count, runs, folder, console)
    if args.json and distributed.is_first():
        print_json(summary)
    return 0


def _above(folder: Path) -> Path:
    """The folder that ``folder`` is in, also of ``.`` and ``..``, whose ``parent`` is ``.``."""
    return folder.parent if folder.name not in ("", "..") else Path(os.path.abspath(folder)).parent


def _summary_of(
    args: argparse.Namespace,
    name: str,
    recipe: Recipe,
    count: int | None,
    runs: Path,
    folder: Path | None,
    console: Console,
) -> dict[str, Any]:
    """Validate, try or train, as asked for."""
    from fastkd.train.run.results import print_results
    from fastkd.train.run.run import run_recipe
    from fastkd.train.run.seeds import run_seeds

    if args.eval_only:
        from fastkd.train.commands.evaluate import evaluate_networks

        return evaluate_networks(name, recipe, folder, console)
    if args.dry_run:
        from fastkd.train.commands.dry_run import dry_run

        return dry_run(name, recipe, runs, console, seeds=count or 1, folder=folder)
    if count is None:
        summaries = [run_recipe(name, recipe, runs=runs, console=console, folder=folder)]
        folder = Path(summaries[0]["folder"])
    else:
        folder, summaries = run_seeds(name, recipe, count, runs=runs, console=console, folder=folder)
    try:
        print_results(summaries, recipe, folder, runs, console)
    except Exception as error:  # the run is complete: a table must not make it fail
        console.print(f"the table of results could not be shown: {type(error).__name__}: {error}")
    console.print(f"run folder: {folder}", soft_wrap=True)
    return summaries[0] if count is None else {"name": name, "folder": str(folder), "seeds": summaries}
