"""Run a function in two processes that talk by gloo."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing as multiprocessing

WORLD = 2


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def on_two_ranks(work: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """What ``work(*arguments)`` returns on each rank; tensors and plain values."""
    multiprocessing.spawn(_enter, (free_port(), str(folder), work, arguments), nprocs=WORLD)
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(WORLD)]


def _enter(rank: int, port: int, folder: str, work: Callable[..., Any], arguments: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=WORLD)
    try:
        torch.save(work(*arguments), Path(folder) / f"rank-{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()
