"""Environment variables, devices and closed pipes on the command line."""

import argparse
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastkd
from fastkd import environment
from fastkd.cli import main
from fastkd.ops import backend

ROOT = Path(__file__).resolve().parents[1]


def run(*words: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env={**os.environ, **variables}, cwd=ROOT
    )


def test_an_unknown_backend_is_one_line_and_status_2():
    done = run("-m", "fastkd", "doctor", FASTKD_BACKEND="nativ")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("fastkd: error: the environment's FASTKD_BACKEND is 'nativ'; expected one of auto")
    assert not done.stdout


@pytest.mark.parametrize(
    "command", [["recipes"], ["check"], ["bench"], ["train", "glyphs/kd"], ["plot", "runs"]]
)
def test_every_command_checks_the_backend_first(command, monkeypatch, capsys):
    monkeypatch.setattr(backend, "_chosen", "Eager")  # as read from the environment
    assert main(command) == 2
    assert "FASTKD_BACKEND is 'Eager'" in capsys.readouterr().err


def test_an_unknown_backend_is_an_error_at_the_first_loss(monkeypatch):
    """Not at import, so that the command line can report it; a choice made in the program overrides it."""
    monkeypatch.setattr(backend, "_chosen", "nativ")
    with pytest.raises(ValueError, match="FASTKD_BACKEND is 'nativ'; expected one of auto"):
        fastkd.get_backend()
    with fastkd.use_backend("eager"):
        assert fastkd.get_backend() == "eager"
    with pytest.raises(ValueError, match="FASTKD_BACKEND is 'nativ'"):
        fastkd.get_backend()


def test_an_unknown_instruction_set_is_one_line():
    done = run("-m", "fastkd", "doctor", FASTKD_ISA="AVX2")
    assert done.returncode == 2
    assert done.stderr.startswith("fastkd: error: the environment's FASTKD_ISA is 'AVX2'; expected portable")
    assert done.stderr.count("\n") == 1


def test_an_empty_variable_counts_as_unset():
    done = run("-c", "import fastkd; print(fastkd.get_backend())", FASTKD_BACKEND="")
    assert done.stdout.strip() == "auto"


@pytest.mark.parametrize("value", ["two", "0", "-1", "1.5", " 2", "²", "٣"])
def test_an_invalid_count(value, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", value)
    for command in (["train", "glyphs/kd"], ["cache-teacher", "glyphs/kd", "--to", "cache"]):
        assert main(command) == 2
        assert f"the environment's WORLD_SIZE is {value!r}; expected an integer" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "")
    assert environment.count("WORLD_SIZE", 1, least=1) == 1


@pytest.mark.parametrize("variable", ["RANK", "LOCAL_RANK", "MASTER_PORT"])
def test_the_other_numbers_of_torchrun(variable, monkeypatch, capsys):
    numbers = {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
    }
    for name, value in {**numbers, variable: "first"}.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "glyphs/kd"]) == 2
    assert f"the environment's {variable} is 'first'; expected an integer" in capsys.readouterr().err


class ClosedPipe(io.StringIO):
    def write(self, text):
        raise BrokenPipeError


def help_status() -> int:
    """Of ``--help`` into a closed pipe: argparse ignores the error, except in early 3.10 and 3.11."""
    try:
        argparse.ArgumentParser().print_help(ClosedPipe())
    except BrokenPipeError:
        return 141
    return 0


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", [["recipes"], ["--help"], ["doctor"], ["bench", "--help"]])
def test_a_closed_pipe_ends_the_command_quietly(command, unbuffered):
    reader, writer = os.pipe()
    os.close(reader)  # as `head -1` does when it has its line
    with os.fdopen(writer, "w") as pipe:
        process = subprocess.run(
            [sys.executable, "-m", "fastkd", *command],
            stdout=pipe,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            cwd=ROOT,
        )
    assert process.stderr == ""
    # argparse only sees the errors of a stream without a buffer; the others come at the flush.
    assert process.returncode == (help_status() if unbuffered and "--help" in command else 141)


def test_a_command_without_stdout_and_stderr(tmp_path):
    words = ["train", "fashion-mnist/student", "data.synthetic=8", "train.epochs=1", "train.device=cpu"]
    code = "import os, sys; os.close(1); os.close(2); os.execv(sys.executable, sys.argv[1:])"
    command = [sys.executable, "-m", "fastkd", *words, "--runs", str(tmp_path)]
    process = subprocess.run([sys.executable, "-c", code, *command], cwd=ROOT)
    assert process.returncode == 0
    assert [path.name for path in tmp_path.glob("*/summary.json")] == ["summary.json"]


@pytest.mark.parametrize(
    ("device", "kind", "message"),
    [
        ("cuda:99", ValueError, "device is 'cuda:99', but torch finds"),
        ("gpu", ValueError, "device is 'gpu'; expected a device such as 'cpu'"),
        ("meta", ValueError, "device is 'meta', which holds no numbers"),
        ("xla", ValueError, "device is 'xla', which torch cannot use here"),
        (None, TypeError, "device is None"),
        (0, TypeError, "device is 0"),
    ],
)
def test_an_unavailable_device(device, kind, message):
    with pytest.raises(kind, match=message):
        fastkd.explain(8, 100, device=device)


def test_an_available_device():
    assert str(backend.checked_device("cpu", "device")) == "cpu"
    assert fastkd.explain(8, 100, device="cpu").device == "cpu"
