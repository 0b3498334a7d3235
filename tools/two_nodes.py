"""Two machines on one: network namespaces with an address each, and a gloo rank by torchrun in each.

    python tools/two_nodes.py WORK                     # every case, some minutes; needs root and `ip`
    python tools/two_nodes.py WORK --only trains
    python tools/two_nodes.py WORK --report docs/reports/imagenet.md

Shows that a training over two nodes gives the bits of two ranks on one machine, that it survives the SIGKILL
of a node, and what is said, after how long, when the nodes do not meet or were started differently. The
namespaces and everything in them end with the script.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from kill_and_resume import NETWORKS, ROOT, compare_runs, make_teacher
from make_imagefolder import make_tree

from fastkd.bench.report import table
from fastkd.bench.sections import measured_on, write_section

PORT = 29500
JOIN = 8  # seconds of FASTKD_JOIN_TIMEOUT


class Unavailable(Exception):
    """This machine or this user cannot create network namespaces."""


class Nodes:
    """Two namespaces joined by a cable: 10.77.0.1 on interface `eth0`, 10.77.0.2 on interface `eth0`."""

    def __init__(self) -> None:
        self.names = [f"fastkd-{os.getpid()}-{node}" for node in range(2)]
        self.addresses = ["10.77.0.1", "10.77.0.2"]

    def __enter__(self) -> Nodes:
        if shutil.which("ip") is None:
            raise Unavailable("the command `ip` (iproute2) is not installed")
        try:
            for name in self.names:
                _ip("netns", "add", name)
            one, two = self.names
            _ip("link", "add", "eth0", "netns", one, "type", "veth", "peer", "name", "eth0", "netns", two)
            for name, address in zip(self.names, self.addresses, strict=True):
                _ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
                for interface in ("lo", "eth0"):
                    _ip("-n", name, "link", "set", interface, "up")
        except Unavailable:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in self.names:
            for process in self.processes(name):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            with contextlib.suppress(Unavailable):
                _ip("netns", "del", name)  # with its interface

    def processes(self, name: str) -> list[int]:
        with contextlib.suppress(Unavailable):
            return [int(process) for process in _ip("netns", "pids", name).split()]
        return []

    def cut(self) -> None:
        _ip("-n", self.names[1], "link", "set", "eth0", "down")

    def mend(self) -> None:
        _ip("-n", self.names[1], "link", "set", "eth0", "up")


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(f"`ip {' '.join(words)}`: {done.stderr.strip()}")
    return done.stdout


@dataclass
class Started:
    """The command on one node."""

    process: subprocess.Popen[bytes]
    log: Path
    begin: float = field(default_factory=time.monotonic)
    seconds: float = 0.0

    def wait(self) -> int:
        status = self.process.wait(timeout=900)
        self.seconds = time.monotonic() - self.begin
        return status

    def error(self) -> str:
        """What fastkd said when it failed, or the last line of another program."""
        text = self.log.read_text()
        found = re.findall(r"^fastkd: error.*", text, re.MULTILINE) or re.findall(
            r"^(?:\w+\.)+\w*Error.*", text, re.MULTILINE
        )
        return found[-1] if found else (text.strip().splitlines() or ["nothing"])[-1]


class Work:
    """The folder of the cases, with images, a teacher and the commands."""

    def __init__(self, folder: Path, nodes: Nodes) -> None:
        self.folder, self.nodes = folder, nodes
        if not (folder / "images").exists():
            make_tree(folder / "images", 4, 40, 4, scale=0.3)
        make_teacher(folder / "teacher.pt", classes=4)
        self.words = [
            "imagenet/r18-kd", "method=dhkd", *NETWORKS, "data.root=images", "data.size=32", "data.workers=1",
            "train.batch_size=16", "train.epochs=4", "train.checkpoint_every=1",
            "teacher.checkpoint=teacher.pt",
        ]  # fmt: skip

    def start(
        self, node: int, words: list[str], *, torchrun: list[str] | None = None, folder: Path | None = None,
        python: str = "from fastkd.cli import main", names_known: bool = True, **variables: str,
    ) -> Started:  # fmt: skip
        """Start ``fastkd train`` on a node: by torchrun with these options, or with variables as by SLURM.

        ``names_known``: both machines resolve each other's names; otherwise a node's own name is 127.0.1.1,
        as Debian installs it, and it does not know the other.
        """
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        environment |= {"GLOO_SOCKET_IFNAME": "eth0", "FASTKD_JOIN_TIMEOUT": str(JOIN)} | variables
        script = self.folder / f"rank{node}.py"
        script.write_text("import sys\n" + python + "\nsys.exit(main(sys.argv[1:]))\n")
        command = [sys.executable]
        if torchrun is not None:
            command += ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", *torchrun]
        else:
            environment |= {"RANK": str(node), "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
            environment.setdefault("MASTER_ADDR", self.nodes.addresses[0])
            environment.setdefault("MASTER_PORT", str(PORT))
        names = ["127.0.0.1 localhost"]
        names += [f"{a} node{n}" for n, a in enumerate(self.nodes.addresses) if names_known]
        names += [] if names_known else [f"127.0.1.1 node{node}"]
        hosts = self.folder / f"hosts{node}"
        hosts.write_text("\n".join(names) + "\n")
        inside = f'hostname node{node} && mount --bind {hosts} /etc/hosts && exec "$@"'
        place = ["ip", "netns", "exec", self.nodes.names[node], "unshare", "--uts", "sh", "-c", inside, "sh"]
        log = self.folder / f"node{node}.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                [*place, *command, str(script), "train", *words],
                cwd=folder or self.folder, env=environment, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip
        return Started(process, log)

    def by_torchrun(self, node: int, words: list[str], **variables: str) -> Started:
        options = [
            "--rdzv-backend=c10d", f"--rdzv-endpoint={self.nodes.addresses[0]}:{PORT}", "--rdzv-id=r18",
            f"--local-addr={self.nodes.addresses[node]}",
        ]  # fmt: skip
        return self.start(node, words, torchrun=options, **variables)

    def run_folder(self, runs: str) -> Path:
        (folder,) = (self.folder / runs).glob("imagenet-*")
        return folder

    def reference(self) -> Path:
        """The run folder of two ranks on one machine."""
        if not (self.folder / "whole").exists():
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
            command += ["-m", "fastkd", "train", *self.words, "--runs", "whole"]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            quiet = subprocess.DEVNULL
            subprocess.run(command, cwd=self.folder, env=environment, stdout=quiet, stderr=quiet, check=True)
        return self.run_folder("whole")


Case = Callable[[Work], str]


def trains(work: Work) -> str:
    both = [work.by_torchrun(node, [*work.words, "--runs", "two"]) for node in range(2)]
    statuses = [one.wait() for one in both]
    if statuses != [0, 0]:
        return f"**status {statuses}**: {both[0].error()}"
    return _compared(work, "two")


def _compared(work: Work, runs: str) -> str:
    tensors, found = compare_runs(work.reference(), work.run_folder(runs))
    return (
        f"**differs in {len(found)} entries**"
        if found
        else f"the same bits in {tensors} tensors, and metrics"
    )


def survives_a_kill(work: Work) -> str:
    words = [*work.words, "--runs", "killed", "--resume"]
    both = [work.by_torchrun(node, words) for node in range(2)]
    after = random.SystemRandom().randint(3, 20)
    saved = set()
    while len(saved) < after:  # a checkpoint per step
        with contextlib.suppress(OSError, ValueError):
            saved.add(os.stat(work.run_folder("killed") / "last.pt").st_ino)
        if both[0].process.poll() is not None:
            return f"**ended before its kill**: {both[0].error()}"
        time.sleep(0.001)
    victims = work.nodes.processes(work.nodes.names[1])
    begin = time.monotonic()
    for process in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    both[1].process.wait()
    status = both[0].wait()
    seconds = time.monotonic() - begin
    said = both[0].error()
    again = [work.by_torchrun(node, words) for node in range(2)]
    if [one.wait() for one in again] != [0, 0]:
        return f"**not resumed**: {again[0].error()}"
    return (
        f"killed after {after} steps or just later; node 0 ended {seconds:.0f} s later with torchrun's "
        f"status {status}: “{_short(said)}”. The same line again: resumed, {_compared(work, 'killed')}"
    )


def network_is_cut(work: Work) -> str:
    words = [*work.words, "train.epochs=100", "--runs", "cut"]
    both = [work.start(node, words, FASTKD_PEER_TIMEOUT="30") for node in range(2)]
    while not any((work.folder / "cut").glob("*/last.pt")):
        if both[0].process.poll() is not None:
            return f"**ended before the cut**: {both[0].error()}"
        time.sleep(0.01)
    begin = time.monotonic()
    work.nodes.cut()
    try:
        statuses = [one.wait() for one in both]
    finally:
        work.nodes.mend()
    return f"{time.monotonic() - begin:.0f} s, status {statuses}: “{_short(both[0].error())}”"


def _both(work: Work, first: dict[str, object], second: dict[str, object] | None) -> str:
    """Start both nodes (the second may stay away) with what differs; what each said, and when."""
    both = []
    for node, given in enumerate((first, second)):
        if given is None:
            continue
        given = dict(given)
        words = [*work.words, *given.pop("more", []), "--runs", "differs"]  # type: ignore[misc]
        both.append(work.start(node, words, **given))  # type: ignore[arg-type]
    statuses = [one.wait() for one in both]
    texts = dict.fromkeys(f"“{_short(one.error())}”" for one in both)
    return f"{max(one.seconds for one in both):.0f} s, status {statuses}: {', '.join(texts)}"


def _short(text: str) -> str:
    return re.sub(r"^fastkd: error \(rank \d\): ", "", text)


def nobody_else(work: Work) -> str:
    return _both(work, {}, None)


def wrong_port(work: Work) -> str:
    return _both(work, {}, {"MASTER_PORT": str(PORT + 1)})


def wrong_address(work: Work) -> str:
    return _both(work, {}, {"MASTER_ADDR": "10.77.0.9"})


def unknown_name(work: Work) -> str:
    return _both(work, {}, {"MASTER_ADDR": "node0", "names_known": False})


def no_interface(work: Work) -> str:
    return _both(work, {}, {"GLOO_SOCKET_IFNAME": "ib0"})


def loopback(work: Work) -> str:
    unset = {"GLOO_SOCKET_IFNAME": "", "names_known": False}
    return _both(work, unset, unset)


def other_recipe(work: Work) -> str:
    return _both(work, {}, {"more": ["train.lr=0.02"]})


def other_version(work: Work) -> str:
    older = "import fastkd.train.joining as j\nj.__version__ = '0.0.9'\nfrom fastkd.cli import main"
    return _both(work, {}, {"python": older})


def other_data(work: Work) -> str:
    other = work.folder / "other"
    if not other.exists():
        shutil.copytree(work.folder / "images", other)
        next((other / "train").glob("*/*")).unlink()
    return _both(work, {}, {"more": ["data.root=other"]})


def folder_not_shared(work: Work) -> str:
    away = work.folder / "away"
    away.mkdir(exist_ok=True)
    for name in ("images", "teacher.pt"):
        with contextlib.suppress(FileExistsError):
            (away / name).symlink_to(work.folder / name)
    return _both(work, {}, {"folder": away})


def unknown_key(work: Work) -> str:
    return _both(work, {}, {"more": ["train.lx=0.1"]})


def torchruns_port(work: Work) -> str:
    options = ["--rdzv-backend=c10d", "--rdzv-id=r18", f"--rdzv-conf=join_timeout={JOIN},timeout={JOIN}"]
    ports = PORT, PORT + 1
    both = [
        work.start(
            node, work.words, torchrun=[*options, f"--rdzv-endpoint={work.nodes.addresses[0]}:{ports[node]}"]
        )
        for node in range(2)
    ]
    statuses = [one.wait() for one in both]
    return (
        f"{max(one.seconds for one in both):.0f} s, status {statuses}: torchrun's own errors; node 0 "
        f"“{both[0].error()}”, node 1 “{both[1].error()}”"
    )


def torchruns_address(work: Work) -> str:
    # torchrun tells the ranks the first node's host name.
    options = ["--rdzv-backend=c10d", "--rdzv-id=r18", f"--rdzv-endpoint={work.nodes.addresses[0]}:{PORT}"]
    both = [work.start(node, work.words, torchrun=options, names_known=False) for node in range(2)]
    statuses = [one.wait() for one in both]
    texts = dict.fromkeys(f"“{_short(one.error())}”" for one in both)
    return f"{max(one.seconds for one in both):.0f} s, status {statuses}: {', '.join(texts)}"


CASES: dict[str, tuple[str, Case]] = {
    "trains": ("two nodes, torchrun on each, compared with two ranks on one machine", trains),
    "kill": ("SIGKILL to all processes of node 1 at a random step", survives_a_kill),
    "cut": ("the cable between the nodes is cut, `FASTKD_PEER_TIMEOUT=30`", network_is_cut),
    "alone": ("node 1 is not started", nobody_else),
    "port": ("another `MASTER_PORT` on node 1", wrong_port),
    "address": ("a `MASTER_ADDR` that no machine has, on node 1", wrong_address),
    "name": ("a `MASTER_ADDR` that node 1 cannot resolve", unknown_name),
    "torchrun-port": ("torchrun with another port in `--rdzv-endpoint` on node 1", torchruns_port),
    "torchrun-address": (
        "torchrun without `--local-addr`; the nodes do not know each other's names",
        torchruns_address,
    ),
    "interface": ("`GLOO_SOCKET_IFNAME=ib0` on node 1, which has no such interface", no_interface),
    "loopback": ("no `GLOO_SOCKET_IFNAME`; a node's own name is 127.0.1.1", loopback),
    "recipe": ("`train.lr=0.02` on node 1 only", other_recipe),
    "key": ("an unknown key on node 1 only", unknown_key),
    "version": ("another version of fastkd on node 1", other_version),
    "data": ("an image less on node 1", other_data),
    "folder": ("a run folder that node 1 does not see", folder_not_shared),
}


def happened(work: Work, names: list[str]) -> Iterator[tuple[str, str]]:
    for name in names:
        fault, case = CASES[name]
        for runs in ("two", "killed", "cut", "differs"):
            shutil.rmtree(work.folder / runs, ignore_errors=True)
        text = case(work)
        print(f"{fault}: {text}", flush=True)
        with (work.folder / "happened.jsonl").open("a") as file:
            file.write(json.dumps({"case": name, "text": text, "measured_on": measured_on()}) + "\n")
        yield fault, text


def report(path: Path, lines: list[dict[str, str]]) -> None:
    """A section from the newest line of each case."""
    newest = {line["case"]: line for line in lines}
    rows = [[fault, newest[name]["text"]] for name, (fault, _) in CASES.items() if name in newest]
    body = f"""
Two network namespaces, each with an address of its own on a virtual cable and one gloo rank; `small_cnn`,
DHKD, 160 JPEG images. `FASTKD_JOIN_TIMEOUT={JOIN}`; seconds are from the start of the command, with some 10 s
for imports on this busy machine. Unless torchrun is named, the ranks are started as by SLURM, with torchrun's
variables set. This section is written by `python tools/two_nodes.py WORK --report docs/reports/imagenet.md`.

{table(["what is done", "what happens"], rows)}

{lines[-1]["measured_on"]}
"""
    write_section(path, "ImageNet at scale", "Several machines", body)


def main() -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("work", type=Path, help="folder for images, runs and logs")
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--report", type=Path, metavar="FILE.md", help="write what happened into it")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    try:
        with Nodes() as nodes:
            rows = list(happened(Work(args.work.resolve(), nodes), args.only))
    except Unavailable as error:
        print(f"no network namespaces here: {error}", file=sys.stderr)
        return 2
    if args.report:
        lines = (args.work / "happened.jsonl").read_text().splitlines()
        report(args.report, [json.loads(line) for line in lines])
    return int(any("**" in text for _, text in rows))


if __name__ == "__main__":
    sys.exit(main())
