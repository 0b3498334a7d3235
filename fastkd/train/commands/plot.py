"""`fastkd plot`: compare several runs in one figure."""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastkd.command import add_json, print_json
from fastkd.errors import TrainError
from fastkd.files.atomic import write_atomically
from fastkd.files.paths import user_path
from fastkd.files.regular import read_regular
from fastkd.imports import make_figure
from fastkd.train.display.console import make_console
from fastkd.train.display.curves import COLOURS
from fastkd.train.run.folder import is_seed_group, read_json

Records = list[dict[str, Any]]
# Colours for parts of time, distinct from those of runs.
_SHADES = ("#cfd4dc", "#9aa5b5", "#5c6b80", "#2b3442", "#e8e2d4", "#bfb59a")


class PlotError(TrainError):
    """A folder has no results, or the figure cannot be written."""


@dataclass(frozen=True)
class Shown:
    """One line of the figure: a run, or the seeds of a group."""

    label: str
    runs: list[Records]
    teacher: float | None = None  # its accuracy, if the run has one and knows it

    def mean(self, key: str) -> tuple[list[int], list[float], list[float], list[float]]:
        """Epochs, and mean, minimum and maximum over the seeds that have reached each epoch.

        All three are NaN, a gap in the figure, where the loss of a seed that diverged is not a finite number.
        """
        epochs = [record["epoch"] for record in max(self.runs, key=len)]
        values = [
            [records[number][key] for records in self.runs if number < len(records)]
            for number in range(len(epochs))
        ]
        values = [v if all(map(_is_number, v)) else [math.nan] for v in values]
        return (
            epochs,
            [statistics.mean(v) for v in values],
            [min(v) for v in values],
            [max(v) for v in values],
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders", nargs="+", type=user_path, metavar="RUN", help="run folders, or groups of seeds"
    )
    parser.add_argument(
        "--to", type=user_path, default=Path("comparison.png"), metavar="FILE", help="default: comparison.png"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    if os.path.lexists(args.to):
        raise PlotError(f"{args.to} already exists and is not overwritten; choose another file with --to")
    if args.to.suffix not in (".png", ".svg", ".pdf"):
        raise PlotError(f"--to {args.to}: expected a .png, .svg or .pdf file")
    shown = [read_shown(folder) for folder in args.folders]
    shown = _with_unique_labels(shown, args.folders)
    try:
        plot(shown, args.to)
    except TrainError:
        raise
    except Exception as error:  # matplotlib, its fonts or settings
        raise PlotError(f"{args.to} cannot be drawn: {type(error).__name__}: {error}") from error
    make_console(stderr=args.json).print(str(args.to), soft_wrap=True)
    if args.json:
        print_json({"file": str(args.to), "runs": [_summary(one) for one in shown]})
    return 0


def _summary(one: Shown) -> dict[str, Any]:
    last = {key: one.mean(key)[1][-1] for key in ("val_accuracy", "val_loss")}
    epochs = max(map(len, one.runs))
    return {
        "label": one.label, "seeds": len(one.runs), "epochs": epochs, "last": last,
        "teacher_accuracy": one.teacher,
    }  # fmt: skip


def read_shown(folder: Path) -> Shown:
    """Read the results so far of a run folder or a group of seeds. Raises ``PlotError``."""
    members = sorted(folder.glob("seed-*")) if is_seed_group(folder) else [folder]
    runs = [records for member in members if (records := _records(member))]
    if not runs:
        raise PlotError(f"{folder} holds no metrics.jsonl with a finished epoch; expected a run folder")
    facts = read_json(folder / "run.json")
    name = str(facts["name"]) if isinstance(facts, dict) and "name" in facts else folder.name
    teachers = [accuracy for member in members if (accuracy := _teacher_of(member)) is not None]
    label = f"{name}, {len(runs)} seeds" if len(runs) > 1 else name
    return Shown(label, runs, teachers[0] if teachers else None)


def _teacher_of(folder: Path) -> float | None:
    """From the summary of a finished run, else from what was known when its student's training began."""
    summary, facts = read_json(folder / "summary.json"), read_json(folder / "run.json")
    of_summary = summary.get("teacher") if isinstance(summary, dict) else None
    for known, key in ((of_summary, "val_accuracy"), (facts, "teacher_accuracy")):
        accuracy = known.get(key) if isinstance(known, dict) else None
        if _is_number(accuracy):
            return float(accuracy)  # type: ignore[arg-type]
    return None


def _records(folder: Path) -> Records:
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    try:
        records = [json.loads(line) for line in read_regular(path).decode("utf-8").splitlines()]
    except (OSError, ValueError, RecursionError) as error:
        raise PlotError(f"{path} cannot be read: {error}") from None
    for number, record in enumerate(records, start=1):
        if (key := _missing(record)) is not None:
            raise PlotError(
                f"{path}: line {number} has no number {key!r}; it is not a line of a run's metrics"
            )
    return records


def _missing(record: Any) -> str | None:
    """The first key of a record whose value cannot be plotted."""
    if not isinstance(record, dict):
        return "epoch"
    for key in ("epoch", "val_accuracy"):
        if not _is_number(record.get(key)):
            return key
    if not isinstance(record.get("val_loss"), int | float):  # NaN and infinity are those of a diverged run
        return "val_loss"
    seconds = record.get("seconds")
    if not isinstance(seconds, dict) or not all(map(_is_number, seconds.values())):
        return "seconds"
    return None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _with_unique_labels(shown: Sequence[Shown], folders: Sequence[Path]) -> list[Shown]:
    labels = [one.label for one in shown]
    return [
        replace(one, label=f"{one.label} ({folder.name})") if labels.count(one.label) > 1 else one
        for one, folder in zip(shown, folders, strict=True)
    ]


def plot(shown: Sequence[Shown], path: Path) -> None:
    """Plot accuracy, validation loss and time of each run; bands span the seeds of a group.

    Horizontal lines are the accuracies of the teachers.
    """
    figure = make_figure(figsize=(13, 4.2), layout="constrained")
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    accuracy, losses, seconds = figure.subplots(1, 3, width_ratios=(1.3, 1.3, 1))
    for number, one in enumerate(shown):
        colour = COLOURS[number % len(COLOURS)]
        style = {"color": colour, "linestyle": ("-", "--", ":")[number // len(COLOURS) % 3]}
        for axes, key in ((accuracy, "val_accuracy"), (losses, "val_loss")):
            epochs, mean, least, largest = one.mean(key)
            marker = "o" if len(epochs) < 40 else ""
            # Unescaped dollar signs start mathematical text.
            label = f"{number + 1}  {one.label}  {mean[-1]:.2%}".replace("$", r"\$")
            axes.plot(epochs, mean, marker=marker, markersize=3.5, label=label, **style)
            if len(one.runs) > 1:
                axes.fill_between(epochs, least, largest, color=colour, alpha=0.18, linewidth=0)
    _draw_teachers(accuracy, shown)
    accuracy.set(title="validation accuracy (last epoch in the legend)", xlabel="epoch")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0))
    losses.set(title="validation cross-entropy", xlabel="epoch")
    heights = [value for one in shown for value in one.mean("val_loss")[1] if not math.isnan(value)]
    if heights and min(heights) > 0 and max(heights) > 20 * min(heights):
        losses.set_yscale("log")  # one diverged run must not flatten the others
    places = range(len(shown))
    left = [0.0] * len(shown)
    parts = list(shown[0].runs[0][0]["seconds"])
    for part, colour in zip(parts, _SHADES, strict=False):
        values = [_seconds(one, part) for one in shown]
        seconds.barh(places, values, left=left, color=colour, label=part)
        left = [low + value for low, value in zip(left, values, strict=True)]
    seconds.set(title="seconds per epoch", xlim=(0, 1.05 * max(left)))
    seconds.set_yticks(list(places), [f"{number + 1}" for number in places])
    seconds.invert_yaxis()
    figure.legend(*accuracy.get_legend_handles_labels(), loc="outside lower left", frameon=False, ncols=2)
    figure.legend(*seconds.get_legend_handles_labels(), loc="outside lower right", frameon=False, ncols=3)
    for axes in (accuracy, losses):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(axis="y", alpha=0.25)
    for axes in (accuracy, losses, seconds):
        axes.spines[["top", "right"]].set_visible(False)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=120))


def _draw_teachers(axes: Any, shown: Sequence[Shown]) -> None:
    """A horizontal line for each accuracy of a teacher, labelled at its left end."""
    students: dict[float, list[int]] = {}
    for number, one in enumerate(shown, start=1):
        if one.teacher is not None:
            students.setdefault(one.teacher, []).append(number)
    for accuracy, numbers in students.items():
        of = "" if len(students) == 1 else f" of {', '.join(map(str, numbers))}"
        axes.axhline(accuracy, color="0.45", linewidth=1, linestyle=(0, (6, 3)))
        axes.annotate(
            f"teacher{of} {accuracy:.2%}", (0.01, accuracy), xycoords=("axes fraction", "data"),
            xytext=(0, 3), textcoords="offset points", color="0.35", fontsize="small",
        )  # fmt: skip


def _seconds(one: Shown, part: str) -> float:
    return statistics.mean(record["seconds"].get(part, 0.0) for records in one.runs for record in records)
