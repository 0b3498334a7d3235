"""Failures of output, figures and hints do not end a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastkd.cli import main
from fastkd.train import fit
from fastkd.train.commands import plot as plot_command
from fastkd.train.display.console import ConsoleProgress
from tests.train.tiny import STUDENT, Loader, Net, labels_alone

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.usefixtures("workplace")


def whole(folder: str = "runs/fashion-mnist-student-001") -> bool:
    summary = json.loads((Path(folder) / "summary.json").read_text())
    return summary["last"]["epoch"] == 2 and (Path(folder) / "best.pt").exists()


def breaks(*_: Any, **__: Any) -> None:
    raise RuntimeError("no fonts here")


@pytest.mark.parametrize("what", ["run.folder.plot_curves", "display.curves.make_figure"])
def test_a_picture_that_cannot_be_drawn(
    what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(f"fastkd.train.{what}", breaks)
    assert main(["train", *STUDENT]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "curves.png could not be drawn: RuntimeError: no fonts here" in out
    assert whole()


def test_a_comparison_that_cannot_be_drawn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *STUDENT]) == 0
    monkeypatch.setattr(plot_command, "make_figure", breaks)
    assert main(["plot", "runs/fashion-mnist-student-001"]) == 2
    assert "comparison.png cannot be drawn: RuntimeError: no fonts here" in capsys.readouterr().err


class Writer:
    """Like TensorBoard's writer, on a full disk."""

    def __init__(self, folder: str) -> None:
        self.closed = False

    def add_scalar(self, *_: Any) -> None:
        raise OSError(28, "No space left on device")

    def close(self) -> None:
        raise AssertionError("a writer that failed is not asked again")


def test_tensorboard_on_a_full_disk(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fastkd.train.display.loggers.require_tensorboard", lambda: Writer)
    assert main(["train", *STUDENT, "train.tensorboard=true"]) == 0
    out = capsys.readouterr().out
    assert out.count("TensorBoard is no longer written: OSError: [Errno 28] No space left") == 1
    assert "student epoch 2/2" in out
    assert whole()


@pytest.mark.parametrize(
    "error", [BrokenPipeError(32, "Broken pipe"), UnicodeError("no such sign"), SystemExit(1)]
)
def test_a_terminal_that_breaks(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: Any) -> None:
        raise error

    monkeypatch.setattr(ConsoleProgress, "batch_done", breaks)
    with pytest.warns(UserWarning, match=f"continues without progress display: {type(error).__name__}"):
        assert main(["train", *STUDENT]) == 0
    assert whole()
    loader = [(Loader().images, Loader().target)]
    with pytest.warns(UserWarning, match="training continues"):
        result = fit(Net(4), None, loader, loader, loss=labels_alone, epochs=2)
    assert len(result.history) == 2


def test_an_interrupt_is_no_failure_to_show(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ConsoleProgress, "batch_done", interrupt)
    assert main(["train", *STUDENT]) == 130


def test_a_table_that_cannot_be_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fastkd.train.run.results.results_table", breaks)
    assert main(["train", *STUDENT]) == 0
    assert "the table of results could not be shown: RuntimeError: no fonts here" in capsys.readouterr().out
    assert whole()


def test_an_ascii_terminal() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    for group in ([], ["--seeds", "2"]):  # ± in the table
        done = subprocess.run(
            [sys.executable, "-m", "fastkd", "train", *STUDENT, *group],
            env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "run folder" in done.stdout


def test_a_reader_that_goes() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "fastkd", "train", *STUDENT]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        run.stdout.readline()
        run.stdout.close()
        errors = run.stderr.read().decode()
        assert run.wait() == 0, errors
    assert "Traceback" not in errors
    assert whole()
