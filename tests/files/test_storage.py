"""Files, locks and signals of a run: links, dead processes, several signals at once."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fastkd.errors import FolderInUseError, StorageError
from fastkd.files.atomic import owner, remove_leftovers, take_room, write_atomically
from fastkd.files.cache import cache_folder
from fastkd.files.regular import NotAFileError, read_regular
from fastkd.train.run.lock import locked
from tests.data.image_trees import make_tree


def other_process(script: str, folder: Path) -> subprocess.Popen[str]:
    """A Python process that has reported that it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=folder, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "ready"
    return process


HOLDS_WITH_WORKERS = """
import multiprocessing, pathlib, time
from fastkd.train.run.lock import locked
with locked(pathlib.Path(".")):
    context = multiprocessing.get_context("fork")
    # A forked process has the lock until its first lines of Python have run.
    runs = context.Barrier(3)
    workers = [context.Process(target=lambda: (runs.wait(), time.sleep(60)), daemon=True) for _ in range(2)]
    for worker in workers:
        worker.start()
    runs.wait()
    print("ready", flush=True)
    print(*(worker.pid for worker in workers), flush=True)
    time.sleep(60)
"""


def test_the_lock_ends_with_its_holder_though_its_workers_live(tmp_path: Path) -> None:
    process = other_process(HOLDS_WITH_WORKERS, tmp_path)
    try:
        with pytest.raises(FolderInUseError, match=f"process {process.pid}"), locked(tmp_path):
            pass
        workers = [int(word) for word in process.stdout.readline().split()] if process.stdout else []
        process.kill()
        process.wait()
        with locked(tmp_path):
            pass
        assert len(workers) == 2
        for worker in workers:
            os.kill(worker, 0)  # it is running
    finally:
        os.killpg(process.pid, signal.SIGKILL)


def test_a_worker_that_ends_leaves_the_lock(tmp_path: Path) -> None:
    with locked(tmp_path):
        worker = multiprocessing.get_context("fork").Process(target=int)
        worker.start()
        worker.join()
        with pytest.raises(FolderInUseError), locked(tmp_path):
            pass
        assert (tmp_path / ".lock").exists()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("make", [os.symlink, os.link])
def test_the_lock_is_no_way_to_another_file(make: Any, tmp_path: Path) -> None:
    folder, other = tmp_path / "run", tmp_path / "other"
    folder.mkdir()
    other.write_text("precious")
    make(other, folder / ".lock")
    with pytest.raises(StorageError, match=r"run/\.lock is .*delete it"), locked(folder):
        pass
    assert other.read_text() == "precious"


def test_the_lock_is_no_fifo(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(StorageError, match="delete it"), locked(tmp_path):
        pass


def test_a_write_follows_no_link(tmp_path: Path) -> None:
    other, path = tmp_path / "other", tmp_path / "last.pt"
    other.write_text("precious")
    # The name of temporary files in older versions, and the file itself.
    (tmp_path / f".last.{os.getpid()}.tmp.pt").symlink_to(other)
    path.symlink_to(other)
    write_atomically(path, lambda temporary: temporary.write_text("state"))
    assert (path.read_text(), other.read_text()) == ("state", "precious")
    assert not path.is_symlink()


def test_temporary_names_cannot_be_foreseen(tmp_path: Path) -> None:
    names = set()
    for _ in range(2):
        write_atomically(tmp_path / "a.pt", lambda temporary: names.add(temporary.name))
    assert len(names) == 2


def test_a_written_file_has_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").write_text("")
    write_atomically(tmp_path / "written", lambda temporary: temporary.write_text(""))
    assert (tmp_path / "written").stat().st_mode == (tmp_path / "usual").stat().st_mode


DIES_WRITING = """
import os, pathlib
from fastkd.files.atomic import write_atomically
print("ready", flush=True)
write_atomically(pathlib.Path("last.pt"), lambda temporary: os.kill(os.getpid(), 9))
"""


def test_what_the_dead_left_is_removed_at_the_next_start(tmp_path: Path) -> None:
    dead = other_process(DIES_WRITING, tmp_path)
    dead.wait()
    (left,) = tmp_path.iterdir()
    assert re.fullmatch(r"\.last\..*\.tmp\.pt", left.name)
    older = tmp_path / f".best.{dead.pid}.tmp.pt"  # names of older versions
    away = tmp_path / f".last.{owner().rpartition('-')[0]}x-{dead.pid}.00000000.tmp.pt"  # another machine's
    live = tmp_path / f".student.{owner().rpartition('-')[0]}-{os.getppid()}.00000000.tmp.pt"
    kept = [away, live, tmp_path / "last.pt", tmp_path / ".hidden.tmp", tmp_path / ".tmp"]
    for path in (older, *kept):
        path.write_text("")
    remove_leftovers(tmp_path)
    assert set(tmp_path.iterdir()) == set(kept)
    yesterday = time.time() - 90_000
    os.utime(away, (yesterday, yesterday))
    with locked(tmp_path):
        assert not away.exists()


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({}, "home/.cache/fastkd"),
        ({"XDG_CACHE_HOME": "~/elsewhere"}, "home/elsewhere/fastkd"),
        ({"XDG_CACHE_HOME": ""}, "home/.cache/fastkd"),
        ({"XDG_CACHE_HOME": "~/elsewhere", "FASTKD_CACHE": "~/mine"}, "home/mine"),
        ({"FASTKD_CACHE": ""}, "home/.cache/fastkd"),
    ],
)
def test_the_cache_folder(
    variables: dict[str, str], folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("XDG_CACHE_HOME", "FASTKD_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == tmp_path / folder


def test_only_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    assert read_regular(tmp_path / "file") == b"x"
    os.mkfifo(tmp_path / "fifo")
    for path, kind in ((tmp_path / "fifo", "FIFO"), (tmp_path, "folder"), (Path("/dev/zero"), "device")):
        with pytest.raises(NotAFileError, match=kind):
            read_regular(path)


@pytest.mark.parametrize("reserves", [True, False])
def test_room_is_taken_and_the_content_stays(
    reserves: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    if not reserves:
        monkeypatch.setattr(os, "posix_fallocate", refuses, raising=False)  # macOS has none
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.write(b"header")
        file.truncate(3_000_000)
    take_room(path)
    assert path.read_bytes() == b"header".ljust(3_000_000, b"\0")
    assert path.stat().st_blocks * 512 >= 3_000_000


def python_m_fastkd(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fastkd", "train", *arguments, "train.epochs=100000", "train.device=cpu"]
    command += ["train.threads=1", "train.checkpoint_every=1", "train.batch_size=4"]
    return subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def signalled_until_it_is_gone(process: subprocess.Popen[str], run: Path) -> str:
    """Output of a process that must end with status 75; signals go to all of its processes."""
    try:
        while not (run / "last.pt").exists():
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.02)
        deadline = time.monotonic() + 60
        while process.poll() is None:  # including interpreter exit
            assert time.monotonic() < deadline
            os.killpg(process.pid, signal.SIGTERM)
            os.killpg(process.pid, signal.SIGUSR1)
            time.sleep(0.05)
        text = process.stderr.read() if process.stderr else ""
        assert process.returncode == 75, text
        return text
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_more_signals_do_not_cost_the_status(tmp_path: Path) -> None:
    process = python_m_fastkd(
        tmp_path, "fashion-mnist/student", "data.synthetic=60", "student.width=2", "train.schedule=constant"
    )
    assert "to resume" in signalled_until_it_is_gone(process, tmp_path / "runs/fashion-mnist-student-001")


def test_signals_to_data_workers_do_not_cost_the_checkpoint(tmp_path: Path) -> None:
    make_tree(tmp_path / "tree", classes=2, train=4, val=1)
    process = python_m_fastkd(
        tmp_path, "imagenet/r18", "data.root=tree", "data.size=24", "data.workers=2",
        "student.name=small_cnn", "student.width=2", "train.milestones=[1]",
    )  # fmt: skip
    run = tmp_path / "runs/imagenet-r18-student.name-small_cnn-001"
    assert "to resume" in signalled_until_it_is_gone(process, run)
