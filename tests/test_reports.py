"""The scripts that write sections of docs/reports: a section at a time, and the cost of methods."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from fastkd.bench.results import read
from fastkd.bench.sections import write_section

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def test_a_script_replaces_only_its_own_section(tmp_path: Path) -> None:
    path = tmp_path / "reports" / "report.md"
    write_section(path, "A report", "One", "first\n")
    write_section(path, "A report", "Two", "second, with\n\n### a part\n\nof it")
    write_section(path, "another title", "One", "first again")
    two = "## Two\n\nsecond, with\n\n### a part\n\nof it\n"
    assert path.read_text() == f"# A report\n\n## One\n\nfirst again\n\n{two}"
    write_section(path, "A report", "Two", "2")
    assert path.read_text() == "# A report\n\n## One\n\nfirst again\n\n## Two\n\n2\n"


def test_the_cost_of_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script: Any = importlib.import_module("cost_of_methods")
    monkeypatch.setitem(script.PAIRS, "tiny", script.Pair("resnet14", "resnet8", 10, 16, {"cpu": 4}))

    def run(*words: object) -> None:
        monkeypatch.setattr(sys, "argv", ["cost_of_methods.py", *map(str, words)])
        script.main()

    times, memory = tmp_path / "times.jsonl", tmp_path / "memory.jsonl"
    of_all = ("--device", "cpu", "--pair", "tiny")
    run(*of_all, "--output", times, "--turns", 2, "--no-memory")
    run(*of_all, "--output", memory, "--turns", 0, "--methods", "DHKD", "labels alone")
    header, records = read(times)
    assert header["settings"]["batch"] == 4
    assert [record["label"] for record in records] == list(script.METHODS)
    by_label = {record["label"]: record for record in records}
    assert by_label["KD"]["over_kd"] == 1
    assert all(record["ms"] > 0 and record["turns"] == 2 for record in records)
    held = {record["label"]: (record["held"], record["peak"]) for record in read(memory)[1]}
    assert list(held) == ["labels alone", "KD", "DHKD"]
    assert held["labels alone"] < held["KD"] < held["DHKD"]
    assert all(0 < between < peak for between, peak in held.values())
    run("--report", tmp_path / "report.md", times, memory)
    text = (tmp_path / "report.md").read_text()
    assert "**resnet14 → resnet8**, 16 px, 4 images per step, float32; 2 turns" in text
    assert (
        f"| KD | {by_label['KD']['ms']:.1f} | 1.000 (1.000 to 1.000) | {held['KD'][0] / 2**20:.1f} |" in text
    )
    with pytest.raises(SystemExit, match=r"times\.jsonl exists; results are never overwritten"):
        run(*of_all, "--output", times)
