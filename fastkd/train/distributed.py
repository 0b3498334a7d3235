"""Training with several processes: torchrun's environment, DDP, and collectives.

Without a process group every function behaves as with a single rank, so that the loop needs no cases.
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastkd import environment
from fastkd.distill.method import Method
from fastkd.errors import RecipeError

from .joining import check_same, join

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def rank() -> int:
    return dist.get_rank() if _active() else 0


def world() -> int:
    return dist.get_world_size() if _active() else 1


def is_first() -> bool:
    """Whether this rank writes files and prints."""
    return rank() == 0


@contextlib.contextmanager
def launched() -> Iterator[None]:
    """Create the process group that torchrun's environment variables describe, if they are set.

    GPU tensors use NCCL, CPU tensors gloo. Raises ``RecipeError`` if only some of the variables are set, and
    ``LaunchError`` if the processes do not find each other or do not fit together.
    """
    if _active() or number("WORLD_SIZE", 1, least=1) < 2:
        yield
        return
    missing = [name for name in _TORCHRUN if not os.environ.get(name)]
    if missing:
        raise RecipeError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} not set: start with "
            "torchrun, or set what it sets (docs/launch.md)"
        )
    for variable in ("RANK", "LOCAL_RANK", "MASTER_PORT"):
        number(variable, 0)
    if torch.cuda.is_available():
        torch.cuda.set_device(local_device())
    join("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def local_device() -> torch.device:
    """The GPU of this process: one per rank of a machine."""
    local, count = number("LOCAL_RANK", 0), torch.cuda.device_count()
    if local >= count:
        raise RecipeError(
            f"LOCAL_RANK is {local}, but this machine has {count} GPUs; start as many processes as GPUs, "
            "or set train.device=cpu"
        )
    return torch.device("cuda", local)


@contextlib.contextmanager
def first_rank_first() -> Iterator[None]:
    """Run the block on the first rank, then on the others: for caches that one process fills."""
    if not is_first():
        barrier()
    yield
    if is_first():
        barrier()


def barrier() -> None:
    if _active():
        sum_over_ranks(torch.zeros(1))


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, reduced on the CPU if there is gloo."""
    if world() == 1:
        return values
    values = values.to(_collective_device(), copy=True)
    dist.all_reduce(values)
    return values.cpu()


def any_over_ranks(*flags: bool) -> list[bool]:
    """For each flag, whether it is set on any rank."""
    if world() == 1:
        return list(flags)
    return [count > 0 for count in sum_over_ranks(torch.tensor(flags, dtype=torch.float32)).tolist()]


def from_first(value: Any) -> Any:
    """The first rank's value, on every rank."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, device=_collective_device())
    return box[0]


def of_all_ranks(value: Any) -> list[Any]:
    """Every rank's value, on every rank."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


def check_agreement(values: Mapping[str, Any], remedy: str) -> None:
    """Raise ``LaunchError``, on every rank, unless all have the same ``values``; ``remedy`` ends it."""
    if world() > 1:
        check_same(of_all_ranks((platform.node(), dict(values))), remedy)


def wrap(method: Method, *, leaves_parameters_out: bool) -> nn.Module:
    """``method`` under DDP if there are several ranks; it has the student and the heads, not the teacher.

    ``leaves_parameters_out``: a step may leave trained parameters without gradient, for which DDP would wait.
    """
    if world() == 1 or not any(parameter.requires_grad for parameter in method.parameters()):
        return method
    device = next(method.parameters()).device
    return nn.parallel.DistributedDataParallel(
        method,
        device_ids=[device] if device.type == "cuda" else None,
        find_unused_parameters=leaves_parameters_out,
        gradient_as_bucket_view=True,
    )


def without_sync(runner: nn.Module, wanted: bool) -> contextlib.AbstractContextManager[Any]:
    """Skip DDP's gradient reduction if ``wanted``: for all micro-batches of a step but the last."""
    if wanted and isinstance(runner, nn.parallel.DistributedDataParallel):
        return runner.no_sync()
    return contextlib.nullcontext()


@torch.no_grad()
def share_buffers(module: nn.Module) -> None:
    """Copy the first rank's buffers to all ranks, so that the validated network is the saved one.

    Without SyncBatchNorm each rank has its own running statistics.
    """
    if world() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def number(name: str, default: int, least: int = 0) -> int:
    """A number that a launcher leaves in the environment variable ``name``; ``default`` if unset or empty.

    Raises ``RecipeError`` that names the variable.
    """
    try:
        return environment.count(name, default, least)
    except ValueError as error:
        raise RecipeError(str(error)) from None


def _active() -> bool:
    return dist.is_available() and dist.is_initialized()


def _collective_device() -> torch.device:
    # A process group made by the user may have only NCCL, which does not support CPU tensors.
    backend = dist.get_backend_config(None)
    return (
        torch.device("cpu") if "gloo" in str(backend) else torch.device("cuda", torch.cuda.current_device())
    )
