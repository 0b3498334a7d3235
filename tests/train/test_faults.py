"""Faults of long trainings, caused deliberately; `reliability.py` makes a table of them."""

from __future__ import annotations

import contextlib
import math
import os
import random
import resource
import signal
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastkd.cli import main
from fastkd.errors import NonFiniteLossError, StorageError
from fastkd.models import build_model
from fastkd.train import Watcher, fit_method
from fastkd.train.display.console import ConsoleProgress
from fastkd.train.run.checkpoint import load_checkpoint
from fastkd.train.run.folder import RunRecorder
from fastkd.train.run.lock import locked
from tests.data.image_trees import make_tree

from .ranks import finish, in_folder, kill_after, launch, start, steps_done
from .tiny import Evil, Loader, make_method

pytestmark = pytest.mark.usefixtures("workplace")

RUN = Path("runs/fashion-mnist-student-001")
# 60 random images: 4 steps per epoch.
TINY = [
    "data.synthetic=60", "student.width=2", "train.epochs=3", "train.batch_size=16",
    "train.device=cpu", "train.threads=1", "train.checkpoint_every=1",
]  # fmt: skip
STUDENT = ["fashion-mnist/student", *TINY]


@pytest.fixture
def tell(record_property: Callable[[str, object], None]) -> Callable[[str, str, str], None]:
    """``tell(fault, what must happen, what happened)``: a line of docs/reliability.md."""

    def line(*texts: str) -> None:
        for name, text in zip(("fault", "must", "happened"), texts, strict=True):
            record_property(name, text)

    return line


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    """``at_step(n, act)``: call ``act()`` after the n-th step from now."""
    plan: dict[int, Callable[[], None]] = {}
    steps = 0
    original = ConsoleProgress.batch_done

    def batch_done(self: ConsoleProgress, meter: Any) -> None:
        nonlocal steps
        steps += 1
        original(self, meter)
        plan.pop(steps, lambda: None)()

    monkeypatch.setattr(ConsoleProgress, "batch_done", batch_done)

    def schedule(step: int, act: Callable[[], None]) -> None:
        nonlocal steps
        steps = 0
        plan[step] = act

    return schedule


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / "last.pt", remedy="")["student"]


def same_as_never_stopped(folder: Path, arguments: list[str] = STUDENT) -> bool:
    assert main(["train", *arguments, "--runs", "whole"]) == 0
    (whole,) = Path("whole").glob(f"{arguments[0].replace('/', '-')}-*")
    expected, got = weights(whole), weights(folder)
    return expected.keys() == got.keys() and all(torch.equal(expected[key], got[key]) for key in expected)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_scheduler_takes_the_machine_away(name: str, tell: Any, at_step: Any, capsys: Any) -> None:
    at_step(6, lambda: signal.raise_signal(getattr(signal, name)))
    status = main(["train", *STUDENT])
    assert status == 75
    assert f"after step 2; to resume: fastkd train --resume {RUN}" in capsys.readouterr().err
    state = load_checkpoint(RUN / "last.pt", remedy="")
    assert (len(state["history"]), state["position"]["meter"]["steps"]) == (1, 2)
    # The same command line with --resume, as a requeued job runs it, finds the folder.
    assert main(["train", *STUDENT, "--resume"]) == 0
    assert "resuming after step 2 of epoch 2" in capsys.readouterr().out
    assert sorted(path.name for path in Path("runs").iterdir()) == [RUN.name]
    assert same_as_never_stopped(RUN)
    tell(
        f"{name} in the middle of an epoch",
        "a checkpoint, a status to requeue on; the same command with `--resume` ends as if never stopped",
        f"status {status}, checkpoint of step 2 in epoch 2; resumed to the same bits",
    )


@pytest.mark.parametrize("log_every", [1, 20])  # of epochs of 4 steps
def test_sigterm_to_one_of_two_processes(log_every: int, tell: Any, workplace: Path) -> None:
    arguments = ["fashion-mnist/student", *TINY, "train.epochs=40", f"train.log_every={log_every}"]
    processes = start(2, in_folder, str(workplace), arguments)
    deadline = time.monotonic() + 60
    while steps_done(RUN) < 2:
        assert time.monotonic() < deadline, "no checkpoint came"
        assert all(process.is_alive() for process in processes)
        time.sleep(0.005)
    os.kill(processes[1].pid, signal.SIGTERM)
    assert finish(processes) == [75, 75]
    assert 2 <= steps_done(RUN) < 160
    tell(
        "SIGTERM to one of two processes" + (", epochs shorter than `log_every`" if log_every > 1 else ""),
        "both stop at the same step, one checkpoint, a status to requeue on",
        "status 75 of both, the checkpoint can be read",
    )


# Also 4 steps per epoch.
SYNTHETIC = [*TINY, "teacher.width=4", "teacher.epochs=1", "train.epochs=10"]
JPEG_FILES = [
    "data.root=tree", "data.size=32", "data.workers=1", "teacher.checkpoint=teacher.pth", "train.lr=0.01",
    "train.epochs=2", "train.milestones=[1]", "train.batch_size=4", *TINY[4:],
]  # fmt: skip


@pytest.mark.parametrize(
    ("ranks", "recipe", "options", "of"),
    [
        (1, "fashion-mnist/mhkd", SYNTHETIC, 40),
        (2, "fashion-mnist/dhkd", SYNTHETIC, 40),
        (2, "imagenet/r18-dkd", JPEG_FILES, 8),
    ],
    ids=["one process", "two processes", "ImageNet's recipe"],
)
def test_sigkill_at_a_random_step(
    ranks: int, recipe: str, options: list[str], of: int, tell: Any, workplace: Path
) -> None:
    arguments, stem = [recipe, *options], recipe.replace("/", "-")
    run = Path(f"runs/{stem}-001")
    Path("runs").mkdir()
    if options is JPEG_FILES:
        make_tree(Path("tree"), classes=4, train=4, val=1)
        torch.save(build_model("torchvision/resnet34", num_classes=4).state_dict(), "teacher.pth")
    assert launch(ranks, workplace, [*arguments, "--runs", "whole"]) == [0] * ranks
    (whole,) = Path("whole").glob(f"{stem}-*")
    if options is SYNTHETIC:
        Path("whole/teachers").rename("runs/teachers")  # so that the student is killed
    steps = random.SystemRandom().randint(1, of // 2)  # not so late that it could end before
    kill_after(steps, run, start(ranks, in_folder, str(workplace), [*arguments, "--resume"]))
    assert 0 < steps_done(run) < of
    assert not (run / "summary.json").exists()
    assert launch(ranks, workplace, [*arguments, "--resume"]) == [0] * ranks
    expected, got = weights(whole), weights(run)
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    tell(
        f"SIGKILL at a random step, {ranks} process{'es' if ranks > 1 else ''} (`{recipe}`)",
        "`--resume` ends with the same bits as a run that was never killed",
        "resumed and ended with the same bits; the stale lock did not block the restart",
    )


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda part: part.file_size)
        position = path.read_bytes().index(archive.read(largest))
    content = bytearray(path.read_bytes())
    content[position + largest.file_size // 2] ^= 4
    path.write_bytes(content)


def make_evil(path: Path) -> None:
    torch.save({"student": Evil()}, path)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, make_evil])
def test_a_damaged_checkpoint(damage: Callable[[Path], None], tell: Any, at_step: Any, capsys: Any) -> None:
    at_step(7, lambda: signal.raise_signal(signal.SIGTERM))
    assert main(["train", *STUDENT]) == 75
    damage(RUN / "last.pt")
    capsys.readouterr()
    assert main(["train", "--resume", str(RUN)]) == 0
    out = capsys.readouterr().out
    assert f"checkpoint {RUN}/last.pt is" in out.replace("\n", "")
    assert "using the previous one" in out
    assert "resuming after step 2 of epoch 2" in out
    assert not Path("owned").exists()
    assert same_as_never_stopped(RUN)
    fault = {
        truncate: "the last checkpoint is cut in half",
        flip_a_bit: "one bit of the last checkpoint is flipped",
        make_evil: "the last checkpoint is a pickle that runs a command",
    }[damage]
    tell(
        fault,
        "it is named and refused, no code in it is run, the previous one is used",
        "named; resumed one step earlier, ended with the same bits",
    )


def test_no_checkpoint_can_be_read(tell: Any, at_step: Any, capsys: Any) -> None:
    at_step(3, lambda: signal.raise_signal(signal.SIGTERM))
    assert main(["train", *STUDENT]) == 75
    for name in ("last.pt", "previous.pt"):
        truncate(RUN / name)
    assert main(["train", "--resume", str(RUN)]) == 2
    assert "delete it to start this run from its first epoch" in capsys.readouterr().err
    tell(
        "all checkpoints are damaged",
        "an error, no silent restart from scratch",
        "status 2, says what to delete",
    )


@contextlib.contextmanager
def no_room() -> Iterator[None]:
    """Limit files to 2 kB, so that writes fail as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_the_disk_is_full(tell: Any, at_step: Any, capsys: Any) -> None:
    with contextlib.ExitStack() as until_here:
        at_step(6, lambda: until_here.enter_context(no_room()))
        status = main(["train", *STUDENT])
    assert status == 2
    error = capsys.readouterr().err
    assert f"{RUN}/last.pt cannot be written" in error
    assert "continue with: fastkd train --resume" in error
    assert not list(RUN.glob(".*"))  # no half files, no lock
    assert main(["train", "--resume", str(RUN)]) == 0
    assert "resuming after step 1 of epoch 2" in capsys.readouterr().out
    assert same_as_never_stopped(RUN)
    tell(
        "the disk is full when a checkpoint is written",
        "a clear error; the previous checkpoint stays intact, no partial files",
        "status 2, names file and reason; resumed from the previous step to the same bits",
    )


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Make the folder read-only; root becomes nobody meanwhile, since permissions do not apply to root."""
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)


def test_the_run_folder_becomes_read_only(tell: Any, at_step: Any, capsys: Any, workplace: Path) -> None:
    workplace.chmod(0o755)
    with contextlib.ExitStack() as until_here:
        at_step(6, lambda: until_here.enter_context(read_only(RUN)))
        status = main(["train", *STUDENT])
    assert status == 2
    assert f"{RUN}/last.pt cannot be written: Permission denied" in capsys.readouterr().err
    refused = pytest.raises(StorageError, match="run folder runs/fashion-mnist-student-001 cannot be written")
    with read_only(RUN), refused, locked(RUN):
        pass
    assert main(["train", "--resume", str(RUN)]) == 0
    assert same_as_never_stopped(RUN)
    tell(
        "the run folder becomes read-only",
        "a clear error, nothing lost",
        "status 2, names file and reason; resumed to the same bits once it is writable",
    )


def test_runs_cannot_be_made(tell: Any, capsys: Any) -> None:
    Path("runs").write_text("a file")
    assert main(["train", *STUDENT]) == 2
    assert "cannot create a run folder in runs" in capsys.readouterr().err
    tell(
        "no run folder can be created", "a clear error before anything is trained", "status 2, names `--runs`"
    )


def test_a_second_process_in_the_run_folder(tell: Any, at_step: Any, capsys: Any) -> None:
    at_step(3, lambda: signal.raise_signal(signal.SIGTERM))
    assert main(["train", *STUDENT]) == 75
    before = (RUN / "last.pt").read_bytes()
    with locked(RUN):
        assert main(["train", "--resume", str(RUN)]) == 2
    assert f"the run folder {RUN} is in use by process {os.getpid()} on" in capsys.readouterr().err
    assert (RUN / "last.pt").read_bytes() == before
    assert main(["train", "--resume", str(RUN)]) == 0
    tell(
        "a second process in the same run folder",
        "it is refused and the holder is named; the first one continues",
        "status 2, names process and machine; no file changed",
    )


class Poisoned(Loader):
    """One image of the first epoch's third batch is NaN."""

    def __iter__(self) -> Any:
        for number, (images, target) in enumerate(super().__iter__()):
            if self.epoch == 0 and number == 2:
                images[1] = math.nan
            yield images, target


@pytest.mark.parametrize("log_every", [1, 4])
def test_a_loss_that_is_not_finite_stops(log_every: int, tell: Any) -> None:
    method = make_method("dkd")
    recorder = RunRecorder(Path("."), Watcher(), facts={}, title="")
    with pytest.raises(NonFiniteLossError, match="epoch 1, step 3: loss nan, ce nan") as raised:
        fit_method(method, Poisoned(), Loader(), epochs=2, watcher=recorder, log_every=log_every)
    path = Path("not-finite-epoch-0001-step-000003.pt")
    assert str(path) in str(raised.value)
    saved = load_checkpoint(path, remedy="")
    assert (saved["epoch"], saved["step"]) == (1, 3)
    assert math.isnan(saved["terms"]["ce"])
    expected = list(Poisoned())[2]
    assert torch.equal(saved["images"].nan_to_num(), expected[0].nan_to_num())
    assert torch.equal(saved["target"], expected[1])
    tell(
        f"the loss becomes NaN, losses fetched every {log_every} steps",
        "stop; step, terms and batch are saved",
        "named step and terms, batch written to a file",
    )


@pytest.mark.parametrize("variant", ["dkd", "dhkd"])
def test_a_loss_that_is_not_finite_is_skipped(variant: str, tell: Any) -> None:
    method = make_method(variant)
    result = fit_method(method, Poisoned(), Loader(), epochs=2, nonfinite="skip", progress=False)
    assert [record["skipped"] for record in result.history] == [1, 0]
    assert [record["rows"] for record in result.history] == [40, 56]
    assert all(value.isfinite().all() for value in method.state_dict().values())  # statistics included
    assert math.isfinite(result.last["val_loss"])
    tell(
        f"the loss becomes NaN, `train.nonfinite: skip` ({variant})",
        "the step is left out and counted; weights and running statistics stay finite",
        "1 step skipped and counted, all weights and statistics finite",
    )
