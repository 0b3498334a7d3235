"""The pictures of a report: times by shape and by classes, the roofline, the parts of training steps."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastkd.bench.cases import DTYPES, FASTKD
from fastkd.bench.peers import VARIANTS
from fastkd.bench.results import Record
from fastkd.imports import make_figure
from fastkd.ops.plan import ELEMENT_BYTES

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = {
    "fastkd": "#0072B2",
    "native": "#56B4E9",
    "triton": "#56B4E9",
    "fastkd-compiled": "#F0E442",
    "fastkd-in-place": "#D55E00",
    "eager": "#999999",
    "compiled": "#E69F00",
    "liger": "#009E73",
    "quack": "#CC79A7",
}
PART_COLOURS = ("#F0E442", "#E69F00", "#56B4E9", "#D55E00", "#009E73", "#999999")
MARKERS = dict(zip(FASTKD, itertools.cycle("os^DvPX*<>hp"), strict=False))
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
                path = folder / f"{stem}-times-{dtype}-{mode.replace('+', '-')}.png"
                _times(chosen, title, path)
                pictures.append((f"Time of each variant: {title}", path))
                pictures += _of_rows(chosen, header["name"], folder, path.stem)
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
    figure = make_figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return figure


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)


def _times(rows: Sequence[Record], title: str, path: Path) -> None:
    """One panel per loss, a column per shape, a dot per variant; whiskers: p20 to p80, dash: the floor."""
    losses = list(dict.fromkeys(row["loss"] for row in rows))
    all_shapes = sorted(
        {(row["rows"], row["classes"]) for row in rows}, key=lambda shape: shape[0] * shape[1]
    )
    variants = [name for name in VARIANTS if any(row["variant"] == name for row in rows)]
    across = min(2, len(losses))
    down = -(-len(losses) // across)
    figure = _figure(across * max(4.5, 1.1 * len(all_shapes) + 1.5), 3.2 * down + 0.6, title)
    panels = figure.subplots(down, across, squeeze=False).flat
    width = 0.6 / len(variants)
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
            # With few turns a percentile may equal the median; rounding must not make a whisker negative.
            whiskers = [
                [max(r["ms"] - r["p20"], 0.0) for r in records],
                [max(r["p80"] - r["ms"], 0.0) for r in records],
            ]
            axes.errorbar(
                [x + (place - (len(variants) - 1) / 2) * width for x in at],
                [r["ms"] for r in records],
                whiskers,
                fmt="o",
                color=COLOURS[variant],
                label=variant,
                ecolor="0.25",
                elinewidth=0.8,
            )
            if variant == "fastkd":
                floors = [r["bytes"] / r["bandwidth"] * 1e3 for r in records]
                axes.hlines(
                    floors,
                    [x - 0.4 for x in at],
                    [x + 0.4 for x in at],
                    colors="black",
                    linewidth=1.4,
                    label="floor: bytes at the bandwidth of a copy",
                )
        axes.set_yscale("log")
        axes.set_title(loss, loc="left", fontsize="medium")
        axes.set_ylabel("ms, logarithmic")
        axes.set_xticks(range(len(shapes)), [f"{n} x\n{c:,}" for n, c in shapes], fontsize="small")
        axes.set_xlim(-0.6, len(shapes) - 0.4)
        _tidy(axes)
    for axes in list(panels)[len(losses) :]:
        axes.set_visible(False)
    _legend_below(figure)
    figure.savefig(path, dpi=110)


def _legend_below(figure: Any, **options: Any) -> None:
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=len(handles),
        frameon=False,
        **options,
    )


# ---- time and memory against the number of classes ------------------------------------------------------

# Numbers of classes at equal rows from which a curve is drawn.
_CURVE = 4
_THEMES = {"light": ("white", "black"), "dark": ("#0d1117", "#e6edf3")}


def _of_rows(rows: Sequence[Record], name: str, folder: Path, stem: str) -> list[tuple[str, Path]]:
    """Curves over the classes, for each loss and number of rows that has enough of them."""
    pictures = []
    for loss, count in dict.fromkeys((row["loss"], row["rows"]) for row in rows):
        chosen = [row for row in rows if (row["loss"], row["rows"]) == (loss, count)]
        if len({row["classes"] for row in chosen}) < _CURVE:
            continue
        for theme in _THEMES:
            path = folder / f"{stem}-{loss}-{count}-{theme}.png"
            _by_classes(chosen, f"{loss}, {count} rows, {chosen[0]['dtype']}, {name}", path, theme)
            pictures.append((f"Time and memory by classes, {theme}", path))
    return pictures


def _by_classes(rows: Sequence[Record], title: str, path: Path, theme: str) -> None:
    """Two panels: milliseconds with the floor, and megabytes beyond the inputs, over the classes."""
    from matplotlib import rc_context

    ground, ink = _THEMES[theme]
    with_gradient = rows[0]["pass"] == "forward+backward"
    colours: dict[Any, str] = {"figure.facecolor": ground, "axes.facecolor": ground, "text.color": ink}
    for part in ("axes.label", "axes.edge", "axes.title", "xtick.", "ytick."):
        colours[f"{part}color"] = ink
    with rc_context(colours):
        figure = _figure(9.5, 4.0, title)
        times, memory = figure.subplots(1, 2)
        for variant in (name for name in VARIANTS if any(row["variant"] == name for row in rows)):
            records = sorted(
                (row for row in rows if row["variant"] == variant), key=lambda row: row["classes"]
            )
            classes = [row["classes"] for row in records]
            style = {"color": COLOURS[variant], "marker": "o", "label": variant, "linewidth": 1.8}
            times.plot(classes, [row["ms"] for row in records], **style)
            known = [row for row in records if row["extra_bytes"] is not None]
            memory.plot(
                [row["classes"] for row in known], [row["extra_bytes"] / 1e6 for row in known], **style
            )
            if variant == "fastkd":
                floor = {"color": ink, "linewidth": 1.2, "linestyle": "--"}
                times.plot(
                    classes,
                    [row["bytes"] / row["bandwidth"] * 1e3 for row in records],
                    label="floor: three accesses, or the gradient"
                    if with_gradient
                    else "floor: two accesses",
                    **floor,
                )
                if with_gradient:
                    width = ELEMENT_BYTES[DTYPES[records[0]["dtype"]]]
                    sizes = [row["rows"] * row["classes"] * width / 1e6 for row in records]
                    memory.plot(classes, sizes, **floor)
        words = WORDS[rows[0]["pass"]]
        for axes, label in ((times, f"ms, {words}"), (memory, "MB beyond the logits")):
            axes.set(xscale="log", yscale="log", xlabel="classes", ylabel=label)
            _tidy(axes)
        _legend_below(figure, labelcolor=ink)
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
            ha="left",
            va="top",
            fontsize="small",
            xytext=(8, 0),
            textcoords="offset points",
        )
    if any(row["bytes"] / row["ms"] / 1e6 > 1.02 * min(row["bytes"] / call, roof) / 1e9 for row in rows):
        axes.annotate(
            "Above the line: part of what such a case reads is still in a cache,\n"
            "and the copy's bandwidth varies within a run.",
            (0.99, 0.02),
            xycoords="axes fraction",
            ha="right",
            va="bottom",
            fontsize="small",
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
    _legend_below(figure)
    figure.savefig(path, dpi=110)
