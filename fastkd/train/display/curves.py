"""The figure of a run: accuracy, loss terms and time by epoch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastkd.files.atomic import write_atomically
from fastkd.imports import make_figure
from fastkd.train.evaluation import best_of
from fastkd.train.meters import PARTS

# Okabe and Ito's palette, distinguishable for colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def plot_curves(
    history: Sequence[dict[str, Any]],
    path: Path,
    *,
    title: str,
    teacher_accuracy: float | None = None,
) -> None:
    """Write a PNG with three panels to ``path``, atomically. ``history`` is that of ``FitResult``."""
    figure = make_figure(figsize=(13, 4), layout="constrained")
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    # Without parse_math=False dollar signs in a name would start mathematical text.
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", parse_math=False)
    accuracy, losses, seconds = figure.subplots(1, 3, width_ratios=(1.2, 1.2, 1))
    epochs = [record["epoch"] for record in history]
    marker = "o" if len(epochs) < 40 else ""

    for key, label, style in (
        ("val_accuracy", "validation", {"color": COLOURS[0]}),
        ("train_accuracy", "training (augmented)", {"color": COLOURS[0], "alpha": 0.4, "linestyle": "--"}),
    ):
        values = [record.get(key, math.nan) for record in history]
        if not all(map(math.isnan, values)):
            accuracy.plot(epochs, values, marker=marker, markersize=4, label=label, **style)
    best = best_of(history)
    if best is not None:
        # In the legend: text beside the point could lie across a line.
        accuracy.plot(
            [best["epoch"]], [best["val_accuracy"]], marker="o", markersize=10, fillstyle="none",
            linestyle="", color=COLOURS[0], label=f"best epoch {best['val_accuracy']:.2%}",
        )  # fmt: skip
    if teacher_accuracy is not None:
        accuracy.axhline(teacher_accuracy, color="0.45", linewidth=1, label=f"teacher {teacher_accuracy:.2%}")
    accuracy.set(title="accuracy", ylim=(0, 1), xlabel="epoch")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0))
    accuracy.legend(frameon=False)

    terms = list(dict.fromkeys(name for record in history for name in record["terms"]))
    if len(terms) != 1:
        losses.plot(epochs, [r["loss"] for r in history], color="0.2", label="loss", linewidth=2)
    for name, colour in zip(terms, COLOURS * len(terms), strict=False):
        values = [r["terms"].get(name, float("nan")) for r in history]
        losses.plot(epochs, values, marker=marker, markersize=4, color=colour, label=name)
    losses.set(title="training loss and its terms", xlabel="epoch")
    # A logarithmic scale shows small terms, but a term may be exactly 0.
    if all(value > 0 for r in history for value in (r["loss"], *r["terms"].values())):
        losses.set_yscale("log")
    losses.legend(frameon=False)

    bottom = [0.0] * len(history)
    for part, colour in zip(PARTS, COLOURS, strict=False):
        values = [r["seconds"][part] for r in history]
        if any(values):
            seconds.bar(epochs, values, bottom=bottom, color=colour, width=0.8, label=part)
            bottom = [low + value for low, value in zip(bottom, values, strict=True)]
    seconds.set(title="seconds per epoch", xlabel="epoch", ylim=(0, 1.35 * max(bottom)))
    seconds.legend(frameon=False, ncols=3, loc="upper center", fontsize="small")

    for axes in (accuracy, losses, seconds):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=120))
