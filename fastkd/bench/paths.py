"""Native beside Triton on a GPU: from how many classes native is faster, as ``plan.NATIVE_CLASSES``."""

from __future__ import annotations

from collections.abc import Iterable

from fastkd.bench.results import Record
from fastkd.ops.plan import NATIVE_CLASSES, NATIVE_DTYPE, NATIVE_ROWS
from fastkd.ops.spec import CASES, Family

Group = tuple[Family, bool]  # and whether the loss has labels: the key of NATIVE_CLASSES
# By rows and classes, native's time by Triton's of each loss.
Ratios = dict[tuple[int, int], dict[str, float]]


def ratios(records: Iterable[Record]) -> dict[Group, Ratios]:
    """Of the cases in which both were measured, loss and gradient in ``plan.NATIVE_DTYPE``."""
    times: dict[tuple[str, int, int], dict[str, float]] = {}
    dtype = str(NATIVE_DTYPE).removeprefix("torch.")
    for record in records:
        if record["kind"] == "loss" and record["dtype"] == dtype and record["pass"] == "forward+backward":
            shape = record["loss"], record["rows"], record["classes"]
            times.setdefault(shape, {})[record["variant"]] = record["ms"]
    found: dict[Group, Ratios] = {}
    for (name, rows, classes), of_variant in times.items():
        if "native" in of_variant and "triton" in of_variant:
            loss, case = CASES[name]
            group = found.setdefault((loss.family, case.labelled), {})
            group.setdefault((rows, classes), {})[name] = of_variant["native"] / of_variant["triton"]
    return found


def fewest_classes(of_group: Ratios) -> int | None:
    """The fewest classes from which native is faster for every loss and shape of enough rows; None: nowhere.

    One more than the longest rows for which it is not.
    """
    by_classes: dict[int, float] = {}
    for (rows, classes), of_loss in of_group.items():
        if rows >= NATIVE_ROWS:
            by_classes[classes] = max(by_classes.get(classes, 0.0), *of_loss.values())
    slower = [classes for classes, ratio in by_classes.items() if ratio >= 1]
    if not by_classes or max(slower, default=0) == max(by_classes):
        return None
    return max(slower) + 1 if slower else min(by_classes)


def section(records: Iterable[Record]) -> str:
    """The table for ``fastkd/ops/plan.py``, the present one, and the ratios, as Markdown; "" if none."""
    measured = ratios(records)
    if not measured:
        return ""
    fewest = {group: fewest_classes(of_group) for group, of_group in measured.items()}
    table = {group: classes for group, classes in fewest.items() if classes is not None}
    lines = [
        "### `auto`: native beside Triton\n",
        f"From these times, for at least {NATIVE_ROWS} rows (`fastkd/ops/plan.py`):\n",
        f"    NATIVE_CLASSES = {table}\n",
        f"There now: `{NATIVE_CLASSES}`. Native's time by Triton's:\n",
    ]
    for group, of_group in measured.items():
        for (rows, classes), of_loss in sorted(of_group.items(), key=lambda item: item[0][::-1]):
            words = ", ".join(f"{name} {ratio:.2f}" for name, ratio in of_loss.items())
            lines.append(f"- {group}, {rows} x {classes}: {words}")
    return "\n".join(lines) + "\n"
