"""Limits that a large data set meets: missing classes, files that cannot be read, the disk of the index."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from fastkd.data import index

from .common import (
    FILES,
    ROOT,
    SECONDS,
    NotTriedError,
    Row,
    refused,
    run_folder,
    succeeds,
    tree,
)
from .disk import fill_up, small_disk


def class_only_in(part: str) -> Callable[[], str]:
    def act() -> str:
        tree()
        Path("tree", "val" if part == "train" else "train", "b").rename("moved")
        return refused(["train", *FILES], "different class folders: b")

    return act


def empty_file() -> str:
    tree()
    Path("tree/train/a/0.jpg").write_bytes(b"")
    succeeds("train", *FILES)
    ((name, reason),) = json.loads((run_folder() / "summary.json").read_text())["corrupt_images"].items()
    assert name.endswith("tree/train/a/0.jpg")
    assert reason == "the file is empty"
    return f"skipped: {reason}"


def unreadable(path: str, *words: str) -> Callable[[], str]:
    """As a user without the right to read; root has it always, unless it gives up the capability."""

    def act() -> str:
        if os.geteuid() == 0 and shutil.which("setpriv") is None:
            raise NotTriedError("root may read everything, and there is no setpriv")
        tree()
        os.chmod(path, 0)
        capabilities = "-dac_override,-dac_read_search"
        drop = ["setpriv", f"--bounding-set={capabilities}", f"--inh-caps={capabilities}"]
        command = [*(drop if os.geteuid() == 0 else []), sys.executable, "-m", "fastkd", "train", *FILES]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
        os.chmod(path, 0o755)
        text = done.stdout + done.stderr
        assert "Traceback" not in text, text
        assert all(word in text for word in words), text
        (line,) = [line for line in text.splitlines() if words[0] in line]
        return line.removeprefix("fastkd: error: ")

    return act


def no_disk_for_the_index() -> str:
    tree()
    with small_disk("cache", 16):
        fill_up("cache")
        before = os.environ.get("FASTKD_CACHE"), index.WORTH_KEEPING
        os.environ["FASTKD_CACHE"], index.WORTH_KEEPING = os.path.abspath("cache"), 1
        try:
            out = succeeds("train", *FILES)
        finally:
            index.WORTH_KEEPING = before[1]
            os.environ.pop("FASTKD_CACHE") if before[0] is None else os.environ.update(FASTKD_CACHE=before[0])
        assert [path.name for path in Path("cache").iterdir()] == ["filler"]
    notes = re.findall(r"every start finds .*?No space left on device", " ".join(out.split()))
    assert len(notes) == 2, out
    return f"trained; noted: {notes[0]}"


def in_shell(prepare: str, *words: str, status: int = 2) -> str:
    """The message of a training after ``prepare``, in a mount namespace of its own."""
    tree()
    command = [
        "unshare",
        "--mount",
        "sh",
        "-c",
        f'{prepare} && exec "$@"',
        "sh",
        sys.executable,
        "-m",
        "fastkd",
    ]
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        raise NotTriedError("no mount namespace may be made here")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "train", *FILES, *words], env=environment, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == status, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("fastkd: error: ")]
    return line.removeprefix("fastkd: error: ").replace(os.getcwd() + "/", "")


def little_shared_memory() -> str:
    found = in_shell("mount -t tmpfs -o size=64k tmpfs /dev/shm", "data.workers=2", "data.size=160")
    assert "/dev/shm is too small" in found
    return found


def few_open_files() -> str:
    found = in_shell("ulimit -n 24", "data.workers=8")
    assert "data.workers = 8" in found
    assert "Too many open files" in found
    return found


LIMITS: list[Row] = [
    ("a class that `data.val` has not", "refused by name", class_only_in("train")),
    ("a class that `data.train` has not", "refused by name", class_only_in("val")),
    ("an empty image file", "skipped and named", empty_file),
    (
        "an image that may not be read",
        "skipped and named",
        unreadable("tree/train/a/0.jpg", "skipped", "Permission denied"),
    ),
    (
        "a class folder that may not be read",
        "refused by folder",
        unreadable("tree/train/a", "Permission denied", "tree/train"),
    ),
    ("a `/dev/shm` of 64 kB and two workers", "ends, with what to do", little_shared_memory),
    ("`ulimit -n 24` and eight workers", "ends, with what to do", few_open_files),
    ("the disk is full when the index is kept", "trained, with a note", no_disk_for_the_index),
]
