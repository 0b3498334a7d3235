"""`fastkd demo`: a teacher, a student trained alone and a student trained with the teacher, on letters."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastkd import environment
from fastkd.command import add_json, print_json
from fastkd.errors import RecipeError, StorageError
from fastkd.files.paths import user_path

# A to Z and a to z of the DejaVu faces that come with matplotlib: 52 classes, three held-out faces. Chosen so
# that all three trainings take seconds and the student is too small to learn all the teacher knows. One
# thread: on cores that are busy, threads that wait for each other take many times as long.
_DATA = ["data.characters=41-5A,61-7A", "train.device=cpu", "train.batch_size=64", "train.threads=1"]
_STUDENT = [*_DATA, "student.width=2", "train.epochs=10", "train.lr=0.01"]
_TEACHER = ["teacher.width=8", "teacher.epochs=8", "teacher.lr=0.01"]
_DISTILL = ["method.ce_weight=0.1", "method.kd_weight=0.9", "method.temperature=4"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train a teacher on letters, a small student on the labels, and the same student with the teacher; "
        "show a table and draw a figure. Needs no data but matplotlib's fonts, and half a minute on a CPU."
    )
    parser.add_argument(
        "--to",
        type=user_path,
        metavar="FOLDER",
        help="a new folder for runs and figure (default: fastkd-demo-001 or the next free number)",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    began = time.perf_counter()
    if (processes := environment.count("WORLD_SIZE", 1, least=1)) > 1:
        raise RecipeError(
            f"demo runs in one process, but WORLD_SIZE is {processes}: start it without torchrun"
        )
    from fastkd.recipe.schema import load_recipe
    from fastkd.train.display.console import make_console, results_table
    from fastkd.train.evaluation import ACCURACIES
    from fastkd.train.run.folder import create_run_folder
    from fastkd.train.run.run import run_recipe

    console = make_console(stderr=args.json)
    folder = create_run_folder(Path(), "fastkd-demo") if args.to is None else _new_folder(args.to)
    runs = folder / "runs"
    _, alone = load_recipe("glyphs/student", _STUDENT)
    _, taught = load_recipe("glyphs/kd", [*_STUDENT, *_TEACHER, *_DISTILL])
    summaries = [
        run_recipe(name, recipe, runs=runs, console=console)
        for name, recipe in (("student alone", alone), ("student with teacher", taught))
    ]
    teacher = summaries[1]["teacher"]
    measured = {"teacher": teacher, **{one["name"]: one["last"] for one in summaries}}
    rows = [(name, "", *(f"{100 * last[key]:.2f}" for key in ACCURACIES)) for name, last in measured.items()]
    console.print(results_table("letters of three faces that no network has seen, one seed", rows))
    figure = folder / "demo.png"
    drawn = _draw(summaries, figure, console)
    seconds = time.perf_counter() - began
    console.print(f"figure: {figure}\n" if drawn else "", end="", soft_wrap=True)
    console.print(f"runs: {runs}\n{seconds:.0f} seconds; next: fastkd recipes", soft_wrap=True)
    if args.json:
        accuracies = {name: last["val_accuracy"] for name, last in measured.items()}
        print_json(
            {
                "folder": str(folder), "figure": str(figure) if drawn else None, "seconds": seconds,
                "accuracy": accuracies,
            }
        )  # fmt: skip
    return 0


def _new_folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        raise StorageError(
            f"--to {path}: it already exists and is not overwritten; name a new folder"
        ) from None
    except OSError as error:
        raise StorageError(f"--to {path}: cannot be created: {error.strerror}") from None
    return path


def _draw(summaries: Sequence[dict[str, Any]], path: Path, console: Any) -> bool:
    """The figure of `fastkd plot`; a failure is one line, since the results are known."""
    from fastkd.train.commands.plot import plot, read_shown

    try:
        plot([read_shown(Path(summary["folder"])) for summary in summaries], path)
    except Exception as error:  # fonts, settings, a full disk
        console.print(f"{path} could not be drawn: {type(error).__name__}: {error}")
        return False
    return True
