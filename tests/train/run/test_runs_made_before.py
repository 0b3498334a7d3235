"""Runs written by earlier versions of fastkd can be resumed.

stopped_run.tar.gz has a run of three epochs, written by commit 42055a0 and killed after the third of the four
steps of its second epoch, and the teacher that it had trained. At that commit the trainer was one flat
package, ``fastkd.train``.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fastkd.cli import main
from fastkd.train.run.checkpoint import load_checkpoint

ARCHIVE = Path(__file__).with_name("stopped_run.tar.gz")


def state_of(folder: Path) -> dict[str, Any]:
    return load_checkpoint(folder / "last.pt", remedy="")


def test_a_run_of_the_flat_trainer_is_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.unpack_archive(ARCHIVE, tmp_path)
    folder = tmp_path / "stopped-001"
    before = state_of(folder)
    assert len(before["history"]) == 1
    assert before["position"]["meter"]["steps"] == 3

    assert main(["train", "--resume", str(folder)]) == 0
    assert "step 3 of epoch 2 of 3" in capsys.readouterr().out
    after = state_of(folder)
    assert after["history"][0] == before["history"][0]
    assert [record["epoch"] for record in after["history"]] == [1, 2, 3]
    assert after["position"] is None

    # The result is that of a run that was never stopped, up to the order of sums on another machine.
    whole = tmp_path / "whole"
    recipe = str(folder / "recipe.yaml")
    assert main(["train", recipe, "--runs", str(whole)]) == 0
    (uninterrupted,) = whole.glob("*-001")
    expected = state_of(uninterrupted)
    for key, value in expected["student"].items():
        torch.testing.assert_close(after["student"][key], value, rtol=1e-3, atol=1e-4)
    for record, other in zip(after["history"], expected["history"], strict=True):
        assert record["loss"] == pytest.approx(other["loss"], rel=1e-3)
        assert record["lr"] == other["lr"]
