"""Networks whose state dict holds more than tensors: what ``get_extra_state`` returns."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastkd
from fastkd.cli import main
from fastkd.train import Watcher, fit

from .tiny import Loader, Net

NETWORKS = """
import threading
from torch import nn
class Counting(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(784, num_classes))
        self.seen = {"steps": 0, "kind": "tiny"}
    def get_extra_state(self):
        return self.seen
    def set_extra_state(self, state):
        self.seen = state
    def forward(self, images):
        self.seen["steps"] += self.training
        return self.layers(images)
class Locked(Counting):
    def get_extra_state(self):
        return threading.Event
class OneWay(nn.Sequential):
    def __init__(self, num_classes):
        super().__init__(nn.Flatten(), nn.Linear(784, num_classes))
    def get_extra_state(self):
        return 3
"""
SHORT = [
    "data.synthetic=20",
    "train.batch_size=10",
    "train.epochs=2",
    "train.device=cpu",
    "teacher.epochs=1",
    "train.schedule=constant",
]


@pytest.fixture(autouse=True)
def networks(workplace: Path) -> None:
    Path("counted.py").write_text(NETWORKS)


def test_it_is_saved_resumed_validated_exported_and_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    networks = ["student.name=counted:Counting", "teacher.name=counted:Counting"]
    assert main(["train", "fashion-mnist/kd", *SHORT, *networks]) == 0
    (run,) = Path("runs").glob("fashion*")
    assert fastkd.load(run, weights="last").network.seen == {"steps": 4, "kind": "tiny"}
    assert main(["train", "--resume", str(run), "train.epochs=3"]) == 0
    assert fastkd.load(run, weights="last").network.seen["steps"] == 6
    assert main(["train", "--resume", str(run), "--eval-only"]) == 0
    (teacher,) = Path("runs").glob("teachers/*/teacher.pt")
    given = [f"teacher.checkpoint={teacher}", "--dry-run"]
    assert main(["train", "fashion-mnist/kd", *SHORT, *networks, *given]) == 0
    assert main(["export", str(run), "--format", "state_dict"]) == 0
    assert torch.load(run / "student.pt", weights_only=True)["_extra_state"]["kind"] == "tiny"
    capsys.readouterr()
    assert main(["export", str(run)]) == 2
    assert "_extra_state is a dict, but the format holds tensors only; expected --format state_dict" in (
        " ".join(capsys.readouterr().err.split())
    )


@pytest.mark.parametrize(
    ("network", "words"),
    [
        ("student.name=counted:Locked", "student._extra_state of Locked.get_extra_state cannot be saved and"),
        ("teacher.name=counted:Locked", "teacher counted:Locked: student._extra_state of Locked"),
        ("student.name=counted:OneWay", "and a set_extra_state for them"),
    ],
)
def test_what_a_checkpoint_cannot_give_back_is_refused(
    network: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "fashion-mnist/kd", *SHORT, network]) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert not Path("runs").exists()


class Counted(Net):
    def __init__(self) -> None:
        super().__init__(4)
        self.seen: dict[str, Any] = {"steps": 0}

    def get_extra_state(self) -> dict[str, Any]:
        return self.seen

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.seen = state

    def forward(self, images: Tensor) -> Tensor:
        self.seen["steps"] += self.training
        return super().forward(images)


def test_fit_resumes_it_and_leaves_the_state_as_it_is() -> None:
    states: list[dict[str, Any]] = []

    class Keep(Watcher):
        def epoch_done(self, record: Any, state: Any) -> None:
            states.append(copy.deepcopy(state()))

    def train(student: nn.Module, **options: Any) -> None:
        options = {"loss": fastkd.DistillLoss(ce_weight=1.0), "watcher": Keep(), **options}
        fit(student, None, Loader(), None, **options)

    train(Counted(), epochs=1)
    again = Counted()
    train(again, epochs=2, resume=states[0])
    assert again.seen["steps"] == 8
    assert states[0]["student"]["_extra_state"] == {"steps": 4}


def test_a_skipped_step_leaves_it_as_it_was() -> None:
    def train(batches: Any, student: Counted) -> int:
        options: dict[str, Any] = {"loss": fastkd.DistillLoss(ce_weight=1.0), "nonfinite": "skip"}
        result = fit(student, None, batches, None, epochs=1, **options)
        return int(result.history[0]["skipped"])

    batches, student = list(Loader()), Counted()
    batches[1][0][:] = float("nan")
    assert train(batches, student) == 1
    assert student.seen["steps"] == 3
