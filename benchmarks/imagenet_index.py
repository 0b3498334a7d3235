"""Start, resume at 90 % of an epoch, memory and open files of the trainer with as many files as ImageNet has.

    python tools/make_imagefolder.py TREE --train 1 --scale 0.1 --totals 1281167 50000 [--shards 1024]
    python benchmarks/imagenet_index.py TREE --output FILE.jsonl      # or the folder of shards
    python benchmarks/imagenet_index.py --table FILE.jsonl …          # the table of docs/reports/imagenet.md

Runs ``fastkd train imagenet/r18`` with a small network on small images: two gloo ranks of eight data workers.
The first start finds every file, with an empty cache folder; the second one reads the kept index; both end at
their first batch. The third trains until the checkpoint at 90 % of the epoch and is killed; its workers read
every file, but return blank pixels, since decoding a million images takes two cores an hour. The fourth
resumes and finishes the epoch. Seconds are from the command to the first batch, importing torch included;
memory is what a process does not share (private pages), the median and the largest of all workers.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastkd.bench.results import Record, Writer, header, read

ROOT = Path(__file__).resolve().parents[1]

# The trainer's own command; a rank says when its data is there and which batches it has got.
RANK = """
import os, sys, time, torch
from fastkd.data import files
from fastkd.train.run import run
log = open(os.environ["SEEN"], "a", buffering=1)
load, indexed = run.load_data, files.FileLoader.indexed
def loaded(config):
    import torchvision.datasets  # counts as importing, not as finding files
    begin, cpu = time.time(), time.process_time()
    data = load(config)
    print("data", time.time() - begin, time.process_time() - cpu, file=log)
    return data
def seen(self, *arguments, **options):
    for number, batch in enumerate(indexed(self, *arguments, **options)):
        if self._order._seed is not None:  # training
            print("batch", time.time(), number, file=log)
        yield batch
def blank(self, key):
    position = int(self._chosen[key[1]])
    assert self._source.read(position)
    return torch.zeros(3, SIDE, SIDE, dtype=torch.uint8), int(self._source.labels[position]), key[1]
SIDE = int(os.environ["BLANK"])
if SIDE:
    files.Samples.__getitem__ = blank
run.load_data, files.FileLoader.indexed = loaded, seen
from fastkd.cli import main
sys.exit(main(sys.argv[1:]))
"""


class Ranks:
    """One ``fastkd train`` of several processes, started as torchrun would."""

    def __init__(self, folder: Path, words: list[str], ranks: int, cache: Path, blank: int = 0) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        together = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        folder.mkdir(exist_ok=True)
        self.logs = [folder / f"seen-{time.time_ns()}-{rank}" for rank in range(ranks)]
        self.begun = time.time()
        self.processes = []
        for rank, log in enumerate(self.logs):
            log.touch()
            of_rank = {"RANK": str(rank), "LOCAL_RANK": str(rank), "SEEN": str(log), "OMP_NUM_THREADS": "1"}
            environment = {**os.environ, **together, **of_rank, "FASTKD_CACHE": str(cache)}
            environment |= {"PYTHONPATH": str(ROOT), "BLANK": str(blank)}
            output = (folder / f"output-{rank}.txt").open("a")
            command = [sys.executable, "-c", RANK, "train", *words, "--runs", str(folder / "runs")]
            self.processes.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output))

    def lines(self, kind: str) -> list[list[list[float]]]:
        """The numbers that each rank has said of a kind so far."""
        every = [[line.split() for line in log.read_text().splitlines()] for log in self.logs]
        return [[[float(word) for word in rest] for k, *rest in of_rank if k == kind] for of_rank in every]

    def batches(self) -> int:
        """Of the slowest rank."""
        return min(len(lines) for lines in self.lines("batch"))

    def first_batch(self) -> float:
        """Seconds from the start to every rank's first batch."""
        while self.batches() == 0:
            self.check()
            time.sleep(0.05)
        return max(lines[0][0] for lines in self.lines("batch")) - self.begun

    def index(self) -> dict[str, Any]:
        """Seconds that finding the files took, one rank after the other, and each rank's CPU seconds."""
        of_ranks = [lines[0] for lines in self.lines("data")]
        return {
            "index_seconds": sum(wall for wall, _ in of_ranks),
            "index_cpu_seconds": [round(cpu, 2) for _, cpu in of_ranks],
        }

    def check(self) -> None:
        for process in self.processes:
            if process.poll() is not None:
                raise SystemExit(f"a rank ended with status {process.returncode}: see {self.logs[0].parent}")

    def kill(self) -> None:
        for process in self.processes:
            process.send_signal(signal.SIGKILL)
        self.wait()
        time.sleep(6)  # the data workers notice within 5 s

    def wait(self) -> list[int]:
        return [process.wait() for process in self.processes]

    def sizes(self) -> dict[str, Any]:
        """MB that a data worker does not share, and files that a process has open."""
        workers, files = [], []
        for process in self.processes:
            files.append(open_files(process.pid))
            for worker in children(process.pid):
                with contextlib.suppress(FileNotFoundError):  # a helper of torch's, gone by now
                    open_of_it, size = open_files(worker), private(worker)
                    workers.append(size / 1e6)
                    files.append(open_of_it)
        ranks = [private(process.pid) / 1e6 for process in self.processes]
        return {
            "workers": len(workers), "worker_mb": statistics.median(workers), "worker_mb_max": max(workers),
            "rank_mb": max(ranks), "open_files": max(files),
        }  # fmt: skip


def children(process: int) -> list[int]:
    return [
        int(child)
        for task in Path(f"/proc/{process}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]


def private(process: int) -> int:
    rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
    return sum(int(size) * 1024 for size in re.findall(r"Private_\w+: +(\d+) kB", rollup))


def open_files(process: int) -> int:
    return len(list(Path(f"/proc/{process}/fd").iterdir()))


def measure(args: argparse.Namespace) -> list[Record]:
    shards = bool(list(args.root.glob("*.tar")))
    work = Path(tempfile.mkdtemp(prefix="imagenet-index-"))
    words = [
        "imagenet/r18", f"data.root={args.root}", f"data.name={'webdataset' if shards else 'imagefolder'}",
        f"data.size={args.size}", f"data.workers={args.workers}", "student.name=small_cnn",
        "student.width=2", "train.epochs=1", "train.milestones=[1]", f"train.batch_size={args.batch}",
        "train.device=cpu", "train.threads=1", "train.log_every=50", "train.seed=0",
    ]  # fmt: skip
    records: list[Record] = []
    base = {"kind": "index", "data": "shards" if shards else "tree", "root": args.root.name}
    cache = work / "cache"
    for start in ("first", "second"):
        ranks = Ranks(work / start, words, args.ranks, cache)
        records.append({**base, "start": start, "seconds": ranks.first_batch(), **ranks.index()})
        ranks.kill()
        print(records[-1], flush=True)
    records[-1]["index_bytes"] = sum(path.stat().st_size for path in cache.glob("index-*"))
    steps = -(-args.images // args.batch)
    at = args.stop or steps * 9 // 10
    words.append(f"train.checkpoint_every={at}")
    ranks, seen = Ranks(work / "epoch", words, args.ranks, cache, args.size), 0
    ranks.first_batch()
    while ranks.batches() < at + 2:
        ranks.check()
        if ranks.batches() >= seen * at / 8 and seen <= 8:
            sizes = {"step": ranks.batches(), "steps": steps, **ranks.sizes()}
            records.append({**base, "kind": "index_memory", **sizes, "seconds": time.time() - ranks.begun})
            print(records[-1], flush=True)
            seen += 1
        time.sleep(0.5)
    ranks.kill()
    ranks = Ranks(work / "epoch", [*words, "--resume"], args.ranks, cache)
    resumed = {"start": "resumed", "seconds": ranks.first_batch(), "at": at / steps, **ranks.index()}
    records.append({**base, **resumed, "status": ranks.wait(), "batches": ranks.batches(), "steps": steps})
    print(records[-1], flush=True)
    shutil.rmtree(work)
    return records


def table(paths: list[Path]) -> None:
    """The Markdown table of result files, one column each."""
    rows: dict[str, list[str]] = {}
    for path in paths:
        about, records = read(path)
        cells = {"": f"{records[0]['data']}"}
        for record in records:
            if record["kind"] == "index":
                what = f"{record['start']} start" if record["start"] != "resumed" else "resumed at 90 %"
                cells[f"{what}: seconds to the first batch"] = f"{record['seconds']:.1f}"
                cpu = ", ".join(f"{seconds:.1f}" for seconds in record["index_cpu_seconds"])
                cells[f"{what}: of it finding the files, both ranks"] = f"{record['index_seconds']:.1f}"
                cells[f"{what}: CPU seconds of that, per rank"] = cpu
        sizes = [record for record in records if record["kind"] == "index_memory"]
        for when, record in (("at the start", sizes[0]), ("at the end", sizes[-1])):
            share = f"{when} ({record['step'] / record['steps']:.0%} of the epoch)".replace("%", " %")
            cells[f"MB that a data worker does not share, {when}: median, largest"] = (
                f"{record['worker_mb']:.0f}, {record['worker_mb_max']:.0f} ({share})"
            )
            cells[f"MB that a rank does not share, {when}"] = f"{record['rank_mb']:.0f}"
        cells["most files that a process had open"] = str(max(record["open_files"] for record in sizes))
        cells["MB of the kept index"] = f"{sum(r.get('index_bytes', 0) for r in records) / 1e6:.0f}"
        cells["load of the machine at the start"] = str(about["load"])
        for name, cell in cells.items():
            rows.setdefault(name, []).append(cell)
    head, *others = rows.items()
    print("|", " | ".join([head[0], *head[1]]), "|")
    print("|---" * (len(paths) + 1) + "|")
    for name, row in others:
        print("|", " | ".join([name, *row]), "|")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", type=Path, nargs="?", help="folder of tools/make_imagefolder.py")
    parser.add_argument("--output", type=Path, metavar="FILE.jsonl")
    parser.add_argument("--table", type=Path, nargs="+", metavar="FILE.jsonl")
    parser.add_argument("--images", type=int, default=1281167, help="training images in the folder")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--workers", type=int, default=8, help="data workers per rank")
    parser.add_argument("--batch", type=int, default=1024, help="over all ranks")
    parser.add_argument("--size", type=int, default=16, help="side of the images that the network gets")
    parser.add_argument("--stop", type=int, metavar="STEP", help="instead of at 90 %% of the epoch")
    args = parser.parse_args()
    if args.table:
        table(args.table)
        return
    if args.root is None or args.output is None:
        parser.error("a folder and --output, or --table, are needed")
    settings = {k: v for k, v in vars(args).items() if k not in ("root", "output", "table")}
    with Writer(args.output) as output:
        output.write([header("cpu", {}, command=" ".join(sys.argv[:1]), settings=settings)])
        output.write(measure(args))


if __name__ == "__main__":
    main()
