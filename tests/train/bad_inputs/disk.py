"""A full disk."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastkd.train.commands.export import SUFFIXES

from .common import RUN, TRAIN, NotTriedError, Row, in_subprocess, refused, succeeds


@contextlib.contextmanager
def small_disk(folder: str, kilobytes: int) -> Iterator[None]:
    """Mount a file system of ``kilobytes``; skips the row if mounting is not permitted."""
    Path(folder).mkdir()
    options = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder]
    if subprocess.run(options, capture_output=True).returncode:
        raise NotTriedError("no file system may be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill_up(folder: str) -> None:
    with contextlib.suppress(OSError), Path(folder, "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(512))


def full_glyph_cache() -> str:
    with small_disk("cache", 100):
        environment = {"FASTKD_CACHE": os.path.abspath("cache")}
        before = {name: os.environ.get(name) for name in environment}
        os.environ.update(environment)
        try:
            options = ["data.characters=41-5A,61-7A", "train.device=cpu", "train.threads=1"]
            status, text = in_subprocess("train", "glyphs/student", *options)
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        assert status == 2, (status, text)
        assert "No space left" in text
        assert not list(Path("cache").iterdir())
    return text.strip().removeprefix("fastkd: error: ").replace(os.getcwd() + "/", "")


def full_at_the_start() -> str:
    with small_disk("runs", 64):
        Path("runs/one").mkdir()
        shutil.copy(Path(__file__), "runs/one/x")
        fill_up("runs")
        return refused(["train", *TRAIN], "No space left on device")


def full_at_the_lock() -> str:
    succeeds("train", *TRAIN)
    with small_disk("full", 512):
        shutil.copytree(RUN, "full/run")
        fill_up("full")
        return refused(["train", "--resume", "full/run"], "full/run", "No space left on device")


def full_for(form: str) -> Callable[[], str]:
    def act() -> str:
        succeeds("train", *TRAIN)
        with small_disk("full", 16):
            fill_up("full")
            file = f"full/s{SUFFIXES[form]}"
            told = refused(["export", RUN, "--format", form, "--to", file], file, "No space left")
            assert [path.name for path in Path("full").iterdir()] == ["filler"]
        return told

    return act


def full_for_a_plot() -> str:
    succeeds("train", *TRAIN)
    with small_disk("full", 16):
        fill_up("full")
        told = refused(["plot", RUN, "--to", "full/c.png"], "full/c.png", "No space left")
        assert [path.name for path in Path("full").iterdir()] == ["filler"]
    return told


@contextlib.contextmanager
def no_room_for(name: str) -> Iterator[None]:
    original = os.replace

    def full(source: Any, target: Any) -> None:
        if Path(target).name == name:
            raise OSError(28, "No space left on device")
        original(source, target)

    os.replace = full  # type: ignore[assignment]
    try:
        yield
    finally:
        os.replace = original


def full_for_the_recipe() -> str:
    with no_room_for("recipe.yaml"):
        told = refused(["train", *TRAIN], f"{RUN}/recipe.yaml", "No space left")
    assert not list(Path("runs").iterdir())
    succeeds("train", *TRAIN)
    return told


def full_when_writing(name: str) -> Callable[[], str]:
    """The disk is full when a file of the run folder is written; the run is resumed when there is space."""

    def act() -> str:
        with no_room_for(name):
            told = refused(
                ["train", *TRAIN], f"{RUN}/{name}", "No space left", "continue with: fastkd train --resume"
            )
        succeeds("train", "--resume", RUN)
        assert Path(RUN, name).exists()
        return told

    return act


DISK: list[Row] = [
    ("the disk is full when glyphs are rendered", "one line, nothing left behind", full_glyph_cache),
    ("the disk is full when a run folder is made", "one line", full_at_the_start),
    ("the disk is full when a run is resumed", "one line", full_at_the_lock),
    ("the disk is full at `export`", "one line, no half file", full_for("state_dict")),
    ("the same, torch-export", "one line, no half file", full_for("torch-export")),
    ("the disk is full at `plot`", "one line, no half file", full_for_a_plot),
    ("the disk is full when recipe.yaml is written", "one line, no empty folder", full_for_the_recipe),
    *(
        (f"the disk is full when {name} is written", "one line; resumed later", full_when_writing(name))
        for name in ("best.pt", "metrics.jsonl", "summary.json")
    ),
]
