"""A training that is stopped at any step and resumed ends with the same bits."""

from __future__ import annotations

import copy
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from fastkd.data.files import load_file_data
from fastkd.distill import Method, find_method
from fastkd.errors import CheckpointError, Preempted
from fastkd.recipe.durations import seconds_of
from fastkd.recipe.sections import FolderData
from fastkd.train import FitResult, Watcher, fit_method
from fastkd.train.run.checkpoint import load_checkpoint, save_checkpoint
from fastkd.train.signals import Control, StopSignals, restore_handlers
from tests.data.image_trees import make_tree

from .tiny import VARIANTS, Killed, Loader, Net, Notes, make_method, without_time

STEPS = 4  # of an epoch of 56 images in batches of 16


class KillAfter(Watcher):
    """Writes every state, and ends the training like an uncatchable signal."""

    def __init__(self, path: Path, epoch: int, step: int) -> None:
        self.path, self.when = path, (epoch, step)

    def checkpoint(self, epoch: int, step: int, state: Callable[[], dict[str, Any]]) -> None:
        save_checkpoint(self.path, state())
        if (epoch, step) == self.when:
            raise Killed


def start(variant: str, loader: Any = None, **options: Any) -> tuple[Method, Callable[[], FitResult]]:
    method = make_method(variant, dropout=0.3)
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=3 * STEPS)
    shared = {"epochs": 3, "optimizer": optimizer, "scheduler": scheduler, "clip_norm": 5.0, "ema": 0.9}
    loader = loader or Loader()
    val = Loader(17, 4, shuffle=False)
    return method, lambda: fit_method(method, loader, val, progress=False, **{**shared, **options})


def ends_the_same(
    path: Path, variant: str, epoch: int, step: int, make_loader: Callable[[], Any] = Loader, **options: Any
) -> None:
    torch.manual_seed(5)
    whole, go = start(variant, make_loader(), **options)
    torch.manual_seed(6)
    expected = go()
    torch.manual_seed(5)
    _, go = start(variant, make_loader(), watcher=KillAfter(path, epoch, step), checkpoint_every=1, **options)
    torch.manual_seed(6)
    with pytest.raises(Killed):
        go()
    resumed, go = start(variant, make_loader(), resume=load_checkpoint(path, remedy=""), **options)
    torch.rand(7)  # whatever happens in between
    got = go()
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    assert without_time(expected.history) == without_time(got.history)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_method_resumes_within_an_epoch(variant: str, tmp_path: Path) -> None:
    where = random.Random(variant)
    ends_the_same(tmp_path / "last.pt", variant, where.randint(1, 3), where.randint(1, STEPS))


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "float16", "accumulate": 2},
        {"precision": "bfloat16", "teacher_precision": "float32", "channels_last": True},
        {"nonfinite": "skip", "ema": None, "log_every": 3},
    ],
)
def test_with_everything_else_switched_on(options: dict[str, Any], tmp_path: Path) -> None:
    ends_the_same(tmp_path / "last.pt", "dhkd", 2, 3, **options)


@pytest.mark.parametrize("owner", ["none", "loader", "sampler", "batch sampler"])
@pytest.mark.parametrize("step", [2, STEPS])
def test_torchs_own_shuffling_loader(owner: str, step: int, tmp_path: Path) -> None:
    # Its order comes from the global generator, or one of its own, in the state of the epoch's start.
    data = TensorDataset(Loader().images, Loader().target)

    def make_loader() -> DataLoader[Any]:
        generator = None if owner == "none" else torch.Generator().manual_seed(3)
        if owner in ("none", "loader"):
            return DataLoader(data, 16, shuffle=True, generator=generator)
        sampler = RandomSampler(data, generator=generator)
        if owner == "sampler":
            return DataLoader(data, 16, sampler=sampler)
        return DataLoader(data, batch_sampler=BatchSampler(sampler, 16, drop_last=False))

    ends_the_same(tmp_path / "last.pt", "kd", 2, step, make_loader)


@pytest.mark.parametrize("step", [2, 3])
def test_a_batch_of_unreadable_images_is_a_step(step: int, tmp_path: Path) -> None:
    root = make_tree(tmp_path / "tree")  # 12 images: 4 steps
    config = FolderData(name="imagefolder", root=str(root), size=24, workers=0)
    data = load_file_data(config)
    loader = data.train_loader(3, 1, torch.device("cpu"))
    loader.set_epoch(1)
    for index in list(loader.indexed())[1][2]:
        Path(data.source.name(int(index))).write_text("no image")
    ends_the_same(tmp_path / "last.pt", "kd", 2, step, lambda: data.train_loader(3, 1, torch.device("cpu")))


class Warming(Net):
    """Scales its logits by a count of steps that its state dict leaves out."""

    def __init__(self) -> None:
        super().__init__(4)
        self.register_buffer("steps", torch.zeros(()), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.steps += self.training
        return super().forward(images) * self.steps.clamp(max=20) / 20


def test_buffers_that_state_dicts_leave_out(tmp_path: Path) -> None:
    results = []

    def train(**options: Any) -> Method:
        torch.manual_seed(0)
        method = find_method("kd")(Warming(), Net(6))
        results.append(fit_method(method, Loader(), Loader(17, 4), epochs=3, ema=0.9, **options))
        return method

    train(progress=False)
    with pytest.raises(Killed):
        train(watcher=KillAfter(tmp_path / "last.pt", 2, 2), checkpoint_every=1)
    state = load_checkpoint(tmp_path / "last.pt", remedy="")
    resumed = train(resume=state, progress=False)
    assert resumed.student.steps == 3 * STEPS
    assert without_time(results[0].history) == without_time(results[1].history)
    del state["buffers"]  # as an older version wrote it
    assert train(resume=state, progress=False).student.steps == 2 * STEPS - 2


def test_persistent_workers_are_said(tmp_path: Path) -> None:
    watcher = Notes()
    data = TensorDataset(Loader().images, Loader().target)
    persistent = DataLoader(data, 16, num_workers=1, persistent_workers=True)
    state = state_of(tmp_path)
    for loader in (Loader(), persistent):
        start("kd", loader, watcher=watcher, resume=state)[1]()
    assert [note[:35] for note in watcher.notes] == ["train_loader has persistent workers"]


def test_a_state_in_memory_is_not_changed_by_resuming() -> None:
    states: list[dict[str, Any]] = []

    class Keeps(Watcher):
        def epoch_done(self, record: Any, state: Callable[[], dict[str, Any]]) -> None:
            states.append(copy.deepcopy(state()))

    start("kd", watcher=Keeps())[1]()
    ends = []
    for _ in range(2):
        method, go = start("kd", resume=states[0])
        go()
        ends.append(method.student.state_dict())
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


def test_stopping_writes_a_state(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []

    class Keeps(Watcher):
        def checkpoint(self, epoch: int, step: int, state: Callable[[], dict[str, Any]]) -> None:
            calls.append((epoch, step))

    asked = iter([False] * 5 + [True])
    _, go = start("kd", watcher=Keeps(), stop=lambda: next(asked))
    with pytest.raises(Preempted, match="in epoch 2 after step 2"):
        go()
    assert calls == [(2, 2)]


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]


def test_signals_are_seen_and_given_back() -> None:
    before = handlers()
    with StopSignals():
        assert handlers() != before
    assert handlers() == before
    for number in (signal.SIGTERM, signal.SIGUSR1):
        with StopSignals() as stop:
            assert not stop()
            signal.raise_signal(number)
            assert stop()
        # Further signals must not change the exit status of the process.
        assert handlers() == [signal.SIG_IGN, signal.SIG_IGN]
        restore_handlers()
        assert handlers() == before


def test_a_training_in_a_thread_leaves_signals_alone() -> None:
    """Python allows handlers in the main thread only."""
    before, found = handlers(), []

    def train() -> None:
        with StopSignals() as stop:
            found.append((stop(), handlers()))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert found == [(False, before)]


def test_a_signal_between_two_trainings_stops_the_second() -> None:
    with StopSignals() as run:
        with StopSignals() as teacher:
            assert not teacher()
        signal.raise_signal(signal.SIGTERM)
        with StopSignals() as student:
            assert student()
    assert run()
    restore_handlers()


def test_the_clock() -> None:
    by_steps = Control(3, None, 1)
    assert [by_steps.after_step(step)[0] for step in range(1, 8)] == [False, False, True] * 2 + [False]
    by_time = Control("0.01s", None, 1)

    time.sleep(0.02)
    assert by_time.after_step(1) == (True, False)
    assert by_time.after_step(2) == (False, False)


@pytest.mark.parametrize(("text", "seconds"), [("15min", 900.0), ("90s", 90.0), ("1.5h", 5400.0)])
def test_times(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["15", "min", "-1s", "0h", "a while", "infs", "nans"])
def test_invalid_times(text: str) -> None:
    with pytest.raises(ValueError, match="15min"):
        seconds_of(text)


def state_of(tmp_path: Path, **options: Any) -> dict[str, Any]:
    """The state of a training of 3 epochs that was stopped in its second."""
    _, go = start("kd", watcher=KillAfter(tmp_path / "last.pt", 2, 2), checkpoint_every=1, **options)
    with pytest.raises(Killed):
        go()
    return load_checkpoint(tmp_path / "last.pt", remedy="")


def sgd(method: Method) -> torch.optim.Optimizer:
    return torch.optim.SGD(method.parameters(), lr=0.1, momentum=0.9)


def one_cycle(optimizer: torch.optim.Optimizer, steps: int, lr: float = 1e-2) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"ema": None}, r"averaged weights \(ema\): the state has one, this training has none"),
        ({"precision": "float16"}, "loss scale .*: the state has none, this training has one"),
        ({"scheduler": None}, "learning-rate schedule: the state has one, this training has none"),
        ({"epochs": 1}, "it has 1 epochs, epoch 2 is begun, but epochs = 1"),
        ({"optimizer": sgd}, "optimizer: the state is of one with .*betas.*this one is SGD with .*momentum"),
        ({"steps": 6 * STEPS}, "learning-rate schedule: total_steps 12 → 24"),
        ({"lr": 0.5}, "learning-rate schedule: base_lrs"),
        ({"loader": Loader(batch_size=8)}, "batches per epoch: 4 → 7"),
        ({"width": 5}, r"features\.0\.0\.weight has shape \[4, 3, 3, 3\], expected \[5, 3, 3, 3\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_state_of_another_training_is_refused(changed: dict[str, Any], words: str, tmp_path: Path) -> None:
    state = state_of(tmp_path)
    torch.manual_seed(0)
    method = make_method("kd", dropout=0.3)
    if "width" in changed:
        method = find_method("kd")(Net(changed["width"], dropout=0.3), Net(6))
    optimizer = changed.get("optimizer", lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2))(method)
    scheduler = one_cycle(optimizer, changed.get("steps", 3 * STEPS), changed.get("lr", 1e-2))
    if changed.get("optimizer"):
        scheduler.load_state_dict(state["scheduler"])
    given = {"epochs": 3, "scheduler": scheduler, "clip_norm": 5.0, "ema": 0.9, "progress": False}
    options = {
        key: value for key, value in changed.items() if key in ("ema", "precision", "scheduler", "epochs")
    }
    before = {key: value.clone() for key, value in method.state_dict().items()}
    with pytest.raises(CheckpointError, match=words) as raised:
        fit_method(
            method,
            changed.get("loader", Loader()),
            Loader(17, 4, shuffle=False),
            optimizer=optimizer,
            resume=state,
            **{**given, **options},
        )
    assert "\n" not in str(raised.value)
    assert all(torch.equal(value, method.state_dict()[key]) for key, value in before.items())


@pytest.mark.parametrize(
    "damage",
    [
        {"history": 3},
        {"history": [{"epoch": 1}]},
        {"optimizer": {}},
        {"method": None},
        {"position": {"meter": {"steps": -1}, "seconds": {}}},
        {"position": {"meter": {"steps": 99}, "seconds": {}}},
        {"scheduler": {"_schedulers": 3}},
    ],
    ids=str,
)
def test_a_damaged_state_is_refused_in_one_line(damage: dict[str, Any], tmp_path: Path) -> None:
    _, go = start("kd", resume={**state_of(tmp_path), **damage})
    with pytest.raises(CheckpointError, match="the state does not fit this training") as raised:
        go()
    assert "\n" not in str(raised.value)
