"""Start, resume at 90 % of an epoch, memory and open files of the input with as many files as ImageNet has.

    python tools/make_imagefolder.py TREE --train 1 --scale 0.1 --totals 1281167 50000 [--shards 1024]
    python benchmarks/imagenet_index.py TREE --output FILE.jsonl      # or the folder of shards
    python benchmarks/imagenet_index.py --table FILE.jsonl …          # the table of docs/reports/imagenet.md

Two processes load the data and go through its training batches as the two ranks of `fastkd train` do, without
a network, with eight data workers each. The first start finds every file, with an empty cache folder; the
second one reads the kept index; both end at the first batch of 512 images per rank. The third goes on to 90 %
of the epoch and is killed; its workers read every file, but return blank pixels, since decoding a million
images takes two cores an hour. The fourth starts there. Seconds are from the start of the processes to the
first batch of both, with torch's import; memory is what a process does not share (private pages).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastkd.bench.report import table
from fastkd.bench.results import Record, Writer, header, read

ROOT = Path(__file__).resolve().parents[1]

# One rank; it says when its data is there and which batches it has got.
RANK = """
import json, os, sys, time, torch
import torchvision.transforms.v2  # counts as importing, not as finding files
from fastkd.data import files
from fastkd.data.data import load_data
from fastkd.recipe.sections import DATA_SECTIONS
log = open(os.environ["SEEN"], "a", buffering=1)
config, rank, world, batch, start, blank = json.loads(sys.argv[1])
begin, cpu = time.time(), time.process_time()
data = load_data(DATA_SECTIONS[config["name"]].model_validate(config))
print("data", time.time() - begin, time.process_time() - cpu, file=log)
def without_pixels(self, key):
    position = int(self._chosen[key[1]])
    assert self._source.read(position)
    return torch.zeros(3, 8, 8, dtype=torch.uint8), int(self._source.labels[position]), key[1]
if blank:
    files.Samples.__getitem__ = without_pixels
loader = data.train_loader(batch, 0, torch.device("cpu"))
for number, _ in enumerate(loader.batches(start, rank, world, True)):
    print("batch", time.time(), start + number + 1, file=log)
"""


class Ranks:
    """The ranks of one start."""

    def __init__(
        self, folder: Path, args: argparse.Namespace, *, start: int = 0, blank: bool = False
    ) -> None:
        shards = bool(list(args.root.glob("*.tar")))
        name = "webdataset" if shards else "imagefolder"
        config = {"name": name, "root": str(args.root), "workers": args.workers, "size": args.size}
        self.logs = [folder / f"{time.time_ns()}-{rank}" for rank in range(args.ranks)]
        self.begun = time.time()
        self.processes = []
        for rank, log in enumerate(self.logs):
            log.touch()
            environment = {**os.environ, "SEEN": str(log), "FASTKD_CACHE": str(folder / "cache")}
            environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            what = json.dumps([config, rank, args.ranks, args.batch, start, blank])
            self.processes.append(subprocess.Popen([sys.executable, "-c", RANK, what], env=environment))

    def lines(self, kind: str) -> list[list[list[float]]]:
        """The numbers that each rank has said of a kind so far."""
        every = [[line.split() for line in log.read_text().splitlines()] for log in self.logs]
        return [[[float(word) for word in rest] for k, *rest in of_rank if k == kind] for of_rank in every]

    def batches(self) -> int:
        """Of the slowest rank."""
        return min(int(lines[-1][1]) if lines else 0 for lines in self.lines("batch"))

    def first_batch(self) -> float:
        """Seconds from the start to every rank's first batch."""
        while not all(self.lines("batch")):
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
                raise SystemExit(f"a rank ended with status {process.returncode}")

    def kill(self) -> None:
        for process in self.processes:
            process.send_signal(signal.SIGKILL)
            process.wait()
        time.sleep(6)  # the data workers notice within 5 s

    def sizes(self) -> dict[str, Any]:
        """MB that a data worker does not share, and files that a process has open."""
        workers, files = [], []
        for process in self.processes:
            files.append(open_files(process.pid))
            for worker in children(process.pid):
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
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


def measure(args: argparse.Namespace) -> Iterator[Record]:
    work = Path(tempfile.mkdtemp(prefix="imagenet-index-"))
    base = {"kind": "index", "data": "shards" if list(args.root.glob("*.tar")) else "tree"}
    for start in ("first", "second"):
        ranks = Ranks(work, args)
        record = {**base, "start": start, "seconds": ranks.first_batch(), **ranks.index()}
        ranks.kill()
        yield {**record, "index_bytes": sum(path.stat().st_size for path in work.glob("cache/index-*"))}
    steps = -(-args.images // args.batch)
    end = steps * 9 // 10
    ranks = Ranks(work, args, blank=True)
    ranks.first_batch()
    for turn in range(9):
        while ranks.batches() < end * turn / 8:
            ranks.check()
            time.sleep(0.2)
        sizes = {"step": ranks.batches(), "steps": steps, **ranks.sizes()}
        yield {**base, "kind": "index_memory", **sizes, "seconds": time.time() - ranks.begun}
    ranks.kill()
    ranks = Ranks(work, args, start=end)
    yield {**base, "start": "resumed", "seconds": ranks.first_batch(), "at": end / steps, **ranks.index()}
    ranks.kill()
    shutil.rmtree(work)


def print_table(paths: list[Path]) -> None:
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
            share = f"{record['step'] / record['steps']:.0%} of the epoch".replace("%", " %")
            cells[f"MB that a data worker does not share, {when}: median, largest"] = (
                f"{record['worker_mb']:.0f}, {record['worker_mb_max']:.0f} ({share})"
            )
            cells[f"MB that a rank does not share, {when}"] = f"{record['rank_mb']:.0f}"
        cells["most files that a process had open"] = str(max(record["open_files"] for record in sizes))
        cells["MB of the kept index"] = f"{sum(r.get('index_bytes', 0) for r in records) / 1e6:.0f}"
        cells["load of the machine at the start"] = str(about["load"])
        for name, cell in cells.items():
            rows.setdefault(name, []).append(cell)
    head, *others = ([name, *row] for name, row in rows.items())
    print(table(head, others))


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
    parser.add_argument("--size", type=int, default=224, help="side of the images")
    args = parser.parse_args()
    if args.table:
        print_table(args.table)
        return
    if args.root is None or args.output is None:
        parser.error("a folder and --output, or --table, are needed")
    settings = {k: v for k, v in vars(args).items() if k not in ("root", "output", "table")}
    with Writer(args.output) as output:
        output.write([header("cpu", {}, command=" ".join(sys.argv[:1]), settings=settings)])
        for record in measure(args):
            output.write([record])
            print(record, flush=True)


if __name__ == "__main__":
    main()
