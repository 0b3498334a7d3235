"""Progress on terminals of several widths, top-5 accuracy, and the loggers of a run."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import fastkd
from fastkd.cli import main
from fastkd.errors import TrainError
from fastkd.train.commands import plot as plot_command
from fastkd.train.display import console as console_module
from fastkd.train.display.console import ConsoleProgress
from fastkd.train.display.loggers import CSVFile
from fastkd.train.evaluation import evaluate_rows, ranks, try_validation
from fastkd.train.meters import LossMeter
from fastkd.train.precision import Numerics
from tests.train.ranks import on_two_ranks
from tests.train.tiny import Loader, Net

pytestmark = pytest.mark.usefixtures("workplace")

CPU = torch.device("cpu")
TERMS = dict.fromkeys(("ce", "kd", "head_ce", "head_kd", "teacher_head_ce"), 0.5)
RECORD = {
    "epoch": 12, "loss": 1.25, "terms": TERMS, "train_accuracy": 0.5, "val_accuracy": 0.6,
    "val_top5_accuracy": 0.8, "seconds": {"loss": 12.3},
}  # fmt: skip


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_the_essentials_survive_on_a_narrow_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console_module, "_REFRESH_SECONDS", 0.0)
    out = io.StringIO()
    terminal = Console(file=out, force_terminal=True, width=width, color_system="standard", _environ={})
    shown = ConsoleProgress("student", terminal)
    meter = LossMeter(CPU, epoch=12)
    shown.epoch_started(12, 100, 391)
    terms = {name: torch.tensor(value) for name, value in TERMS.items()}
    for _ in range(200):
        meter.add(torch.tensor(1.25), terms, torch.eye(4), torch.arange(4))
        meter.end_step()
    shown.batch_done(meter)
    terminal.print(shown._progress.get_renderable())
    bar = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())
    assert bar.count("\n") == 1
    assert len(bar.rstrip()) <= width
    for part in ("student 12/100", "━━━━━", "train 100.00%", " left"):
        assert part in bar, part
    assert ("head_kd 0.500" in bar) == (width == 200)
    assert ("200/391" in bar) == (width >= 80)

    out.truncate(0)
    shown.epoch_done(RECORD, dict)
    line = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue()).strip("\x00")
    assert line.count("\n") == 1
    assert "student epoch  12/100" in line
    assert "val 60.00%  top-5 80.00%" in line
    assert ("head_kd 0.500" in line) == (width == 200)


def test_top5_is_exact() -> None:
    torch.manual_seed(0)
    logits = torch.randn(400, 30)
    target = torch.randint(0, 30, (400,))
    expected = (logits.topk(5).indices == target[:, None]).any(1).double().mean().item()
    batches = [(logits[:150], target[:150]), (logits[150:], target[150:])]
    result = evaluate_rows(torch.nn.Identity(), batches, device=CPU)
    assert result.top5 == pytest.approx(expected, abs=1e-12)
    assert result.record()["val_top5_accuracy"] == result.top5
    few = [(logits[:, :10], target % 10)]
    assert "val_top5_accuracy" not in evaluate_rows(torch.nn.Identity(), few, device=CPU).record()
    # Equal logits in the order of classes; a NaN is no correct guess.
    assert ranks(torch.zeros(1, 12), torch.tensor([7])).item() == 7
    broken = torch.zeros(1, 12)
    broken[0, 3] = torch.nan
    assert ranks(broken, torch.tensor([3])).item() >= 11
    assert ranks(broken, torch.tensor([0])).item() == 1


@pytest.mark.parametrize("classes", [10, 30])
def test_images_without_a_label_do_not_count(classes: int) -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(60, classes), torch.randint(0, classes, (60,))
    some = target.masked_fill(torch.arange(60) < 30, -100)  # all of the first batch
    batches = list(zip(logits.split(20), some.split(20), strict=True))
    found = evaluate_rows(torch.nn.Identity(), batches, device=CPU)
    assert found.rows == 30
    expected = evaluate_rows(torch.nn.Identity(), [(logits[30:], target[30:])], device=CPU)
    assert found.record() == pytest.approx(expected.record())
    try_validation(torch.nn.Identity(), batches, Numerics(CPU))
    before = torch.get_rng_state()
    shuffled = torch.utils.data.DataLoader(list(zip(logits, some, strict=True)), 60, shuffle=True)
    try_validation(torch.nn.Identity(), shuffled, Numerics(CPU))
    assert torch.equal(torch.get_rng_state(), before)  # training draws as without the trial
    with pytest.raises(TrainError, match="no image of the validation loader has a label: all are -100"):
        evaluate_rows(torch.nn.Identity(), batches[:1], device=CPU)


def _two_shares() -> dict[str, Any]:
    torch.manual_seed(0)
    logits, target = torch.randn(401, 30).round(), torch.randint(0, 30, (401,))  # with equal logits
    batches = list(zip(logits.split(37), target.split(37), strict=True))
    return evaluate_rows(torch.nn.Identity(), batches, device=CPU).record()


def test_top5_is_the_same_on_two_ranks(tmp_path: Path) -> None:
    alone = _two_shares()
    for record in on_two_ranks(_two_shares, tmp_path):
        assert record["val_top5_accuracy"] == alone["val_top5_accuracy"]
        assert record["val_rows"] == 401


def test_top5_in_a_run(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = [*tiny, "train.epochs=2", "teacher.epochs=1", "train.csv=true"]
    assert main(["train", "glyphs/kd", *words]) == 0
    out = capsys.readouterr().out
    run = Path("runs/glyphs-kd-001")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((run / "summary.json").read_text())
    assert records[-1]["val_top5_accuracy"] == summary["last"]["val_top5_accuracy"]
    assert records[-1]["val_top5_accuracy"] >= records[-1]["val_accuracy"]
    assert summary["teacher"]["val_top5_accuracy"] >= summary["teacher"]["val_accuracy"]
    assert f"top-5 {records[-1]['val_top5_accuracy']:.2%}" in out
    assert "top-5, last epoch" in out
    assert main(["train", "--resume", str(run), "--eval-only"]) == 0
    assert "top-5, %" in capsys.readouterr().out
    assert main(["export", str(run)]) == 0
    assert ", top-5 " in capsys.readouterr().out

    rows = list(csv.DictReader((run / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[1]["terms/kd"]) == records[1]["terms"]["kd"]

    one = plot_command.read_shown(run)
    assert one.teacher == summary["teacher"]["val_accuracy"]
    (run / "summary.json").unlink()  # a run that is not finished knows it too
    assert plot_command.read_shown(run).teacher == one.teacher
    figures: list[Any] = []
    make = plot_command.make_figure
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plot_command, "make_figure", lambda **o: figures.append(make(**o)) or figures[-1])
        assert main(["plot", str(run)]) == 0
    (axes, *_) = figures[0].axes
    assert f"teacher {one.teacher:.2%}" in [text.get_text() for text in axes.texts]
    assert any(list(line.get_ydata()) == [one.teacher] * 2 for line in axes.lines)


def test_a_csv_file_with_terms_that_go(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    with CSVFile(path) as watcher:
        watcher.epoch_done({**RECORD, "epoch": 1}, dict)
        watcher.epoch_done({**RECORD, "epoch": 2, "terms": {"ce": 1.0}}, dict)
    rows = list(csv.DictReader(path.open()))
    assert [row["terms/kd"] for row in rows] == ["0.5", ""]
    with CSVFile(path, history=[{**RECORD, "epoch": 1}]) as watcher:  # resumed
        watcher.epoch_done({**RECORD, "epoch": 2}, dict)
    assert [row["terms/kd"] for row in csv.DictReader(path.open())] == ["0.5", "0.5"]
    before = path.read_text()
    with CSVFile(path) as watcher:  # not of this run
        watcher.epoch_done({**RECORD, "epoch": 1}, dict)
    assert path.read_text() == before


def test_wandb_offline(tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert main(["train", "glyphs/kd", *tiny, "train.epochs=1", "teacher.epochs=1", "train.wandb=true"]) == 0
    run = Path("runs/glyphs-kd-001")
    assert list(run.glob("wandb/offline-run-*/*.wandb"))
    assert (run / "wandb-id.txt").read_text()


def test_wandb_that_is_missing_or_fails(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    short = [*tiny, "train.epochs=1", "teacher.epochs=1", "train.wandb=true"]
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main(["train", "glyphs/kd", *short]) == 2
    assert "pip install 'fastkd[wandb]'" in capsys.readouterr().err
    assert not Path("runs").exists()

    class Broken:
        @staticmethod
        def init(**_: Any) -> None:
            raise ConnectionError("no network")

    monkeypatch.setitem(sys.modules, "wandb", Broken)
    assert main(["train", "glyphs/kd", *short]) == 0
    assert (
        capsys.readouterr().out.count("Weights & Biases is no longer written: ConnectionError: no network")
        == 1
    )


def test_the_own_watcher_of_the_docs(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).resolve().parents[3] / "docs" / "trainer.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"<!-- own watcher.*?-->\n```python\n(.*?)```", text, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    loader = [(Loader().images, Loader().target)]
    names = {"fastkd": fastkd, "student": Net(4), "teacher": Net(4), "loss": fastkd.KDLoss()}
    exec(code, names | {"train_loader": loader, "val_loader": loader})
    assert "epoch 1: " in capsys.readouterr().out
