"""Runs the fault tests and writes their results: `python -m tests.train.reliability docs/reliability.md`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

_HEAD = """# Reliability

Each fault is caused by a test in `tests/train/test_faults.py`; the last column is what happened in the test
run. This file is written by `python -m tests.train.reliability docs/reliability.md`.

| fault | what must happen | what happened |
|---|---|---|
"""


class _Collector:
    def __init__(self) -> None:
        self.rows: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        properties = dict(report.user_properties)
        if report.failed:
            self.rows.append(
                f"| {properties.get('fault', report.nodeid)} | {properties.get('must', '')} | **failed** |"
            )
        elif report.when == "call" and "fault" in properties:
            self.rows.append(f"| {properties['fault']} | {properties['must']} | {properties['happened']} |")


def write_table(path: Path) -> int:
    collector = _Collector()
    tests = Path(__file__).with_name("test_faults.py")
    status = pytest.main(["-q", "-p", "no:cacheprovider", str(tests)], plugins=[collector])
    path.write_text(_HEAD + "\n".join(collector.rows) + "\n", encoding="utf-8")
    return int(status)


if __name__ == "__main__":
    sys.exit(write_table(Path(sys.argv[1])))
