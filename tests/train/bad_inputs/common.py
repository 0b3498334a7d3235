"""Helpers of the rows: running commands, small data sets, running one row."""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fastkd.cli import main

Row = tuple[str, str, Callable[..., str]]

TRAIN = [
    "fashion-mnist/student", "data.synthetic=40", "student.width=2", "train.epochs=1", "train.batch_size=16",
    "train.device=cpu", "train.threads=1",
]  # fmt: skip
RUN = "runs/fashion-mnist-student-001"
CONSTANT = "train.schedule=constant"
ROOT = Path(__file__).resolve().parents[3]
SECONDS = 100  # per row; one that takes longer hangs


def run(*arguments: str) -> tuple[int, str, str]:
    """Status, output and errors of a command, in this process, by streams with Python's own settings."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", errors) for errors in ("strict", "backslashreplace"))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(list(arguments))
    texts = []
    for stream in (out, err):
        stream.seek(0)
        texts.append(stream.read())
    return status, texts[0], texts[1]


def refused(arguments: list[str], *words: str) -> str:
    """The error of a command that must end with status 2 and one line with ``words``."""
    status, _, text = run(*arguments)
    assert status == 2, f"status {status}: {text}"
    lines = text.strip().splitlines()
    assert len(lines) == 1, text
    assert "weights_only" not in text
    for word in words:
        assert word in text, text
    return lines[0].removeprefix("fastkd: error: ")


def succeeds(*arguments: str) -> str:
    status, out, text = run(*arguments)
    assert status == 0, text
    return out


def in_subprocess(*arguments: str, limits: str = "", timeout: float = SECONDS) -> tuple[int, str]:
    """Status and errors of a command in a separate shell, with limits such as ``ulimit -n 64``."""
    command = [sys.executable, "-m", "fastkd", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", f'{limits or "true"} && exec "$@"', "bash", *command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stderr


def jpeg(path: Path, seed: int = 0) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 40, 3), np.uint8)
    Image.fromarray(pixels).save(path, "JPEG")


def tree() -> None:
    for part, count in (("train", 4), ("val", 2)):
        for label in "ab":
            for number in range(count):
                jpeg(Path("tree", part, label, f"{number}.jpg"), number)


def run_folder() -> Path:
    """The folder of the only run; its name depends on the overrides."""
    (folder,) = Path("runs").glob("*-001")
    return folder


FILES = [
    "imagenet/r18", "data.root=tree", "data.size=24", "student.name=small_cnn", "student.width=2",
    "data.workers=0", "train.epochs=1", "train.batch_size=4", "train.device=cpu", "train.threads=1",
    "train.milestones=[1]", "train.channels_last=false", "train.precision=float32",
]  # fmt: skip


class NotTriedError(Exception):
    """A row cannot be tried on this machine."""


def happened(act: Callable[..., str], folder: Path) -> str:
    """The result of a row's function, run in ``folder``; raises if it hangs."""

    def late(*_: object) -> None:
        raise AssertionError(f"still running after {SECONDS} s")

    before = os.getcwd()
    handler = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        os.chdir(folder)
        return act(folder) if inspect.signature(act).parameters else act()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        os.chdir(before)
