"""The scripts of benchmarks/studies on a few small images: a search, a table, the conflict study."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastkd.cli import main

STUDIES = Path(__file__).resolve().parents[1] / "benchmarks" / "studies"


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a script's ``main`` with arguments."""
    monkeypatch.syspath_prepend(str(STUDIES))

    def run(name: str, *words: object) -> None:
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        importlib.import_module(name).main()

    return run


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Overrides that make the emoji recipes a matter of a second."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    Path("images").mkdir()
    for part in ("train", "test"):
        images = random.integers(0, 256, (32, 3, 16, 16), dtype=np.uint8)
        np.savez(f"images/{part}.npz", images=images, target=np.arange(32) % 4)
    small = ["student.name=small_cnn", "student.width=2", "train.epochs=1", "train.batch_size=16"]
    return [*small, "data.folder=images", "train.threads=1"]


TEACHER = ["teacher.name=small_cnn", "teacher.width=3", "teacher.epochs=1"]


def lines_of(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_a_search_ends_with_the_best_inside(study: Any, tiny: list[str]) -> None:
    command = ("choose_hyperparameters", "emoji/kd", "--output", "c.jsonl", *tiny, *TEACHER)
    study(*command)
    *runs, choice = lines_of("c.jsonl")
    tried = {line["options"]["temperature"]: line["last"] for line in runs}
    best = choice["chosen"]["temperature"]
    assert tried[best] == max(tried.values()) == choice["last"]
    assert {best / 2, best * 2} <= set(tried)
    study(*command, "--try", "temperature=3")
    more = lines_of("c.jsonl")
    # Only the new value was trained.
    assert [line["options"]["temperature"] for line in more if "seed" in line].count(best) == 1
    assert any(line.get("options", {}).get("temperature") == 3.0 for line in more)
    study(*command[:3], "other.jsonl", *tiny, *TEACHER, "--step", "ce_weight=3")
    *runs, choice = lines_of("other.jsonl")
    assert choice["chosen"].keys() == {"ce_weight"}
    assert len({line["options"]["ce_weight"] for line in runs}) == len(runs) >= 3


def test_a_table_of_methods(study: Any, tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    rows = ["labels alone", "DHKD", "DHKD, linear, aligned"]
    command = ("compare_methods", "emoji", *tiny, "--rows", *rows, "--seeds", 0, 1)
    study(*command, "--output", "t.jsonl")
    study(*command, "--output", "t.jsonl")  # trains nothing
    lines = lines_of("t.jsonl")
    by_row = {(line["row"], line["seed"]): line for line in lines}
    assert len(by_row) == len(lines) == 6
    # The recipe of DHKD is the linear, aligned one: trained once.
    assert by_row["DHKD", 1]["seconds"] == by_row["DHKD, linear, aligned", 1]["seconds"]
    capsys.readouterr()
    study("compare_methods", "emoji", *tiny, "--table", "t.jsonl")
    out = capsys.readouterr().out
    apart = [
        100 * (by_row["DHKD", s]["last"]["val_accuracy"] - by_row["labels alone", s]["last"]["val_accuracy"])
        for s in (0, 1)
    ]
    assert "| labels alone | 2 |" in out
    assert f"| DHKD - labels alone | {sum(apart) / 2:+.2f} ± " in out
    assert f"{apart[0]:+.2f}, {apart[1]:+.2f}" in out


def test_rows_from_a_stored_teacher(study: Any, tiny: list[str]) -> None:
    # The recipe's student, which has the layers of the rows.
    words = [*(word for word in tiny if not word.startswith("student.")), "teacher.epochs=1"]
    for seed in (0, 1):
        place = ["--store", "logits", "--to", f"cache-{seed}", "--runs", "runs"]
        assert main(["cache-teacher", "emoji/kd", *words, f"train.seed={seed}", *place]) == 0
    rows = ["labels alone", "KD", "hint"]  # which read nothing of it, its logits, its layers
    command = ("compare_methods", "emoji", *words, "--rows", *rows, "--output", "t.jsonl")
    study(*command, "--cache", "cache-{seed}", "--seeds", 0)
    study(*command, "--cache", "cache-{seed}", "--seeds", 1, "--rows", "KD")
    study(*command, "--seeds", 0)  # the same rows: trains nothing
    lines = lines_of("t.jsonl")
    assert [(line["row"], line["seed"], line["cache"]) for line in lines] == [
        ("labels alone", 0, False), ("KD", 0, True), ("hint", 0, False), ("KD", 1, True),
    ]  # fmt: skip
    assert all(line["overrides"] == words for line in lines)
    assert [line["teacher"] is None for line in lines] == [True, False, False, False]


def test_the_conflict_of_gradients(study: Any, tiny: list[str]) -> None:
    words = [*tiny, *TEACHER, "--weights", "0.1", "--seeds", 0, "--every", 1, "--output", "g"]
    study("gradient_conflict", "emoji/dhkd", *words)
    first = Path("g.jsonl").read_text()
    study("gradient_conflict", "emoji/dhkd", *words)
    assert Path("g.jsonl").read_text() == first  # trains nothing again
    _, *rows = lines_of("g.jsonl")
    assert {(row["head"], row["teacher"]) for row in rows} == {
        (head, teacher)
        for head in ("one head", "two heads")
        for teacher in ("raw teacher", "centred teacher")
    }
    assert all(-1 <= row[part] <= 1 for row in rows for part in ("classifier", "backbone"))
    assert Path("g.png").stat().st_size > 10_000
