"""``val_loader=None``: training without validation, in the loop and in everything that shows or keeps it."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
from rich.console import Console
from torch.nn.functional import cross_entropy

from fastkd.errors import TrainError
from fastkd.train import FitResult, fit, fit_method
from fastkd.train.display.console import ConsoleProgress
from fastkd.train.display.loggers import CSVFile
from fastkd.train.run.checkpoint import load_checkpoint
from fastkd.train.run.folder import RunRecorder

from .tiny import Loader, Notes, make_method

TRAIN, VAL = Loader(), Loader(shuffle=False)


class Kept(Notes):
    def __init__(self) -> None:
        super().__init__()
        self.states: list[dict[str, Any]] = []

    def epoch_done(self, record: dict[str, Any], state: Any) -> None:
        self.states.append(state())


def train(val: Any = None, epochs: int = 2, **options: Any) -> FitResult:
    torch.manual_seed(1)
    method = options.pop("method", None) or make_method("kd")
    return fit_method(method, TRAIN, val, epochs=epochs, **{"progress": False, **options})


@pytest.mark.parametrize("ema", [None, 0.9])
def test_the_same_training_with_no_best_epoch(ema: float | None) -> None:
    method, kept = make_method("kd"), Kept()
    result = train(method=method, watcher=kept, ema=ema)
    validated_method = make_method("kd")
    validated = train(VAL, method=validated_method, ema=ema)
    for name, value in validated_method.student.state_dict().items():
        assert torch.equal(method.student.state_dict()[name], value)
    assert kept.notes == ["val_loader is None: no epoch is validated, and none is the best"]
    assert not [key for key in result.last if key.startswith(("val_", "student_"))]
    assert result.last["loss"] == validated.last["loss"]
    assert result.seconds["validation"] == 0.0 < validated.seconds["validation"]
    with pytest.raises(
        TrainError, match="no epoch is the best: val_loader was None, so none was validated; use last"
    ):
        _ = result.best


def test_it_may_be_left_out() -> None:
    student = make_method("cross_entropy").student
    result = fit(student, None, TRAIN, loss=lambda s, t, y: cross_entropy(s, y), epochs=1, progress=False)
    assert result.last["rows"] == 56


def test_resumed_with_and_without() -> None:
    """A state does not depend on validation; the best epoch is then one of those that were validated."""
    kept = Kept()
    whole = train(VAL, epochs=3)
    train(epochs=1, watcher=kept)
    resumed = train(VAL, epochs=3, resume=kept.states[0])
    assert resumed.last["val_loss"] == whole.last["val_loss"]
    assert resumed.best["epoch"] in (2, 3)


def test_it_is_shown_and_logged(tmp_path: Path) -> None:
    for terminal in (False, True):
        text = io.StringIO()
        console = Console(file=text, force_terminal=terminal, width=80, highlight=False)
        train(watcher=ConsoleProgress("student", console))
        assert "epoch 2/2" in text.getvalue()
        assert "val " not in text.getvalue()
        assert "val_loader is None" in text.getvalue()
    train(watcher=CSVFile(tmp_path / "metrics.csv"))
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert not [column for column in rows[0] if column.startswith("val_")]


def test_a_recorder_keeps_states_metrics_and_curves_but_no_best(tmp_path: Path) -> None:
    shown = Kept()
    train(watcher=RunRecorder(tmp_path, shown, facts={}, title="no validation"))
    assert {path.name for path in tmp_path.iterdir()} == {
        "last.pt", "previous.pt", "metrics.jsonl", "curves.png"
    }  # fmt: skip
    assert not [note for note in shown.notes if "could not be drawn" in note]
    assert matplotlib.image.imread(tmp_path / "curves.png").std() > 0.05
    assert len(load_checkpoint(tmp_path / "last.pt", remedy="")["history"]) == 2
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all("val_accuracy" not in record for record in records)
