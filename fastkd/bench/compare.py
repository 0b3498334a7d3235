"""Compare two result files: what became slower or less exact, beyond the noise."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from fastkd.bench.results import Record, by_case, name_of, read

# Smaller changes are never flagged, however little noise the runs had.
LEAST_CHANGE = 0.10
LEAST_ERROR_CHANGE = 2.0
# What times are relative to, besides the copy: none of fastkd's own variants.
YARDSTICKS = ("eager", "compiled", "liger")


def compare(old: Path, new: Path) -> tuple[str, int]:
    """Return the comparison as text, and the number of regressions.

    Times of two runs are never compared directly, because a shared machine drifts. A case's time is taken
    relative to each peer and the copy that were measured in turns with it, and a change counts only if all of
    these ratios show it; the smallest is reported. It is flagged if it exceeds 10 % and twice the spread
    within the runs (p20 to p80). A gradient error is flagged if it doubled.
    """
    (old_header, old_records), (new_header, new_records) = read(old), read(new)
    before, after = (
        by_case(record for record in records if record["kind"] in ("loss", "failed"))
        for records in (old_records, new_records)
    )
    lines = [f"old: {_about(old_header)}", f"new: {_about(new_header)}"]
    if old_header.get("name") != new_header.get("name"):
        lines.append("the devices differ: ratios to peers may differ for that reason alone")
    regressions = improvements = 0
    shared = [key for key in after if key in before]
    for key in shared:
        verdict = _verdict(before[key], after[key])
        if verdict:
            kind, text = verdict
            regressions += kind == "slower" or kind == "less exact"
            improvements += kind == "faster"
            lines.append(f"{kind:10s} {name_of(key)}: {text}")
    lost = sum(1 for key in before if key not in after and "fastkd" in before[key])
    lines.append(
        f"{len(shared)} cases in both, {lost} only in the old, {len(after) - len(shared)} only in the new: "
        f"{regressions} regressions, {improvements} faster"
    )
    if not any("ms" in before[key].get("fastkd", {}) and "fastkd" in after[key] for key in shared):
        lines.append("nothing could be compared")
    return "\n".join(lines), regressions


def _verdict(old: dict[str, Record], new: dict[str, Record]) -> tuple[str, str] | None:
    a, b = old.get("fastkd"), new.get("fastkd")
    if a is None or b is None or "ms" not in a:
        return None
    if "ms" not in b:
        return "slower", f"failed: {b['reason']}"
    ratios = {"the copy": _relative(b, None) / _relative(a, None)}
    noises = {"the copy": _spread(a) + _spread(b)}
    for peer in YARDSTICKS:
        if "ms" in old.get(peer, {}) and "ms" in new.get(peer, {}):
            ratios[peer] = _relative(b, new[peer]) / _relative(a, old[peer])
            noises[peer] = math.hypot(_spread(a), _spread(b), _spread(old[peer]), _spread(new[peer]))
    steady = min(ratios, key=lambda name: abs(math.log(ratios[name])))
    ratio, threshold = ratios[steady], 1 + max(LEAST_CHANGE, 2 * noises[steady])
    text = f"{ratio:.2f} of the old time, against {steady} (beyond the noise: {threshold:.2f})"
    same_direction = all(r > 1 for r in ratios.values()) or all(r < 1 for r in ratios.values())
    if same_direction and ratio > threshold:
        return "slower", text
    old_error, new_error = a.get("gradient_error"), b.get("gradient_error")
    if (
        old_error is not None
        and new_error is not None
        and math.isfinite(old_error)
        and not new_error <= LEAST_ERROR_CHANGE * max(old_error, 1e-7)  # "greater" is false of a NaN
    ):
        return "less exact", f"gradient error {old_error:.1e} before, {new_error:.1e} now"
    if same_direction and ratio < 1 / threshold:
        return "faster", text
    return None


def _relative(record: Record, peer: Record | None) -> float:
    return record["ms"] / peer["ms"] if peer else 1 / record["share"]


def _spread(record: Record) -> float:
    """Return half of p20 to p80, relative to the median."""
    return (record["p80"] - record["p20"]) / 2 / record["ms"]


def _about(header: dict[str, Any]) -> str:
    names = ("name", "backend", "torch", "fastkd", "date")
    return ", ".join(f"{header.get(name)}" for name in names)
