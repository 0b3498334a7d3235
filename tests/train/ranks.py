"""Processes connected by gloo, started as torchrun does."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastkd.cli import main
from fastkd.train import distributed

WORLD = 2
# Ranks are forked from a process that has only imported everything, which saves seconds per rank.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "fastkd.train.run.run",
        "fastkd.train.run.results",
        "fastkd.data.arrays",
        "matplotlib.figure",
        "torch._dynamo",
    ]
)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def start(ranks: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Start processes that run ``work(*arguments)`` with torchrun's environment variables."""
    together = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = []
    for rank in range(ranks):
        environment = {**together, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(_CONTEXT.Process(target=_enter, args=(environment, work, arguments)))
        processes[-1].start()
    return processes


def finish(processes: list[Any]) -> list[int]:
    """Wait for the processes; returns their exit statuses."""
    for process in processes:
        process.join(timeout=120)
    return [process.exitcode for process in processes]


def launch(ranks: int, folder: Path, arguments: list[str]) -> list[int]:
    """Run `fastkd train` in ``folder``; returns the exit statuses."""
    return finish(start(ranks, in_folder, str(folder), arguments))


def in_folder(folder: str, arguments: list[str]) -> int:
    os.chdir(folder)
    return main(["train", *arguments])


def steps_done(run: Path, per_epoch: int = 4) -> int:
    """The number of epochs and steps in the newest state, in steps."""
    try:
        state = torch.load(run / "last.pt", weights_only=True)
    except (OSError, RuntimeError, EOFError):  # not there yet
        return 0
    position = state["position"]
    return per_epoch * len(state["history"]) + (position["meter"]["steps"] if position else 0)


def kill_after(steps: int, run: Path, processes: list[Any]) -> None:
    """SIGKILL all processes once the state of ``run`` has this many steps."""
    deadline = time.monotonic() + 60
    while steps_done(run) < steps:
        assert time.monotonic() < deadline, "no checkpoint came"
        assert all(process.is_alive() for process in processes), "it ended before it was killed"
        time.sleep(0.005)
    for process in processes:
        process.kill()
    assert finish(processes) == [-signal.SIGKILL] * len(processes)


def on_two_ranks(work: Callable[..., Any], folder: Path) -> list[Any]:
    """Run ``work()`` on two ranks; returns the result of each, tensors and plain values."""
    return on_ranks(WORLD, work, folder)


def on_ranks(ranks: int, work: Callable[..., Any], folder: Path) -> list[Any]:
    assert finish(start(ranks, _in_group, work, str(folder))) == [0] * ranks
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(ranks)]


def _enter(environment: dict[str, str], work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.exit(work(*arguments))


def _in_group(work: Callable[..., Any], folder: str) -> None:
    with distributed.launched():
        torch.save(work(), Path(folder) / f"rank-{distributed.rank()}.pt")
