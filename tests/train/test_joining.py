"""Processes that do not meet or do not fit together say so in time; two nodes train like one machine."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastkd.cli import main
from fastkd.errors import LaunchError
from fastkd.train import joining
from fastkd.train.joining import check_same, of_lost_peer
from fastkd.train.random_state import get_random_state, seed_generators
from fastkd.train.run import agreement
from tests.data.image_trees import load_script, make_tree

from .ranks import finish, free_port, start
from .tiny import STUDENT

# Of a rank: its words beside STUDENT, and its environment; None: this rank does not start.
Rank = tuple[list[str], dict[str, str]] | None
SAME: Rank = ([], {})
NETWORK = 0x40000000  # CLONE_NEWNET


def train(folder: str, of_rank: list[Rank]) -> int:
    """A rank: `fastkd train`, with its errors in a file."""
    number = os.environ["RANK"]
    given = of_rank[int(number)]
    if given is None:
        return 0
    words, variables = given
    os.environ.update({"FASTKD_JOIN_TIMEOUT": "2", **variables})
    os.chdir(folder)
    if (space := os.environ.pop("NETNS", None)) is not None:
        with open(f"/var/run/netns/{space}") as file:
            assert ctypes.CDLL(None).setns(file.fileno(), NETWORK) == 0
    joining.__version__ = os.environ.pop("VERSION", joining.__version__)
    with open(f"rank-{number}.txt", "w") as errors, contextlib.redirect_stderr(errors):
        return main(["train", *words])


def together(folder: Path, *of_rank: Rank) -> tuple[list[int], list[str]]:
    """Start the ranks; their statuses and errors."""
    given = [None if one is None else ([*STUDENT, *one[0]], one[1]) for one in of_rank]
    statuses = finish(start(len(given), train, str(folder), given))
    paths = [folder / f"rank-{rank}.txt" for rank, one in enumerate(given) if one is not None]
    return [status for status, one in zip(statuses, given, strict=True) if one is not None], [
        path.read_text() for path in paths
    ]


ALONE = r"only 1 of the 2 processes came to MASTER_ADDR:MASTER_PORT = 127.0.0.1:\d+ within 2 s"
LOST = "another process of this training has ended or does not answer (.*); its own output may say why"


@pytest.mark.parametrize(
    ("second", "words"),
    [
        (None, [ALONE]),
        (([], {"MASTER_PORT": "99999"}), [ALONE, "MASTER_PORT is 99999; expected a port below 65536"]),
        (
            ([], {"MASTER_ADDR": "nobody.invalid"}),
            [ALONE, r"rank 1 on \S+ cannot reach MASTER_ADDR:MASTER_PORT = nobody\.invalid:\d+ within 2 s"],
        ),
        (
            ([], {"GLOO_SOCKET_IFNAME": "ib7"}),
            [r"rank 1: GLOO_SOCKET_IFNAME is ib7, but \S+ has no interface ib7; it has lo"] * 2,
        ),
        (([], {"VERSION": "0.0.9"}), [r"fastkd is \S+ on rank 0 \(\S+\), 0\.0\.9 on rank 1"] * 2),
        (
            (["train.lr=0.5"], {}),
            [r"train\.lr is 0\.01 on rank 0 \(\S+\), 0\.5 on rank 1 .*same command"] * 2,
        ),
        ((["--resume"], {}), [r"--resume is not set on rank 0 \(\S+\), given on rank 1"] * 2),
        ((["train.lx=1"], {}), [LOST, "unknown key 'train.lx'"]),
        (
            ([], {"FASTKD_JOIN_TIMEOUT": "soon"}),
            [ALONE, "FASTKD_JOIN_TIMEOUT is 'soon'; expected an integer"],
        ),
    ],
    ids=["alone", "port", "address", "interface", "version", "recipe", "resume", "key", "timeout"],
)
def test_processes_that_do_not_fit_say_so(second: Rank, words: list[str], tmp_path: Path) -> None:
    begin = time.monotonic()
    statuses, errors = together(tmp_path, SAME, second)
    assert time.monotonic() - begin < 60
    assert set(statuses) == {2}
    for text, expected in zip(errors, words, strict=True):
        (line,) = [line for line in text.splitlines() if line.startswith("fastkd: error")]
        assert re.search(expected, line), line
    assert not (tmp_path / "runs").exists()  # found out before anything was written


def test_data_that_differ_between_nodes(tmp_path: Path) -> None:
    for name, count in (("a", 4), ("b", 5)):
        make_tree(tmp_path / name, train=count)
    images = ["imagenet/r18", "student.name=small_cnn", "student.width=2", "data.size=24", "data.workers=0"]
    images += ["train.batch_size=4", "train.device=cpu", "train.milestones=[1]", "train.epochs=1"]
    of_rank = [([*images, f"data.root={name}"], {}) for name in ("a", "b")]
    assert finish(start(2, train, str(tmp_path), of_rank)) == [2, 2]
    error = (tmp_path / "rank-1.txt").read_text()
    assert "the number of training images is 12 on rank 0" in error
    assert "every machine needs the same files" in error
    assert not (tmp_path / "runs").exists()


def test_a_run_folder_that_a_node_does_not_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement.distributed, "of_all_ranks", lambda here: [here, False])
    monkeypatch.setattr(agreement.distributed, "world", lambda: 2)
    created = tmp_path / "r18-001"
    created.mkdir()
    with pytest.raises(LaunchError, match=r"r18-001 of rank 0 does not exist for rank 1: --runs must name"):
        agreement.check_folder(created)
    assert not created.exists()  # empty, and of nobody


def test_differences_are_named_once() -> None:
    same = ("node", {"a": 1, "b": 2})
    check_same([same, same], "remedy")
    with pytest.raises(LaunchError, match=r"a is 1 on rank 0 \(node\), not set on rank 2 \(other\); remedy"):
        check_same([same, same, ("other", {"b": 2})], "remedy")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("[/gloo/pair.cc:1] Connection closed by peer [10.0.0.2]:9", "Connection closed by peer, 10.0.0.2"),
        ("[/gloo/unbound_buffer.cc:7] Timed out waiting 9ms for recv", "Timed out waiting 9ms)"),
        ("mat1 and mat2 shapes cannot be multiplied", None),
        ("the loader failed: Connection refused", None),
    ],
)
def test_a_lost_process_is_told_from_other_errors(text: str, shown: str | None) -> None:
    message = of_lost_peer(RuntimeError(text))
    assert shown is None if message is None else f"does not answer ({shown}" in message


def test_every_generator_in_a_state_is_seeded() -> None:
    seed_generators(3, 1)
    one = get_random_state()
    seed_generators(3, 1)
    two = get_random_state()
    assert (one["numpy"], one["python"]) == (two["numpy"], two["python"])
    assert torch.equal(one["torch"], two["torch"])
    seed_generators(3, 0)
    other = get_random_state()
    assert all(other[name] != one[name] for name in ("numpy", "python"))


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """Two network namespaces, as two machines."""
    two_nodes = load_script("two_nodes")
    try:
        with two_nodes.Nodes() as made:
            yield made
    except two_nodes.Unavailable as error:
        pytest.skip(f"no network namespaces here: {error}")


def on_nodes(nodes: Any, words: list[str], **variables: str) -> list[Rank]:
    place = {"MASTER_ADDR": nodes.addresses[0], "GLOO_SOCKET_IFNAME": "eth0", "FASTKD_JOIN_TIMEOUT": "20"}
    return [(words, {**place, **variables, "NETNS": name}) for name in nodes.names]


def test_two_nodes_survive_the_kill_of_one(nodes: Any, tmp_path: Path) -> None:
    words = ["train.epochs=15", "train.checkpoint_every=1", "--resume"]
    assert together(tmp_path, *[([*words, "--runs", "whole"], {})] * 2)[0] == [0, 0]
    (whole,) = (tmp_path / "whole").iterdir()
    processes = start(2, train, str(tmp_path), on_nodes(nodes, [*STUDENT, *words]))
    run = tmp_path / "runs" / whole.name
    deadline = time.monotonic() + 60
    while not (run / "previous.pt").exists():
        assert time.monotonic() < deadline, "no checkpoint came"
        time.sleep(0.005)
    os.kill(processes[1].pid, signal.SIGKILL)
    assert finish(processes) == [2, -signal.SIGKILL]
    assert re.search(LOST, (tmp_path / "rank-0.txt").read_text())
    assert not (run / "summary.json").exists()
    assert together(tmp_path, *on_nodes(nodes, words))[0] == [0, 0]  # the requeued job
    tensors, different = load_script("kill_and_resume").compare_runs(whole, run)
    assert tensors > 10
    assert not different


def test_nodes_without_an_interface_to_meet(nodes: Any, tmp_path: Path) -> None:
    statuses, errors = together(tmp_path, *on_nodes(nodes, [], GLOO_SOCKET_IFNAME=""))
    assert statuses == [2, 2]
    assert all("exchange tensors through loopback" in text for text in errors)
    assert all("set GLOO_SOCKET_IFNAME" in text for text in errors)


def test_a_port_where_nobody_listens(nodes: Any, tmp_path: Path) -> None:
    first, second = on_nodes(nodes, [], FASTKD_JOIN_TIMEOUT="2")
    assert second is not None
    statuses, errors = together(tmp_path, first, (second[0], {**second[1], "MASTER_PORT": str(free_port())}))
    assert statuses == [2, 2]
    assert "only 1 of the 2 processes came to" in errors[0]
    assert re.search(
        r"cannot reach MASTER_ADDR:MASTER_PORT = 10\.77\.0\.1:\d+ within 2 s .*refused", errors[1]
    )
