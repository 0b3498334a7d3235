"""Turn result files into a Markdown report with pictures, in a new folder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastkd.bench import forms, paths, peers
from fastkd.bench.results import CASE, Record, ResultFileError, by_case, name_of, read
from fastkd.imports import import_matplotlib

# A loss with less than this share of a step cannot matter much.
SMALL_SHARE = 0.05


def write_report(files: Sequence[Path], folder: Path) -> Path:
    """Write ``report.md`` and its pictures into ``folder``, which must be new; return the report's path.

    Each file gets a section of its own: times of different runs do not belong in one table.
    """
    runs = [read(path) for path in files]
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise ResultFileError(f"{folder} exists; a report is written into a new folder") from None
    parts = ["# Benchmark report\n"]
    for number, (path, (header, records)) in enumerate(zip(files, runs, strict=True), start=1):
        parts.append(_run_section(path.name, header, records, folder, f"run{number}"))
    report = folder / "report.md"
    report.write_text("\n".join(parts), encoding="utf-8")
    return report


def _run_section(name: str, header: dict[str, Any], records: list[Record], folder: Path, stem: str) -> str:
    parts = [f"## {header['name']}: {name}\n", _about(header)]
    measured = [record for record in records if record["kind"] == "loss"]
    steps = [record for record in records if record["kind"] == "step"]
    layers = [record for record in records if record["kind"] == "form"]
    if measured:
        parts.append(
            "Times are medians in milliseconds (p20 to p80). Share is the bandwidth relative to that "
            "of a copy in the same run, for three accesses per element, or two if only the loss is computed. "
            "Memory is the peak of what the call takes beyond its inputs, including the gradient. Times in "
            "one row were taken in turns and can be compared; times in different rows less so.\n"
        )
        for dtype in _unique(record["dtype"] for record in measured):
            for mode in _unique(record["pass"] for record in measured):
                rows = [r for r in measured if r["dtype"] == dtype and r["pass"] == mode]
                if rows:
                    parts += [f"### {dtype}, {mode}\n", loss_table(rows)]
        parts.append(peer_wins(measured))
        if of_paths := paths.section(measured):
            parts.append(of_paths)
    if steps:
        parts += ["### Training steps\n", step_table(steps), step_words(steps)]
    if layers:
        parts += ["### Losses of linear layers\n", table(*forms.table_of(layers)) + "\n"]
    parts.append(_left_out(header, records))
    parts += _pictures(header, measured, steps, folder, stem)
    return "\n".join(parts)


def _pictures(
    header: dict[str, Any], measured: list[Record], steps: list[Record], folder: Path, stem: str
) -> list[str]:
    try:
        import_matplotlib()
    except ImportError:
        return ["No pictures: matplotlib is not installed.\n"]
    from fastkd.bench import pictures

    drawn = pictures.draw(header, measured, steps, folder, stem)
    return [f"![{caption}]({path.name})\n" for caption, path in drawn]


def _about(header: dict[str, Any]) -> str:
    left = {"kind", "not_measured", "name", "command"}
    facts = ", ".join(
        f"{key} {value}" for key, value in header.items() if key not in left and value is not None
    )
    return f"{facts}. Made by `fastkd bench {_arguments(header)}`.\n"


def _arguments(header: dict[str, Any]) -> str:
    words = header.get("command", "").split()
    return " ".join(words[1:] if words[:1] == ["bench"] else words)


def loss_table(rows: Sequence[Record]) -> str:
    """Return one line per case: fastkd's figures, each peer's time, and fastkd's speed-up over it."""
    others = [name for name in peers.VARIANTS[1:] if any(row["variant"] == name for row in rows)]
    columns = ["loss", "shape", "fastkd ms", "share of a copy", *(f"{name} ms" for name in others)]
    columns += [f"x {name}" for name in others if name != "quack"]
    columns += ["gradient error: " + ", ".join(["fastkd", *(n for n in others if n != "quack")])]
    columns += ["extra MB: " + ", ".join(["fastkd", *others]), "host us"]
    lines = []
    for case in by_case(rows).values():
        ours = case.get("fastkd")
        if ours is None:
            continue
        cells = [ours["loss"], f"{ours['rows']} x {ours['classes']}", _time(ours), f"{ours['share']:.0%}"]
        cells += [_time(case[name]) if name in case else "-" for name in others]
        faster = ours["speedup_over"]
        cells += [f"{faster[name]:.1f}" if name in faster else "-" for name in others if name != "quack"]
        cells.append(", ".join(_error(case.get(n)) for n in ["fastkd", *others] if n != "quack"))
        cells.append(", ".join(_megabytes(case.get(name)) for name in ["fastkd", *others]))
        cells.append("the time" if ours["host_us"] is None else f"{ours['host_us']:.0f}")
        lines.append(cells)
    return table(columns, lines) + "\n"


def peer_wins(rows: Sequence[Record]) -> str:
    """List the cases in which a peer is faster."""
    lost, cases = [], by_case(rows).values()
    for case in cases:
        ours = case.get("fastkd")
        for name, ratio in (ours or {}).get("speedup_over", {}).items():
            if ratio < 1 and ours is not None and name != "quack":
                lost.append((ratio, f"- {_case(ours)}: {name} takes {ratio:.2f} of fastkd's time"))
    if not any("fastkd" in case for case in cases):
        return "**fastkd has no time in any of these cases.**\n"
    if not lost:
        return "**No peer is faster than fastkd in any of these cases.**\n"
    return "**Where a peer is faster than fastkd:**\n\n" + "\n".join(text for _, text in sorted(lost)) + "\n"


def step_table(steps: Sequence[Record]) -> str:
    columns = ["step", "loss by", "ms per step", *steps[0]["split_ms"], "loss's share"]
    lines = []
    for record in steps:
        cells = [f"{record['step']}, batch {record['batch']}", record["variant"], _time(record)]
        cells += [f"{value:.2f}" for value in record["split_ms"].values()]
        lines.append([*cells, f"{record['loss_share']:.1%}"])
    return table(columns, lines) + "\n"


def step_words(steps: Sequence[Record]) -> str:
    """Say what the table means: what the fused loss can save, and where a peer wins."""
    lines = []
    for name in _unique(record["step"] for record in steps):
        rows = {record["variant"]: record for record in steps if record["step"] == name}
        eager, ours = rows.get("eager"), rows.get("fastkd")
        if eager is not None:
            share = eager["loss_share"]
            small = (
                "too small a share for any loss kernel to matter" if share < SMALL_SHARE else "worth fusing"
            )
            lines.append(f"- {name}: eager's loss is {share:.1%} of the step, {small}.")
        losses = {variant: record["split_ms"]["loss"] for variant, record in rows.items()}
        best = min(losses, key=lambda variant: losses[variant])
        if ours is not None and best != "fastkd":
            ratio = losses[best] / losses["fastkd"]
            lines.append(f"- {name}: a peer wins, {best}'s loss takes {ratio:.2f} of fastkd's time.")
    return "\n".join(lines) + "\n"


def _left_out(header: dict[str, Any], records: Iterable[Record]) -> str:
    lines = [f"- {name}: {reason}" for name, reason in header["not_measured"].items()]
    for record in records:
        if record["kind"] in ("skipped", "failed"):
            where = record["step"] if "step" in record else _case(record)
            who = f", {record['variant']}" if "variant" in record else ""
            lines.append(f"- {where}{who}: {record['reason']}")
    return "\n".join(["### Not measured\n", *(lines or ["Everything was measured."])]) + "\n"


def table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [columns, ["---"] * len(columns), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _case(record: Record) -> str:
    return name_of(tuple(record[name] for name in CASE))


def _time(record: Record) -> str:
    return f"{_digits(record['ms'])} ({_digits(record['p20'])} to {_digits(record['p80'])})"


def _digits(milliseconds: float) -> str:
    return f"{milliseconds:.4f}" if milliseconds < 0.1 else f"{milliseconds:.3g}"


def _error(record: Record | None) -> str:
    value = None if record is None else record["gradient_error"]
    return "-" if value is None else f"{value:.0e}"


def _megabytes(record: Record | None) -> str:
    value = None if record is None else record["extra_bytes"]
    return "-" if value is None else f"{value / 1e6:.3g}"


def _unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))
