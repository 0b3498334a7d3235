"""Kill trainings on JPEG files with SIGKILL at random steps, resume them, and compare every bit.

    python tools/make_imagefolder.py TREE --classes 100 --train 190 --val 10      # 20,000 images, 2 GB
    python tools/kill_and_resume.py WORK --tree TREE                   # every method: hours on two cores
    python tools/kill_and_resume.py WORK --tree TREE --methods kd --images 2000 --epochs 2
    python tools/kill_and_resume.py WORK --report docs/reports/imagenet.md

Each method trains twice from the same command, by torchrun with two gloo ranks: once undisturbed, and once
with the three KILLS, at random steps of the whole training, resumed each time with ``--resume``. Then the
last states (weights, heads, optimizer, schedule, random generators, history), the best weights and
metrics.jsonl must be equal bit for bit, but for seconds. WORK keeps the run folders and ``results.jsonl``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastkd.bench.report import table
from fastkd.bench.sections import measured_on, write_section
from fastkd.models import build_model
from fastkd.train.run.checkpoint import load_checkpoint

ROOT = Path(__file__).resolve().parents[1]
RANKS = 2
# With options that use every part of a method.
METHODS = {
    "kd": [],
    "dkd": ["method=dkd", "method.warmup_epochs=1"],
    "dckd": ["method=dckd", "method.hint_layer=stages.2", "method.hint_weight=1.0"],
    "dhkd": ["method=dhkd", "method.head=nonlinear", "method.align=all"],
    "mhkd": ["method=mhkd", "method.layers=[stages.1, stages.2]", "method.head_width=8"],
}
NETWORKS = [
    "student.name=small_cnn", "student.width=2", "teacher.name=small_cnn", "teacher.width=4",
    "train.device=cpu", "train.threads=1", "train.lr=0.01", "train.milestones=[1]",
]  # fmt: skip


def differences(one: Any, two: Any, where: str = "") -> Iterator[str]:
    """The entries in which two states differ in any bit."""
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        same = one.shape == two.shape and one.dtype == two.dtype
        if not same or one.numpy(force=True).tobytes() != two.numpy(force=True).tobytes():
            yield where
    elif isinstance(one, dict) and isinstance(two, dict):
        for key in dict.fromkeys((*one, *two)):
            if key != "seconds":
                yield from differences(one.get(key), two.get(key), f"{where}/{key}")
    elif isinstance(one, list | tuple) and isinstance(two, list | tuple) and len(one) == len(two) < 100:
        for number, pair in enumerate(zip(one, two, strict=True)):
            yield from differences(*pair, f"{where}/{number}")
    elif type(one) is not type(two) or one != two:
        yield where


def compare_runs(one: Path, two: Path) -> tuple[int, list[str]]:
    """The number of tensors compared, and what differs between two run folders."""
    states = [load_checkpoint(folder / "last.pt", remedy="") for folder in (one, two)]
    best = [load_checkpoint(folder / "best.pt", remedy="") for folder in (one, two)]
    lines = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (one, two)]
    metrics = [[json.loads(line) for line in of_run] for of_run in lines]
    found = [*differences(*states, "last"), *differences(*best, "best"), *differences(*metrics, "metrics")]
    return sum(1 for _ in _tensors(states[0])), found


def _tensors(state: Any) -> Iterator[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict | list | tuple):
        for entry in state.values() if isinstance(state, dict) else state:
            yield from _tensors(entry)


def make_teacher(path: Path, classes: int) -> None:
    """The weights of an untrained teacher."""
    torch.manual_seed(0)
    torch.save(build_model("small_cnn", num_classes=classes, width=4).state_dict(), path)


class Training:
    """One start of the command under torchrun, in a session of its own."""

    def __init__(self, folder: Path, words: list[str], log: Path, brake_at: int | None = None) -> None:
        self.beacon = folder / "beacon"
        for path in folder.glob("beacon*"):
            path.unlink()
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}",
            str(Path(__file__).resolve()), "--as-worker", str(self.beacon), *words,
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        if brake_at is not None:
            environment["BRAKE_AT"] = str(brake_at)
        with log.open("a") as output:
            self.launcher = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=output, stderr=output, start_new_session=True
            )

    def step(self) -> int:
        """Steps of the whole training that the first rank has done; 0 before its first one."""
        try:
            return int(self.beacon.read_text() or 0)
        except FileNotFoundError:
            return 0

    def ranks(self) -> list[int]:
        return [int(path.read_text()) for path in sorted(self.beacon.parent.glob("beacon-rank-*"))]

    def until(self, reached: Callable[[], bool]) -> None:
        while not reached():
            if self.launcher.poll() is not None:
                raise SystemExit(f"the training ended with status {self.launcher.returncode} before its kill")
            time.sleep(0.0005)

    def end(self) -> int:
        return self.launcher.wait()


def _alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _kill(processes: list[int]) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    while any(map(_alive, processes)):
        time.sleep(0.01)


def kill_a_rank(training: Training, run: Path, at: int, again: Callable[[], str]) -> str:
    training.until(lambda: training.step() >= at)
    victim = at % RANKS
    os.kill(training.ranks()[victim], signal.SIGKILL)
    return f"rank {victim}; torchrun ended the other, status {training.end()}"


def kill_launcher(training: Training, run: Path, at: int, again: Callable[[], str]) -> str:
    training.until(lambda: training.step() >= at)
    ranks = training.ranks()
    training.launcher.kill()
    training.end()
    time.sleep(1)
    left = [process for process in ranks if _alive(process)]
    text = f"torchrun; {len(left)} ranks went on"
    if left:
        text += f", a second start {again()}"
        _kill(left)
    return text


def kill_in_a_write(training: Training, run: Path, at: int, again: Callable[[], str]) -> str:
    def writing() -> bool:
        return training.step() >= at and any(name.startswith(".last.") for name in os.listdir(run))

    training.until(writing)
    os.kill(training.ranks()[0], signal.SIGKILL)
    left = [name for name in os.listdir(run) if name.startswith(".last.")]
    os.killpg(training.launcher.pid, signal.SIGKILL)
    _kill(training.ranks())
    training.end()
    return "everything, " + ("in the write of last.pt, half of it left" if left else "just after a write")


KILLS = (kill_a_rank, kill_launcher, kill_in_a_write)


def study(method: str, tree: Path, work: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Both trainings of a method; raises ``SystemExit`` if they differ."""
    images = len(list((tree / "train").glob("*/*")))
    of_epoch = -(-images // args.batch)
    steps = args.epochs * of_epoch
    seed = random.SystemRandom().randrange(2**32) if args.seed is None else args.seed
    choice = random.Random(f"{seed} {method}")
    targets = sorted(choice.sample(range(1, steps), len(KILLS)))
    kills = choice.sample(KILLS, len(KILLS))
    folder = work / f"{method}-{time.strftime('%H%M%S')}"
    folder.mkdir(parents=True)
    classes = len(list((tree / "train").iterdir()))
    make_teacher(folder / "teacher.pt", classes)
    words = [
        "imagenet/r18-kd", *METHODS[method], *NETWORKS, "data.workers=1",
        f"data.root={tree.resolve()}", f"data.size={args.size}",
        f"train.batch_size={args.batch}", f"train.epochs={args.epochs}",
        f"train.checkpoint_every={args.checkpoint_every}", "teacher.checkpoint=teacher.pt",
    ]  # fmt: skip
    print(f"{method}: {images:,} images, {steps} steps, seed {seed}, kills after steps {targets}", flush=True)
    begin = time.perf_counter()
    if Training(folder, [*words, "--runs", "whole"], folder / "whole.log").end():
        raise SystemExit(f"{method}: the undisturbed training failed, see {folder / 'whole.log'}")
    whole_seconds = time.perf_counter() - begin
    log = folder / "killed.log"
    (run,) = (folder / "killed" / path.name for path in (folder / "whole").glob("*-001"))
    resumed = [*words, "--runs", "killed", "--resume"]

    def again() -> str:
        """What a second start says while the killed launcher's ranks still run."""
        second = folder / "second.log"
        Training(folder, resumed, second).end()
        said = "is in use by process" in second.read_text()
        return "was refused: the run folder is in use" if said else "resumed after they had ended"

    told, begin = [], time.perf_counter()
    for at, kill in zip(targets, kills, strict=True):
        training = Training(folder, resumed, log, brake_at=at)
        pid = training.launcher.pid
        try:
            what = kill(training, run, at, again)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        told.append({"step": at, "what": what})
        print(f"  step {at}: killed {what}", flush=True)
    if Training(folder, resumed, log).end():
        raise SystemExit(f"{method}: the resumed training failed, see {log}")
    tensors, found = compare_runs(folder / "whole" / run.name, run)
    from_where = [line for line in log.read_text().splitlines() if "resuming after" in line]
    return {
        "method": method, "images": images, "classes": classes, "size": args.size, "epochs": args.epochs,
        "steps": steps, "checkpoint_every": args.checkpoint_every, "seed": seed, "kills": told,
        "resumed": from_where, "tensors": tensors, "differ": found, "whole_seconds": whole_seconds,
        "killed_seconds": time.perf_counter() - begin, "measured_on": measured_on(),
        "command": " ".join(["python", "tools/kill_and_resume.py", *sys.argv[1:]]),
    }  # fmt: skip


def first_images(tree: Path, folder: Path, count: int) -> Path:
    """A tree of hard links to the first ``count`` images, as many of each class and part."""
    share = count / sum(1 for _ in tree.glob("*/*/*"))
    if share >= 1:
        return tree
    for directory in sorted(tree.glob("*/*")):
        files = sorted(directory.iterdir())
        target = folder / directory.relative_to(tree)
        target.mkdir(parents=True, exist_ok=True)
        for file in files[: max(1, round(share * len(files)))]:
            with contextlib.suppress(FileExistsError):
                os.link(file, target / file.name)
    return folder


def report(path: Path, lines: list[dict[str, Any]]) -> None:
    newest = {(line["method"], line["images"]): line for line in lines}.values()
    rows = []
    for line in newest:
        kills = "; ".join(f"{kill['step']}: {kill['what']}" for kill in line["kills"])
        equal = f"**{len(line['differ'])} differ**" if line["differ"] else "equal"
        counts = f"{line['epochs']} x {line['steps'] // line['epochs']}"
        seconds = [f"{line[key]:.0f} s" for key in ("whole_seconds", "killed_seconds")]
        compared = f"{line['tensors']} tensors and the rest: {equal}"
        row = [line["method"], f"{line['images']:,}", counts, kills, compared, *seconds, str(line["seed"])]
        rows.append(row)
    columns = [
        "method", "training images", "epochs x steps", "SIGKILL after step", "compared", "undisturbed",
        "killed and resumed", "seed",
    ]  # fmt: skip
    last = lines[-1]
    body = f"""
JPEG files of ImageNet's sizes, decoded and cropped to {last["size"]} px by one worker per rank; two gloo
ranks by torchrun; a checkpoint every {last["checkpoint_every"]} steps. The networks are narrow (`small_cnn`,
2 and 4 wide) and the teacher is untrained: what matters is what is stored, not what is learned. Order and
steps of the kills are random, drawn from the seed. Compared bit for bit: weights, heads, optimizer, schedule,
random generators and history of the last state, the best weights, `metrics.jsonl`; seconds are left out.

{table(columns, rows)}

Commands: {"; ".join(f"`{command}`" for command in dict.fromkeys(line["command"] for line in newest))}.
{last["measured_on"]}; the cores were shared with other work, so that the seconds are upper bounds.
"""
    write_section(path, "ImageNet at scale", "Killed and resumed", body)


def as_worker(beacon: str, words: list[str]) -> int:
    """A rank: `fastkd train`, which tells its process id and its steps."""
    from fastkd.cli import main as fastkd
    from fastkd.train.display.console import ConsoleProgress

    Path(f"{beacon}-rank-{os.environ['RANK']}").write_text(str(os.getpid()))
    done, started = ConsoleProgress.batch_done, ConsoleProgress.epoch_started
    before = 0

    def epoch_started(self: ConsoleProgress, epoch: int, epochs: int, batches: int | None) -> None:
        nonlocal before
        before = (epoch - 1) * (batches or 0)
        started(self, epoch, epochs, batches)

    brake, flush = int(os.environ.get("BRAKE_AT", sys.maxsize)), os.fsync

    def batch_done(self: ConsoleProgress, meter: Any) -> None:
        Path(beacon).write_text(str(before + meter.steps))
        slow_down()
        done(self, meter)

    def slow_down() -> None:
        """From the step of the kill on, so that a killer on a busy machine does not come too late."""
        if Path(beacon).exists() and int(Path(beacon).read_text()) >= brake:
            time.sleep(0.5)

    def fsync(descriptor: int) -> None:
        slow_down()
        flush(descriptor)

    if os.environ["RANK"] == "0":
        os.fsync = fsync
    ConsoleProgress.epoch_started, ConsoleProgress.batch_done = epoch_started, batch_done  # type: ignore[method-assign]
    return fastkd(["train", *words])


def main() -> int:
    if sys.argv[1:2] == ["--as-worker"]:
        return as_worker(sys.argv[2], sys.argv[3:])
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("work", type=Path, help="folder for runs and results")
    parser.add_argument("--tree", type=Path, help="folder with train/CLASS and val/CLASS")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--images", type=int, help="of the tree, training and validation; default: all")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--checkpoint-every", type=int, default=5, metavar="STEPS")
    parser.add_argument("--seed", type=int, help="of the kills; default: a new one, which is printed")
    parser.add_argument("--report", type=Path, metavar="FILE.md", help="write WORK's results into it")
    args = parser.parse_args()
    results = args.work / "results.jsonl"
    differ = False
    if args.tree is not None:
        args.work.mkdir(parents=True, exist_ok=True)
        tree = args.tree
        if args.images is not None:
            tree = first_images(tree, args.work / f"first-{args.images}", args.images)
        for method in args.methods:
            line = study(method, tree, args.work.resolve(), args)
            with results.open("a") as file:
                file.write(json.dumps(line) + "\n")
            differ |= bool(line["differ"])
            print(f"  {line['tensors']} tensors, different: {line['differ'][:9] or 'none'}", flush=True)
    if args.report:
        report(args.report, [json.loads(line) for line in results.read_text().splitlines()])
    return int(differ)


if __name__ == "__main__":
    sys.exit(main())
