"""Processes connected by gloo, started as torchrun does."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

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


def on_two_ranks(work: Callable[..., Any], folder: Path) -> list[Any]:
    """Run ``work()`` on two ranks; returns the result of each, tensors and plain values."""
    assert finish(start(WORLD, _in_group, work, str(folder))) == [0] * WORLD
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(WORLD)]


def _enter(environment: dict[str, str], work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.exit(work(*arguments))


def _in_group(work: Callable[..., Any], folder: str) -> None:
    with distributed.launched():
        torch.save(work(), Path(folder) / f"rank-{distributed.rank()}.pt")
