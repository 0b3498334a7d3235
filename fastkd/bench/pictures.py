"""The pictures of a report: bars for each shape, the roofline, the split of training steps."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastkd.bench.cases import LOSSES
from fastkd.bench.peers import VARIANTS
from fastkd.bench.results import Record

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = {
    "fastkd": "#0072B2",
    "native": "#56B4E9",
    "triton": "#56B4E9",
    "eager": "#999999",
    "compiled": "#E69F00",
    "liger": "#009E73",
    "quack": "#CC79A7",
}
PART_COLOURS = ("#F0E442", "#E69F00", "#56B4E9", "#D55E00", "#009E73", "#999999")
MARKERS = dict(zip(LOSSES, itertools.cycle("os^DvPX*<>hp"), strict=False))
WORDS = {"forward": "loss alone", "forward+backward": "loss and gradient"}


def draw(
    header: dict[str, Any], rows: Sequence[Record], steps: Sequence[Record], folder: Path, stem: str
) -> list[tuple[str, Path]]:
    """Draw all pictures into ``folder``; return (caption, path) of each."""
    pictures = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        for mode in dict.fromkeys(row["pass"] for row in rows):
            chosen = [row for row in rows if row["dtype"] == dtype and row["pass"] == mode]
            if chosen:
                title = f"{header['name']}, {dtype}, {WORDS[mode]}"
                path = folder / f"{stem}-bars-{dtype}-{mode.replace('+', '-')}.png"
                _bars(chosen, title, path)
                pictures.append((f"Time of each variant: {title}", path))
    if rows:
        path = folder / f"{stem}-roofline.png"
        _roofline(rows, f"{header['name']}: achieved bandwidth", path)
        pictures.append(("Roofline: one point per kernel", path))
    if steps:
        path = folder / f"{stem}-steps.png"
        _steps(steps, f"{header['name']}: a training step", path)
        pictures.append(("Split of a training step", path))
    return pictures


def _figure(width: float, height: float, title: str) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Figure and canvas directly: pyplot would keep global state and look for a display.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return figure


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)


def _bars(rows: Sequence[Record], title: str, path: Path) -> None:
    """One panel per loss, one group per shape, one bar per variant; whiskers: p20 to p80, dash: the floor."""
    losses = list(dict.fromkeys(row["loss"] for row in rows))
    all_shapes = sorted(
        {(row["rows"], row["classes"]) for row in rows}, key=lambda shape: shape[0] * shape[1]
    )
    variants = [name for name in VARIANTS if any(row["variant"] == name for row in rows)]
    across = min(2, len(losses))
    down = -(-len(losses) // across)
    figure = _figure(across * max(4.5, 1.1 * len(all_shapes) + 1.5), 3.2 * down + 0.6, title)
    panels = figure.subplots(down, across, squeeze=False).flat
    width = 0.8 / len(variants)
    for axes, loss in zip(panels, losses, strict=False):
        shapes = [
            s for s in all_shapes if any((r["loss"], r["rows"], r["classes"]) == (loss, *s) for r in rows)
        ]
        for place, variant in enumerate(variants):
            found = {
                (r["rows"], r["classes"]): r for r in rows if (r["loss"], r["variant"]) == (loss, variant)
            }
            at = [x for x, shape in enumerate(shapes) if shape in found]
            records = [found[shapes[x]] for x in at]
            if not records:
                continue
            values = [r["ms"] for r in records]
            # With few turns a percentile may equal the median; rounding must not make a whisker negative.
            whiskers = [
                [max(r["ms"] - r["p20"], 0.0) for r in records],
                [max(r["p80"] - r["ms"], 0.0) for r in records],
            ]
            axes.bar(
                [x + (place - (len(variants) - 1) / 2) * width for x in at],
                values,
                width,
                yerr=whiskers,
                color=COLOURS[variant],
                label=variant,
                error_kw={"linewidth": 0.8, "ecolor": "0.25"},
            )
            if variant == "fastkd":
                floors = [r["bytes"] / r["bandwidth"] * 1e3 for r in records]
                axes.hlines(
                    floors,
                    [x - 0.45 for x in at],
                    [x + 0.45 for x in at],
                    colors="black",
                    linewidth=1.4,
                    label="floor: bytes at the bandwidth of a copy",
                )
        axes.set_yscale("log")
        axes.set_title(loss, loc="left", fontsize="medium")
        axes.set_ylabel("ms, logarithmic")
        axes.set_xticks(range(len(shapes)), [f"{n} x\n{c:,}" for n, c in shapes], fontsize="small")
        _tidy(axes)
    for axes in list(panels)[len(losses) :]:
        axes.set_visible(False)
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False
    )
    figure.savefig(path, dpi=110)


def _roofline(rows: Sequence[Record], title: str, path: Path) -> None:
    """Bandwidth over the bytes of the floor.

    All these losses do about the same arithmetic per byte, so the axis is the size: small cases are bounded
    by the time of a call, large ones by the bandwidth of a copy.
    """
    figure = _figure(9.5, 5.6, title)
    axes = figure.subplots()
    rows = [row for row in rows if row["variant"] != "quack"]
    sizes = [row["bytes"] for row in rows]
    low, high = min(sizes) / 2, max(sizes) * 2
    roof = sorted(row["bandwidth"] for row in rows)[len(rows) // 2]
    call = min(row["ms"] for row in rows) * 1e-3
    corner = roof * call
    line = [low, min(max(corner, low), high), high]
    axes.plot(line, [min(size / call, roof) / 1e9 for size in line], color="black", linewidth=1.4)
    axes.annotate(
        f"a copy: {roof / 1e9:.3g} GB/s", (high, roof / 1e9), ha="right", va="bottom", fontsize="small"
    )
    if corner > low:
        middle = (low * min(corner, high)) ** 0.5
        axes.annotate(
            f"the fastest call: {call * 1e6:.3g} us",
            (middle, middle / call / 1e9),
            ha="right",
            va="bottom",
            fontsize="small",
            xytext=(-4, 4),
            textcoords="offset points",
        )
    for variant in VARIANTS:
        for loss in MARKERS:
            for mode, filled in (("forward+backward", True), ("forward", False)):
                chosen = [r for r in rows if (r["variant"], r["loss"], r["pass"]) == (variant, loss, mode)]
                if chosen:
                    axes.scatter(
                        [r["bytes"] for r in chosen],
                        [r["bytes"] / r["ms"] / 1e6 for r in chosen],
                        s=30,
                        marker=MARKERS[loss],
                        edgecolors=COLOURS[variant],
                        linewidths=1.1,
                        alpha=0.9,
                        facecolors=COLOURS[variant] if filled else "none",
                        zorder=3 if variant == "fastkd" else 2,
                    )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="bytes of the floor: three accesses per element, two without gradient",
        ylabel="achieved GB/s",
        xlim=(low, high),
    )
    _legend(axes, rows)
    _tidy(axes)
    axes.grid(axis="x", alpha=0.25)
    figure.savefig(path, dpi=110)


def _legend(axes: Any, rows: Iterable[Record]) -> None:
    from matplotlib.lines import Line2D

    rows = list(rows)
    keys = [
        Line2D([], [], color=COLOURS[name], marker="o", linestyle="", label=name)
        for name in VARIANTS
        if any(row["variant"] == name for row in rows)
    ]
    keys += [
        Line2D([], [], color="0.3", marker=marker, linestyle="", markerfacecolor="none", label=loss)
        for loss, marker in MARKERS.items()
        if any(row["loss"] == loss for row in rows)
    ]
    if {row["pass"] for row in rows} == {"forward", "forward+backward"}:
        keys.append(Line2D([], [], linestyle="", label="filled: with gradient"))
    axes.legend(handles=keys, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize="small")


def _steps(steps: Sequence[Record], title: str, path: Path) -> None:
    """One bar per step and variant, split into the parts of the step."""
    names = list(dict.fromkeys(record["step"] for record in steps))
    figure = _figure(max(5.0, 4.2 * len(names)), 4.2, title)
    panels = figure.subplots(1, len(names), squeeze=False).flat
    for axes, name in zip(panels, names, strict=True):
        rows = [record for record in steps if record["step"] == name]
        for x, record in enumerate(rows):
            bottom = 0.0
            for colour, (part, value) in zip(PART_COLOURS, record["split_ms"].items(), strict=False):
                axes.bar(x, value, 0.7, bottom=bottom, color=colour, label=part if x == 0 else None)
                bottom += value
            axes.annotate(
                f"loss\n{record['loss_share']:.1%}",
                (x, bottom),
                ha="center",
                va="bottom",
                fontsize="small",
                xytext=(0, 3),
                textcoords="offset points",
            )
        axes.set_xticks(range(len(rows)), [record["variant"] for record in rows])
        axes.set_title(f"{name}, batch {rows[0]['batch']}", loc="left", fontsize="medium")
        axes.set_ylabel("ms per step")
        axes.margins(y=0.15)
        _tidy(axes)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=110)
