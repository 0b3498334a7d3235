"""Results of a run or of several seeds, compared with the teacher and the student trained alone."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from fastkd.distill import CrossEntropy
from fastkd.recipe.files import dump_scalar, shipped_recipes
from fastkd.recipe.schema import load_recipe, valid_keys
from fastkd.recipe.sections import Recipe
from fastkd.train.display.console import results_table, time_table

from .folder import is_summary, read_json

_ALONE = ("data.", "student.", "train.")  # settings that a student alone shares with a distilled one


def print_results(
    summaries: Sequence[dict[str, Any]], recipe: Recipe, folder: Path, runs: Path, console: Console
) -> None:
    """Print tables of accuracy (mean ± sample standard deviation over seeds) and of time.

    ``folder`` is that of the run or of the group of seeds.
    """
    first = summaries[0]
    rows: list[tuple[str, str, str, str]] = []
    if first["teacher"]:
        best = first["teacher"].get("best_val_accuracy")
        last = first["teacher"]["val_accuracy"]
        top5 = first["teacher"].get("val_top5_accuracy")
        rows.append(("teacher", _percent(best), _percent(last), _percent(top5)))
    if not _is_alone(first):
        alone = student_alone(runs, first["comparison"])
        label = "student alone" + _over(alone)
        rows.append((label, *_accuracies(alone)) if alone else (label, "not known", "", ""))
        if not alone:
            command = student_alone_command(first["name"], recipe, folder, runs)
            hint = "" if command is None else f": run `{command}`"
            console.print(f"student alone is not known for these data and settings{hint}", soft_wrap=True)
    rows.append((f"{first['name']}{_over(summaries)}", *_accuracies(summaries)))
    console.print(results_table("results", rows))
    parts = first["seconds"]
    console.print(time_table({p: statistics.mean(s["seconds"][p] for s in summaries) for p in parts}))


def student_alone_command(name: str, recipe: Recipe, folder: Path, runs: Path) -> str | None:
    """The command that trains the same student on the same data with the same settings, without a teacher.

    None for a recipe of cross-entropy with a hint that is not beside a recipe of its student alone: no
    override takes away its teacher.
    """
    words = ["fastkd", "train"]
    alone = f"{name.partition('/')[0]}/student"
    if alone in shipped_recipes():
        base = load_recipe(alone)[1].flat()
        wanted = {key: value for key, value in recipe.flat().items() if key.startswith(_ALONE)}
        given = {key: value for key, value in wanted.items() if base.get(key) != value}
        known = valid_keys(CrossEntropy, type(recipe.data))  # of another kind of data than the base's
        given |= {key: None for key in base if key.startswith(_ALONE) and key in known and key not in wanted}
        words += [alone, *(f"{key}={dump_scalar(value)}" for key, value in given.items())]
    elif recipe.method == "cross_entropy":
        return None
    else:
        words += [str(folder / "recipe.yaml"), "method=cross_entropy"]
    if runs != Path("runs"):
        words += ["--runs", str(runs)]
    return shlex.join(words)


def student_alone(runs: Path, comparison: str) -> list[dict[str, Any]]:
    """Finished runs without a teacher that differ only in the method, the newest one per seed."""
    newest: dict[int, tuple[float, dict[str, Any]]] = {}
    for path in runs.glob("**/summary.json"):
        summary = read_json(path)
        if is_summary(summary) and _is_alone(summary) and summary["comparison"] == comparison:
            made = path.stat().st_mtime
            if made >= newest.get(summary["seed"], (made, {}))[0]:
                newest[summary["seed"]] = (made, summary)
    return [summary for _, (_, summary) in sorted(newest.items())]


def _is_alone(summary: dict[str, Any]) -> bool:
    """Whether it learned from labels alone: a hint beside the cross-entropy is from a teacher."""
    return summary["method"] == "cross_entropy" and not summary.get("teacher")


def _accuracies(summaries: Sequence[dict[str, Any]]) -> tuple[str, str, str]:
    """Of the best epoch, of the last, and top-5 of the last."""
    with_top5 = all("val_top5_accuracy" in summary["last"] for summary in summaries)
    return (
        _mean(summaries, "best"),
        _mean(summaries, "last"),
        _mean(summaries, "last", "val_top5_accuracy") if with_top5 else "",
    )


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"


def _mean(summaries: Sequence[dict[str, Any]], which: str, key: str = "val_accuracy") -> str:
    values = [100 * summary[which][key] for summary in summaries]
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def _over(summaries: Sequence[dict[str, Any]]) -> str:
    if len(summaries) < 2:
        return ""
    return f", seeds {', '.join(str(summary['seed']) for summary in summaries)}"
