"""Data workers among the signals that a scheduler or a terminal sends to all processes of a job."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastkd.data.files import load_file_data
from fastkd.data.workers import start_method
from fastkd.recipe.sections import FolderData

from .image_trees import make_tree

# As FileLoader does it; prints the workers' process numbers, and ends when told to.
PROGRAM = """
import functools, os, sys
import torch
from torch.utils.data import DataLoader
from fastkd.data.workers import end_at_exit, from_one_process_only, held_back, start_method

init = functools.partial(from_one_process_only, os.getpid())
loader = DataLoader(
    range(8),
    num_workers=2,
    multiprocessing_context=start_method(),
    persistent_workers=True,
    worker_init_fn=init,
)
end_at_exit()
with held_back():
    batches = iter(loader)
for _ in batches:
    pass
print(*(worker.pid for worker in batches._workers), flush=True)
sys.stdin.readline()
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux")
def test_a_scheduler_s_signal_does_not_hide_the_process_s_own() -> None:
    """The kernel keeps one pending SIGTERM: a second, sent before the first is taken, is lost."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    workers = [int(number) for number in process.stdout.readline().split()]
    assert len(workers) == 2
    try:
        for number in (signal.SIGSTOP, signal.SIGTERM):
            for worker in workers:
                os.kill(worker, number)
        process.stdin.close()
        time.sleep(1.5)  # it has sent its signal to the first, and waits
        for worker in workers:
            os.kill(worker, signal.SIGCONT)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.stdout.close()
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)


# The command line, whose workers take a second to start.
SLOW_START = """
import sys, time
from multiprocessing import util
from fastkd.cli import main

util.register_after_fork(main, lambda _: time.sleep(1))
sys.exit(main(sys.argv[1:]))
"""
TRAIN = [
    "train", "imagenet/r18", "data.root=tree", "data.size=24", "data.workers=2", "student.name=small_cnn",
    "student.width=4", "train.batch_size=4", "train.epochs=2", "train.milestones=[1]", "train.lr=0.01",
    "train.device=cpu", "train.threads=1",
]  # fmt: skip


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux")
def test_ctrl_c_while_workers_start(tmp_path: Path) -> None:
    make_tree(tmp_path / "tree")
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_START, *TRAIN],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 60
    try:
        while len(workers := children.read_text().split()) < 2 or not [*tmp_path.glob("runs/*")]:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "no workers came"
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130
    (run,) = tmp_path.glob("runs/*")
    assert error.strip() == f"stopped; to resume: fastkd train --resume {run.relative_to(tmp_path)}"
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]


@pytest.mark.skipif(sys.platform != "linux", reason="macOS and Windows start workers anew")
def test_workers_share_the_memory_of_their_process(tmp_path: Path) -> None:
    """A fork server's are children of the server, and share only what that has imported."""
    make_tree(tmp_path / "tree", classes=2, train=4, val=1)
    data = load_file_data(FolderData(name="imagefolder", root=str(tmp_path / "tree"), size=24, workers=1))
    loader = data.train_loader(2, 0, torch.device("cpu"))
    before = set(multiprocessing.active_children())  # of other tests
    assert len(list(loader)) == 4
    (worker,) = set(multiprocessing.active_children()) - before
    assert f"\nPPid:\t{os.getpid()}\n" in Path(f"/proc/{worker.pid}/status").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="macOS and Windows start workers anew")
@pytest.mark.parametrize(
    ("chosen", "default", "used"),
    [
        (None, "fork", "fork"),
        (None, "forkserver", "fork"),
        ("forkserver", "forkserver", "fork"),  # set by torch or another library as it started a process
        ("forkserver", "fork", None),
        ("spawn", "forkserver", None),
    ],
)
def test_a_start_method_that_was_chosen_is_used(
    monkeypatch: pytest.MonkeyPatch, chosen: str | None, default: str, used: str | None
) -> None:
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none: chosen)
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: [default])
    assert start_method() == used
