"""The numbers of a report's tables, and the files that they are read from."""

import json
import subprocess

import pytest

from fastkd.bench import report, results
from fastkd.bench.step import PARTS

CASE = {"kind": "loss", "loss": "kd", "rows": 8, "classes": 100, "dtype": "float32", "pass": "forward"}


def record(variant="fastkd", ms=1.0, **more):
    of_times = {"ms": ms, "p20": 0.5 * ms, "p80": 2 * ms, "share": 0.734, "host_us": 12.3}
    return {**CASE, "variant": variant, **of_times, "extra_bytes": 3_145_728, "gradient_error": 2e-7, **more}


def test_a_line_of_the_table():
    rows = [
        record(ms=0.05, speedup_over={"native": 1.0, "eager": 4.0, "quack": 0.4}),
        record("quack", 0.02, gradient_error=None),
        record("eager", 0.2, gradient_error=1e-6, extra_bytes=None),
        record("native", 12.345),
        record("eager", 1.0, rows=9),  # a case in which fastkd failed
    ]
    head, _, line = report.loss_table(rows).strip().splitlines()
    cells = dict(zip(head.split(" | "), line.split(" | "), strict=True))
    assert cells == {
        "| loss": "| kd",
        "shape": "8 x 100",
        "fastkd ms": "0.0500 (0.0250 to 0.1)",
        "share of a copy": "73%",
        "native ms": "12.3 (6.17 to 24.7)",
        "eager ms": "0.2 (0.1 to 0.4)",
        "quack ms": "0.0200 (0.0100 to 0.0400)",
        "x native": "1.0",
        "x eager": "4.0",
        "gradient error: fastkd, native, eager": "2e-07, 2e-07, 1e-06",
        "extra MB: fastkd, native, eager, quack": "3.15, 3.15, -, 3.15",
        "host us |": "12 |",
    }
    assert "| the time |" in report.loss_table([record(host_us=None, speedup_over={})])


def test_a_peer_that_wins_by_little_is_named_and_quack_is_none():
    row = record(speedup_over={"eager": 0.99, "native": 1.0, "quack": 0.3})
    text = report.peer_wins([row, record("eager", 0.99)])
    assert text.count("\n- ") == 1
    assert "- kd 8 x 100 float32 forward: eager takes 0.99 of fastkd's time" in text


@pytest.mark.parametrize(("share", "words"), [(0.049, "too small"), (0.051, "worth fusing")])
def test_the_share_of_a_loss_that_is_worth_it(share, words):
    split = dict.fromkeys(PARTS, 1.0)
    steps = [{"step": "resnet", "variant": "eager", "split_ms": split, "loss_share": share}]
    assert words in report.step_words(steps)


@pytest.mark.parametrize("command", ["bench --losses kd", "--losses kd"])
def test_the_command_that_made_it(command):
    header = {"kind": "header", "name": "a CPU", "torch": "2.14", "cuda": None, "command": command}
    assert report._about(header) == "torch 2.14. Made by `fastkd bench --losses kd`.\n"


def test_a_report_of_files_that_are_none_makes_no_folder(tmp_path):
    with pytest.raises(results.ResultFileError):
        report.write_report([tmp_path / "absent.jsonl"], tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_records_are_in_the_file_at_once(tmp_path):
    """A run that is killed leaves what it has measured."""
    path = tmp_path / "new" / "run.jsonl"
    with results.Writer(path) as writer:
        writer.write([{"kind": "header"}])
        writer.write([record()])
        assert results.read(path) == ({"kind": "header"}, [record()])
    with pytest.raises(results.ResultFileError, match="never overwritten"):
        results.Writer(path)
    assert len(path.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    "lines", [[], [{"kind": "loss"}], [{"kind": "header"}, {"ms": 1}], [{"kind": "header"}, 3]]
)
def test_files_that_hold_no_results(lines, tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(results.ResultFileError, match="is no result file"):
        results.read(path)


def test_the_load_is_that_of_the_last_minute(monkeypatch):
    monkeypatch.setattr(results.os, "getloadavg", lambda: (1.234, 8.0, 9.0), raising=False)
    assert results.header("cpu", {})["load"] == 1.23


def test_the_driver(monkeypatch):
    told = subprocess.CompletedProcess([], 0, stdout="580.1\n580.1\n")
    monkeypatch.setattr(results.subprocess, "run", lambda *_, **__: told)
    assert results._driver() == "580.1"
    told.stdout = "\n"
    assert results._driver() is None
