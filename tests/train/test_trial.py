"""Batches that a network cannot take in train mode: found before training, or left out with a note."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastkd.cli import main
from fastkd.errors import Preempted
from fastkd.models import build_model
from fastkd.train import fit_method
from fastkd.train.batches import micro_batches
from fastkd.train.random_state import get_random_state
from fastkd.train.trial import try_step

from .ranks import on_two_ranks
from .tiny import METHODS, Loader, Net, Notes, make_method

pytestmark = pytest.mark.usefixtures("workplace")
LEFT_OUT = "a batch of 1 image cannot be trained on and is left out in each epoch"


def normed() -> nn.Module:
    """A network with batch normalisation of ``[N, D]``, which has no variance for one row."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.BatchNorm1d(12), nn.Linear(12, 7))


@pytest.mark.parametrize("name", METHODS)
def test_a_trial_changes_nothing(name: str) -> None:
    method = make_method(name, dropout=0.3)
    method.eval()
    for parameter in method.parameters():
        parameter.grad = torch.ones_like(parameter)
    state = copy.deepcopy(method.state_dict())
    teacher = copy.deepcopy(method.teacher.state_dict())
    modes = [module.training for module in method.modules()]
    before = get_random_state()
    try_step(method, (torch.randn(4, 3, 8, 8, generator=torch.Generator()), torch.arange(4)), "float32", 2)
    after = get_random_state()
    assert torch.equal(before.pop("torch"), after.pop("torch"))
    assert before == after
    for kept, now in ((state, method.state_dict()), (teacher, method.teacher.state_dict())):
        assert all(torch.equal(value, now[key]) for key, value in kept.items())
    assert modes == [module.training for module in method.modules()]
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in method.parameters())


def test_a_trial_that_fails_halfway_changes_nothing() -> None:
    method = make_method("cross_entropy")
    method.student.fc = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 7))
    state = copy.deepcopy(method.state_dict())
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        try_step(method, (torch.randn(1, 3, 8, 8), torch.arange(1)), "float32")
    assert all(torch.equal(value, state[key]) for key, value in method.state_dict().items())
    assert method.training


@pytest.mark.parametrize("rows", [33, 34])
def test_a_last_batch_of_one_is_left_out_and_said(rows: int) -> None:
    method = make_method("cross_entropy")
    method.student = normed()
    watcher = Notes()
    steps = []
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: steps.append(step) or 1.0)
    loader = Loader(rows, 16)
    result = fit_method(
        method, loader, loader, epochs=2, optimizer=optimizer, scheduler=scheduler, watcher=watcher
    )
    assert [r["rows"] for r in result.history] == [rows - rows % 2] * 2
    assert [r["skipped"] for r in result.history] == [rows % 2] * 2
    assert len(steps) == 1 + 2 * 3
    if rows == 34:
        assert not watcher.notes
        return
    (note,) = watcher.notes
    assert note.startswith(
        "a batch of 1 image cannot be trained on and is left out in each epoch: ValueError: "
    )
    assert [r["val_rows"] for r in result.history] == [33, 33]


def test_a_training_can_stop_at_a_batch_that_is_left_out() -> None:
    method = make_method("cross_entropy")
    method.student = normed()
    asked = iter([False, True])
    with pytest.raises(Preempted, match="in epoch 1 after step 2"):
        fit_method(method, Loader(17, 16), None, epochs=2, stop=lambda: next(asked), progress=False)


def test_a_network_that_takes_one_row_gets_it() -> None:
    watcher = Notes()
    loader = Loader(33, 16)
    record = fit_method(make_method("kd"), loader, loader, epochs=1, watcher=watcher).last
    assert (record["rows"], watcher.notes) == (33, [])


def test_a_fault_of_the_data_is_no_small_batch() -> None:
    images, target = Loader().images, Loader().target
    broken = [(images[:16], target[:16]), (images[:8], target[:8] + 50)]
    with pytest.raises((IndexError, RuntimeError, ValueError), match="out of"):
        fit_method(make_method("cross_entropy"), broken, broken[:1], epochs=1, progress=False)


def test_a_resumed_run_leaves_the_batch_out_too() -> None:
    states: dict[int, Any] = {}

    class Keep(Notes):
        def checkpoint(self, epoch: int, step: int, state: Any) -> None:
            states.setdefault(step, copy.deepcopy(state()))

    def method() -> Any:
        made = make_method("cross_entropy")
        made.student = normed()
        return made

    loader = Loader(33, 16)
    whole = method()
    fit_method(whole, loader, loader, epochs=1, watcher=Keep(), checkpoint_every=1)
    again, watcher = method(), Notes()
    fit_method(again, loader, loader, epochs=1, watcher=watcher, resume=states[2])
    assert len(watcher.notes) == 1
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in whole.state_dict().items())


class NeedsThree(Net):
    def forward(self, images: Tensor) -> Tensor:
        if self.training and len(images) < 3:
            raise RuntimeError("three at least")
        return super().forward(images)


def small_last_batches() -> list[Any]:
    """On two ranks: a last batch with one row each, and one with two rows, which the network refuses."""
    done = []
    for rows, student in ((18, Net(4)), (20, NeedsThree(4))):
        method, watcher = make_method("cross_entropy"), Notes()
        method.student = student
        record = fit_method(method, Loader(rows, 8), Loader(rows, 8), epochs=1, watcher=watcher).last
        done.append((record["rows"], watcher.notes, next(student.parameters()).detach()))
    return done


def test_small_last_batches_on_two_ranks(tmp_path: Path) -> None:
    first, second = on_two_ranks(small_last_batches, tmp_path)
    for one, other in zip(first, second, strict=True):
        assert one[0] == other[0] == 16
        assert torch.equal(one[2], other[2])
    assert first[0][1] == ["left out in epoch 1: 1 batches of under two images per process"]
    assert first[1][1] == [
        "a batch of 2 images cannot be trained on and is left out in each epoch: RuntimeError: three at least"
    ]


@pytest.mark.parametrize(
    ("rows", "count", "sizes"), [(7, 3, [3, 2, 2]), (5, 2, [3, 2]), (3, 4, [3]), (8, 3, [3, 3, 2])]
)
def test_no_part_of_a_batch_is_a_single_row(rows: int, count: int, sizes: list[int]) -> None:
    parts = micro_batches((torch.arange(rows), torch.arange(rows)), count)
    assert [len(part[0]) for part, _ in parts] == sizes
    assert torch.equal(torch.cat([part[0] for part, _ in parts]), torch.arange(rows))


def test_auxiliary_classifiers_are_no_output() -> None:
    model = build_model("torchvision/googlenet", num_classes=4).train()
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 4)
    from torchvision.models import googlenet

    method = make_method("cross_entropy")
    method.student = googlenet(num_classes=7, init_weights=False)
    with pytest.raises(
        ValueError,
        match=r"student returns a GoogLeNetOutputs of 3 \(logits, .*in train mode.*aux_logits=False",
    ):
        method.train()((torch.randn(2, 3, 64, 64), torch.arange(2)))


NETWORKS = """
import torch
from torch import nn
def normed(num_classes):
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return nn.Sequential(pool, nn.LazyBatchNorm1d(), nn.LazyLinear(num_classes))
class Tuple(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.fc = nn.LazyLinear(num_classes)
    def forward(self, images):
        logits = self.fc(images.flatten(1))
        return (logits, logits) if self.training else logits
class Broken(Tuple):
    def forward(self, images):
        if self.training:
            raise KeyError("no such key")
        return self.fc(images.flatten(1))
def frozen(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(784, num_classes)).requires_grad_(False)
def spare(num_classes):
    network = frozen(num_classes)
    network.spare = nn.Linear(2, 2)
    network.forward = lambda images: network[1](images.flatten(1))
    return network
def bad(num_classes):
    raise OSError("disk on fire")
"""
SHORT = ["data.synthetic=65", "train.batch_size=64", "train.epochs=1", "train.device=cpu", "teacher.epochs=1"]


def train(*words: str) -> int:
    Path("nets.py").write_text(NETWORKS)
    return main(["train", "fashion-mnist/kd", *SHORT, *words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["student.name=nets:Tuple"], "method kd: a training step on images [64, 1, 28, 28] fails: "
         "ValueError: the student returns a tuple of 2"),
        (["teacher.name=nets:Tuple"], "teacher nets:Tuple: a training step on images [64, 1, 28, 28] fails"),
        (["student.name=nets:Broken"], "fails: KeyError: 'no such key'"),
        (["student.name=nets:frozen"], "method kd: nothing to train: no parameter of the network or the"),
        (["student.name=nets:frozen", "--dry-run"], "method kd: nothing to train"),
        (["student.name=nets:spare"], "fails: TrainError: the loss does not depend on the parameters that"),
        (["teacher.name=nets:frozen"], "teacher nets:frozen: nothing to train: no parameter of"),
        (["student.name=nets:bad"], "student nets:bad: OSError: disk on fire"),
        (["student.name=nets:normed", "train.batch_size=1"], "[1, 1, 28, 28] fails: ValueError: Expected"),
    ],
)  # fmt: skip
def test_what_fails_in_train_mode_fails_before_the_teacher(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(*words) == 2
    error = capsys.readouterr().err
    assert message in error, error
    assert "Traceback" not in error
    assert not Path("runs").exists()


def test_inception_on_small_images(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text(
        "description: x\ndata.name: synthetic\ndata.images: 2\ndata.classes: 4\ndata.size: 64\n"
        "student.name: torchvision/inception_v3\nmethod: cross_entropy\ntrain.epochs: 1\n"
    )
    assert main(["train", "mine.yaml", "train.device=cpu"]) == 2
    assert "method cross_entropy: RuntimeError: Calculated padded input size" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_a_given_teacher_that_takes_other_images(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(build_model("torchvision/alexnet", num_classes=4).state_dict(), "w.pt")
    Path("mine.yaml").write_text(
        "description: x\ndata.name: synthetic\ndata.images: 2\ndata.classes: 4\ndata.size: 16\n"
        "student.name: small_cnn\nstudent.width: 2\nmethod: kd\ntrain.epochs: 1\n"
        "teacher.name: torchvision/alexnet\nteacher.checkpoint: w.pt\n"
    )
    for more in ([], ["--eval-only"]):
        assert main(["train", "mine.yaml", "train.device=cpu", *more]) == 2
        error = capsys.readouterr().err
        assert "teacher torchvision/alexnet on the validation images: RuntimeError: " in error
        assert not Path("runs").exists()


def test_a_last_batch_of_one_in_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert train("student.name=nets:normed", "teacher.name=nets:normed") == 0
    out = " ".join(capsys.readouterr().out.split())
    for role in ("teacher nets:normed", "method kd"):
        assert (
            f"{role}: a batch of 1 image cannot be trained on and is left out in each epoch: ValueError"
            in out
        )


def test_the_trial_is_of_the_first_and_the_last_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    monkeypatch.setattr(
        "fastkd.train.run.build.try_step", lambda method, batch, *_: tried.append(len(batch[0]))
    )
    assert train("teacher.batch_size=32") == 0
    assert tried == [32, 1, 64, 1]
