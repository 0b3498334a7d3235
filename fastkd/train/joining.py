"""How the processes of a training find each other: in bounded time, or with an error that names the missing.

torch waits half an hour for a process that never comes, and prints stack traces. Here every process first
greets the others through the store at ``MASTER_ADDR:MASTER_PORT``, so that all raise the same error.
"""

from __future__ import annotations

import json
import os
import platform
import re
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from fastkd import environment
from fastkd.errors import LaunchError
from fastkd.messages import first_line, one_line, some
from fastkd.version import __version__

_JOIN, _PEER = "FASTKD_JOIN_TIMEOUT", "FASTKD_PEER_TIMEOUT"
# Jobs of one allocation start seconds apart; importing torch from a network file system takes a minute.
_JOIN_SECONDS = 300
_groups = 0  # process groups that this process has joined: a store may outlive one


def join(backend: str) -> None:
    """Create the process group that the environment describes.

    Waits at most ``FASTKD_JOIN_TIMEOUT`` seconds (300) for the other processes. ``FASTKD_PEER_TIMEOUT``:
    seconds that an exchange waits for a process that has stopped answering; by default torch's, 1800 for gloo
    and 600 for NCCL. Raises ``LaunchError``.
    """
    global _groups
    rank, world = environment.count("RANK", 0), environment.count("WORLD_SIZE", 1)
    until = _Deadline(environment.count(_JOIN, _JOIN_SECONDS, least=1), rank)
    peer = environment.count(_PEER, 0)
    _groups += 1
    store = dist.PrefixStore(f"fastkd-{_groups}", _store(rank, world, until))
    _greet(store, rank, world, until)
    limits: dict[str, Any] = {"timeout": timedelta(seconds=peer)} if peer else {}
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, **limits)
    except RuntimeError as error:
        raise LaunchError(
            f"the processes have found each other but cannot connect: {_first_line(error)}; {_INTERFACE}"
        ) from None


class _Deadline:
    """The end of the wait; says on stderr, once, what is waited for."""

    def __init__(self, seconds: int, rank: int) -> None:
        self.seconds, self._rank = seconds, rank
        self._begin, self._told = time.monotonic(), False

    def left(self) -> timedelta:
        return timedelta(seconds=max(1.0, self._begin + self.seconds - time.monotonic()))

    def passed(self, what: str) -> bool:
        waited = time.monotonic() - self._begin
        if waited > 10 and not self._told:
            self._told = True
            limit = f"up to {self.seconds} s ({_JOIN})"
            print(f"fastkd (rank {self._rank}): waiting for {what}, {limit}", file=sys.stderr, flush=True)
        return waited >= self.seconds


def _store(rank: int, world: int, until: _Deadline) -> dist.Store:
    host, port = os.environ["MASTER_ADDR"], environment.count("MASTER_PORT", 0)
    place = f"MASTER_ADDR:MASTER_PORT = {host}:{port}"
    if port >= 2**16:
        raise LaunchError(f"MASTER_PORT is {port}; expected a port below 65536")
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not serves:
        _reach(host, port, place, until)
    try:
        store, _, _ = next(iter(dist.rendezvous("env://", timeout=until.left())))
    except dist.DistNetworkError as error:
        if serves:
            raise LaunchError(
                f"rank 0 on {_machine()} cannot listen on {place}: {_first_line(error)}; expected an "
                "address of its own machine and a free port"
            ) from None
        raise LaunchError(f"{place} answers, but not as torch's store: {_first_line(error)}") from None
    except dist.DistStoreError as error:
        joined = re.search(r"(\d+)/\d+ clients joined", str(error))
        came = f"only {joined[1]} of the {world} processes came" if joined else _first_line(error)
        raise LaunchError(
            f"{came} to {place} within {until.seconds} s ({_JOIN}); start the same command, with this "
            "address and port, on every machine"
        ) from None
    return store


def _reach(host: str, port: int, place: str, until: _Deadline) -> None:
    """Return once something listens there. torch's own client prints a stack trace per attempt."""
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
        except (OSError, UnicodeError) as error:  # the latter for a name with an empty label
            reason = getattr(error, "strerror", None) or one_line(error)
        else:
            return
        if until.passed(f"{place} ({reason})"):
            break
        time.sleep(0.3)
    with suppress(OSError, UnicodeError):
        if (address := socket.gethostbyname(host)) != host:
            place += f" ({address})"
    raise LaunchError(
        f"rank {environment.count('RANK', 0)} on {_machine()} cannot reach {place} within {until.seconds} s "
        f"({_JOIN}): {reason}; expected the first machine's address in the network that the machines share, "
        "which torchrun takes from --local-addr there"
    )


def _greet(store: dist.Store, rank: int, world: int, until: _Deadline) -> None:
    """Exchange what must fit before anything is computed. Raises the same ``LaunchError`` on every rank."""
    store.set(f"greeting/{rank}", json.dumps(_greeting()))
    missing = set(range(world))
    while True:
        missing -= {other for other in missing if store.check([f"greeting/{other}"])}
        if not missing or until.passed(_ranks(missing)):
            break
        time.sleep(0.1)
    if missing:
        raise LaunchError(
            f"{_ranks(missing)} of {world} did not come within {until.seconds} s ({_JOIN}); the output of "
            "those processes may say why"
        )
    greetings = [json.loads(store.get(f"greeting/{other}")) for other in range(world)]
    _all_have_read(store, rank, world)
    wrong = [f"rank {other}: {one['wrong']}" for other, one in enumerate(greetings) if one["wrong"]]
    if len({one["network"] for one in greetings}) > 1:
        alone = [
            f"rank {other} on {one['machine']}"
            for other, one in enumerate(greetings)
            if one["address"].startswith("127.") or one["address"] == "::1"
        ]
        if alone:
            wrong.append(
                f"{some(alone, 8)} would exchange tensors through loopback, the address of the machine's "
                f"name, which other machines cannot reach; {_INTERFACE}"
            )
    if wrong:
        raise LaunchError(some(wrong, 3))
    check_same(
        [(one["machine"], one["versions"]) for one in greetings], "install the same versions everywhere"
    )


def _all_have_read(store: dist.Store, rank: int, world: int) -> None:
    """Let the rank whose process holds the store leave last: the others may have to read an error from it."""
    came = store.add("read", 1)
    end = time.monotonic() + 10
    while rank == 0 and came < world and time.monotonic() < end:
        time.sleep(0.02)
        came = store.add("read", 0)


_INTERFACE = (
    "set GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME on GPUs) on every machine to its interface of the "
    "network that they share, for example eth0"
)


def _greeting() -> dict[str, Any]:
    import torch

    interface, wrong, address = os.environ.get("GLOO_SOCKET_IFNAME", ""), "", ""
    if interface:
        here = [name for _, name in socket.if_nameindex()]
        unknown = [name for name in interface.split(",") if name not in here]
        if unknown:
            wrong = (
                f"GLOO_SOCKET_IFNAME is {interface}, but {_machine()} has no interface {unknown[0]}; it has "
                f"{', '.join(here)}"
            )
    else:
        address = _address_of_gloo()
    return {
        "machine": _machine(),
        "network": _network(),
        "address": address,
        "wrong": wrong,
        "versions": {"fastkd": __version__, "torch": torch.__version__},
    }


def _address_of_gloo() -> str:
    """The address of the machine's name; loopback if that is none of the machine's own addresses."""
    with suppress(OSError):
        for family, _, _, _, place in socket.getaddrinfo(socket.gethostname(), 0, type=socket.SOCK_DGRAM):
            with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.bind(place)
                return str(place[0])
    return "127.0.0.1"


def _machine() -> str:
    return platform.node() or "this machine"


def _network() -> str:
    """Equal for processes that share a loopback interface: containers have one each."""
    with suppress(OSError), open("/proc/sys/kernel/random/boot_id") as boot:
        return f"{boot.read().strip()} {os.readlink('/proc/self/ns/net')}"
    return _machine()


def check_same(of_ranks: list[tuple[str, Mapping[str, Any]]], remedy: str) -> None:
    """Raise ``LaunchError`` unless all ranks have the same values; each gives its machine and its values."""
    machine, first = of_ranks[0]
    found = []
    for rank, (other, theirs) in enumerate(of_ranks[1:], 1):
        found += [
            f"{key} is {first.get(key, 'not set')} on rank 0 ({machine}), {theirs.get(key, 'not set')} "
            f"on rank {rank} ({other})"
            for key in dict.fromkeys((*first, *theirs))
            if first.get(key) != theirs.get(key)
        ]
    if found:
        raise LaunchError(f"the processes do not fit together: {some(found, 3)}; {remedy}")


# gloo raises a plain RuntimeError.
_LOST = re.compile(
    r"Connection closed by peer|Connection reset by peer|Connection refused|Timed out waiting \d+ ?ms"
    r"|Broken pipe|Application timeout caused pair closure|NCCL communicator was aborted"
)


def of_lost_peer(error: RuntimeError) -> str | None:
    """The message if the error says that other processes have ended or do not answer; otherwise None."""
    text = one_line(error)
    if not (isinstance(error, dist.DistError) or "gloo" in text.lower()) or not (found := _LOST.search(text)):
        return None
    return (
        f"another process of this training has ended or does not answer ({found[0]}{_peer(text)}); its own "
        "output may say why. What was written is kept: continue with --resume"
    )


def _peer(text: str) -> str:
    address = re.search(r"\[?(\d+\.\d+\.\d+\.\d+)\]?:\d+", text)
    return f", {address[1]}" if address else ""


def _ranks(ranks: set[int]) -> str:
    numbers = [str(rank) for rank in sorted(ranks)]
    return f"rank{'s' if len(numbers) > 1 else ''} {some(numbers, 8)}"


def _first_line(error: Exception) -> str:
    return first_line(error)[:300]
