"""The hint for a CPU that other programs use too."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastkd.train import crowding, fit

from .tiny import CLASSES, Loader, Notes, labels_alone

CPU = torch.device("cpu")


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crowding.os, "getloadavg", lambda: (9.8, 9.0, 8.0))
    monkeypatch.setattr(crowding.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(crowding, "_SECONDS", 0.0)
    monkeypatch.setattr(crowding, "_LITTLE", float("inf"))


def hints() -> list[str]:
    """Of a training of two epochs."""
    notes = Notes()
    student = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, CLASSES))
    fit(student, None, Loader(), loss=labels_alone, epochs=2, watcher=notes, device=CPU)
    return [text for text in notes.notes if "other programs" in text]


def test_said_once_with_what_to_do(busy: None) -> None:
    (text,) = hints()
    assert "load 9.8 on 2" in text
    assert "train.threads=1" in text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("os.getloadavg", lambda: (2.4, 9.0, 9.0)),
        ("os.cpu_count", lambda: 16),
        ("multiprocessing.active_children", lambda: [None] * 8),
    ],
    ids=["an idle machine", "many cores", "own workers"],
)
def test_not_said_without_a_crowd(
    busy: None, monkeypatch: pytest.MonkeyPatch, name: str, value: object
) -> None:
    monkeypatch.setattr(f"{crowding.__name__}.{name}", value)
    assert not hints()


def test_said_beside_one_program_on_two_cores(busy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crowding.os, "getloadavg", lambda: (2.9, 2.0, 1.0))
    assert hints()


def test_not_said_of_threads_that_compute(busy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two threads that always run; and of one that waits for data."""
    times = {"monotonic": 0.0, "process_time": 0.0}
    for name in times:
        monkeypatch.setattr(crowding.time, name, lambda name=name: times[name])
    monkeypatch.setattr(crowding, "_SECONDS", 20.0)
    monkeypatch.setattr(crowding, "_LITTLE", 0.7)
    found = crowding.Crowding(CPU)
    times.update({"monotonic": 100.0, "process_time": 190.0})
    assert found.hint(0.0) is None
    times["process_time"] = 80.0
    assert found.hint(50.0) is None
    assert found.hint(81.0) is None
    times["process_time"] = 30.0
    assert "15%" in str(found.hint(0.0))
    assert found.hint(0.0) is None


def test_a_system_without_a_load(busy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(crowding.os, "getloadavg")
    assert not hints()


def test_not_said_of_one_thread_or_a_gpu(busy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert crowding.Crowding(torch.device("cuda")).hint(-1e6) is None
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert crowding.Crowding(CPU).hint(-1e6) is None
