"""What the command line makes of errors, words and values, without training anything."""

import argparse
import json
import signal
from types import SimpleNamespace

import pytest
import torch

import fastkd
from fastkd import cli, command, doctor
from fastkd.errors import DataError, Preempted
from fastkd.train import signals
from fastkd.train.commands import train


def status_of(error, *, in_python=True):
    """The exit status of a command that raises ``error``."""

    def fails(args):
        raise error

    return cli._run(argparse.Namespace(run=fails), in_python=in_python)


@pytest.mark.parametrize(("ranks", "of_rank"), [("1", ""), ("2", " (rank 1)"), ("", "")])
def test_an_error_names_its_rank(ranks, of_rank, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", ranks)
    monkeypatch.setenv("RANK", "1")
    assert status_of(DataError("no such folder")) == 2
    assert capsys.readouterr().err == f"fastkd: error{of_rank}: no such folder\n"


def test_errors_of_the_machine_and_others(capsys):
    assert status_of(Preempted("stopped")) == 75
    assert status_of(OSError(28, "No space left on device", "a.pt")) == 2
    assert status_of(MemoryError()) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "fastkd: stopped"
    assert said[1].startswith("fastkd: error: [Errno 28] No space left on device")
    assert said[2].startswith("fastkd: error: out of memory")
    for fault in (
        OSError("an error of the program"),
        RuntimeError("shapes differ"),
        BrokenPipeError(32, "pipe"),
    ):
        with pytest.raises(type(fault)):
            status_of(fault)


@pytest.mark.parametrize(("in_python", "restored"), [(True, 1), (False, 0)])
def test_signals_are_as_before_where_the_process_goes_on(in_python, restored, monkeypatch):
    calls = []
    monkeypatch.setattr(signals, "restore_handlers", lambda: calls.append(signal.SIGTERM))
    status_of(DataError("x"), in_python=in_python)
    assert len(calls) == restored


def test_a_folder_or_an_override_after_resume(workplace, monkeypatch):
    seen = []
    monkeypatch.setattr(train, "run", lambda args: seen.append((args.resume, args.words)) or 0)
    words = ["train", "glyphs/kd", "--resume", "train.epochs=3"]
    assert cli.main(words) == 0
    (workplace / "train.epochs=3").mkdir()
    assert cli.main(words) == 0
    assert seen == [("", ["glyphs/kd", "train.epochs=3"]), ("train.epochs=3", ["glyphs/kd"])]


def test_options_are_not_abbreviated(capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "--bat", "4"])
    assert "unknown arguments: --bat 4 (did you mean --batch?)" in capsys.readouterr().err


def test_json_has_no_nan(capsys):
    command.print_json({"a": [float("nan"), 1.5, True], "b": {"c": float("inf"), "d": torch.float32}})
    assert json.loads(capsys.readouterr().out) == {
        "a": [None, 1.5, True],
        "b": {"c": None, "d": "torch.float32"},
    }


@pytest.mark.parametrize("text", ["0", "-1", "1.0", "", "x"])
def test_whole_numbers_from_1(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected at least 1"):
        command.positive(text)
    assert command.positive("1") == 1


def test_what_doctor_finds(monkeypatch):
    """The choice of auto whatever is set, and a GPU's memory in GiB."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with fastkd.use_backend("eager"):
        found = doctor.facts()
    assert found["current_backend"] == "eager"
    assert found["auto"] == {"cpu": "native"}
    assert list(found["backends"]) == ["cpu"]
    assert found["gpus"] == []
    gpu = SimpleNamespace(name="a GPU", total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(
        doctor.backend, "missing", lambda name, device: None if name == "eager" else "no driver"
    )
    monkeypatch.setattr(doctor.backend, "resolve", lambda *_: "eager")
    report = doctor.report()
    assert "GPU 1: a GPU, 80 GiB" in report
    assert "backends on cuda:\n  triton  no: no driver\n  native  no: no driver\n  eager   runs\n" in report
