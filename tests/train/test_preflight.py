"""What ``fit`` and ``fit_method`` refuse before a step is made."""

from __future__ import annotations

import copy
import itertools
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

import fastkd
from fastkd.errors import TrainError
from fastkd.train import Watcher, fit, fit_method

from .tiny import CLASSES, Loader, Net, make_method

LOADER = Loader()
IMAGES, TARGET = LOADER.images[:4], LOADER.target[:4]
GOOD = [(IMAGES, TARGET)]


def train(method: Any, **options: Any) -> Any:
    options = {"epochs": 1, "progress": False, **options}
    return fit_method(method, options.pop("train", LOADER), options.pop("val", LOADER), **options)


def test_an_optimizer_without_the_methods_heads() -> None:
    method = make_method("dhkd")
    before = copy.deepcopy(method.state_dict())
    with pytest.raises(ValueError, match=r"optimizer: it lacks head\.0\.weight, .* and \d+ more, which"):
        train(method, optimizer=SGD(method.student.parameters(), lr=0.1))
    assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())
    method.head.requires_grad_(False)  # given explicitly
    assert train(method, optimizer=SGD(method.student.parameters(), lr=0.1)).history
    assert torch.equal(method.head[0].weight, before["head.0.weight"])


def test_an_optimizer_of_another_network() -> None:
    method, other = make_method("kd"), Net(4)
    with pytest.raises(ValueError, match=r"lacks student\.features.* and has a parameter of shape \[4,"):
        train(method, optimizer=SGD(other.parameters(), lr=0.1))
    both = [*method.parameters(), *method.teacher.parameters()]
    with pytest.raises(ValueError, match=r"has teacher\.features\.0\.0\.weight, .*does not train"):
        train(method, optimizer=SGD(both, lr=0.1))
    features, fc = ({"params": part.parameters()} for part in (method.student.features, method.student.fc))
    assert train(method, optimizer=SGD([features, fc | {"lr": 0.2}], lr=0.1)).history
    features = {"params": method.student.features.parameters()}
    with pytest.raises(ValueError, match=r"it lacks student\.fc\.weight, student\.fc\.bias"):
        train(method, optimizer=SGD([features], lr=0.1))
    with pytest.raises(ValueError, match="optimizer is a list; expected one"):
        train(method, optimizer=[SGD(method.parameters(), lr=0.1)])
    method.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        train(method)


def test_the_parameters_of_a_loss_belong_to_the_optimizer() -> None:
    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, student: Tensor, teacher: Tensor | None, target: Tensor) -> Tensor:
            return nn.functional.cross_entropy(student * self.scale, target)

    student = Net(4)
    optimizer = SGD(student.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"it lacks callable\.scale"):
        fit(student, None, LOADER, LOADER, loss=Learned(), epochs=1, optimizer=optimizer)


def test_a_scheduler_of_another_optimizer() -> None:
    method = make_method("kd")
    optimizer, other = (SGD(method.parameters(), lr=0.1) for _ in range(2))
    with pytest.raises(ValueError, match="this CosineAnnealingLR belongs to another optimizer"):
        train(method, optimizer=optimizer, scheduler=lr_scheduler.CosineAnnealingLR(other, 4))
    two = [lr_scheduler.ConstantLR(other), lr_scheduler.ExponentialLR(other, 0.9)]
    with pytest.raises(ValueError, match="SequentialLR belongs to another optimizer"):
        train(method, optimizer=optimizer, scheduler=lr_scheduler.SequentialLR(other, two, [2]))
    with pytest.raises(ValueError, match="scheduler is given, but the optimizer it belongs to is not"):
        train(method, scheduler=lr_scheduler.ConstantLR(other))
    with pytest.raises(ValueError, match="ReduceLROnPlateau, whose step"):
        train(method, optimizer=optimizer, scheduler=lr_scheduler.ReduceLROnPlateau(optimizer))
    short = lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=6)
    with pytest.raises(ValueError, match=r"OneCycleLR ends after 6 steps, but there are 8"):
        train(method, optimizer=optimizer, scheduler=short, epochs=2)


def test_an_average_of_what_cannot_be_copied() -> None:
    method = make_method("cross_entropy", norm=False)
    torch.nn.utils.weight_norm(method.student.fc)
    method.student(LOADER.images[:2])
    with pytest.raises(ValueError, match=r"ema: .*weight_norm of fc .*parametrizations\.weight_norm"):
        train(method, ema=0.9)
    modern = make_method("cross_entropy")
    torch.nn.utils.parametrizations.weight_norm(modern.student.fc)
    assert train(modern, ema=0.9).history
    modern.student.handle = (part for part in ())
    with pytest.raises(ValueError, match=r"copy\.deepcopy raises TypeError: cannot pickle 'generator'"):
        train(modern, ema=0.9)


def test_channels_last_is_for_images() -> None:
    student = nn.Sequential(nn.Conv3d(3, 4, 1), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, CLASSES))
    videos = [(torch.randn(4, 3, 2, 4, 4), torch.arange(4))]
    options: dict[str, Any] = {
        "loss": lambda s, t, y: nn.functional.cross_entropy(s, y),
        "epochs": 1,
        "progress": False,
    }
    with pytest.raises(ValueError, match=r"images \[N, C, H, W\], but student.0.weight has shape"):
        fit(student, None, videos, videos, channels_last=True, **options)
    assert fit(student, None, videos, videos, **options).history


@pytest.mark.parametrize(
    ("option", "values", "expected"),
    [
        ("epochs", (0, "3", 2.0, True), "integer|greater than or equal to 1"),
        ("accumulate", (0, 2.0), "integer|greater than or equal to 1"),
        ("log_every", (0, -3, 1.5), "integer|greater than or equal to 1"),
        ("checkpoint_every", (0, -1), "expected at least 1"),
        ("checkpoint_every", (1.5, True), "integer, or a valid string"),
        ("checkpoint_every", ("soon",), "a time such as 15min"),
        ("clip_norm", (0, -1.0, float("nan"), "1"), "greater than 0|number"),
        ("ema", (0, 1.0, 1.5, "0.9"), "greater than 0|less than 1|number"),
        ("nonfinite", ("ignore",), "'stop' or 'skip'"),
        ("precision", ("bf16", None, torch.bfloat16), "'float32', 'bfloat16' or 'float16'"),
        ("teacher_precision", ("fp8",), "'float32', 'bfloat16' or 'float16'"),
        ("channels_last", ("yes",), "boolean"),
        ("scheduler_interval", ("batch",), "'step' or 'epoch'"),
        ("compile", ("inductr", 3), "Invalid backend: 'inductr'|name of a backend"),
        ("stop", (True,), "a function"),
    ],
)
def test_options(option: str, values: tuple[Any, ...], expected: str) -> None:
    method = make_method("kd")
    before = copy.deepcopy(method.state_dict())
    given = vars(method.student).keys()
    for value in values:
        words = rf"^{option} (=|is) {re.escape(repr(value))}.*({expected})"
        with pytest.raises((ValueError, TypeError), match=words):
            train(method, **{option: value})
    assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())
    assert vars(method.student).keys() == given


def test_options_that_are_numpys_numbers() -> None:
    class Counts(Watcher):
        saved = 0

        def checkpoint(self, epoch: int, step: int, state: Any) -> None:
            self.saved += 1

    whole = ("epochs", "accumulate", "log_every", "checkpoint_every")
    numbers = {**dict.fromkeys(whole, np.int64(2)), "ema": np.float32(0.5), "clip_norm": np.float32(1.0)}
    records, counts = [], []
    for options in (numbers, {name: value.item() for name, value in numbers.items()}):
        watcher = Counts()
        method = make_method("kd")
        records.append(train(method, watcher=watcher, **options).last)
        counts.append(watcher.saved)
    assert records[0]["val_loss"] == records[1]["val_loss"]
    assert counts == [4, 4]


@pytest.mark.parametrize(
    ("loaders", "words"),
    [
        ({"train": None}, "train_loader is None"),
        ({"val": 3}, "val_loader is a int"),
        ({"val": []}, "the validation loader yielded no batch"),
        ({"val": {"images": IMAGES}}, "val_loader is a dict"),
        ({"train": [{"pixel_values": IMAGES, "labels": TARGET}]},
         r"train_loader yields a dict with pixel_values, labels; .*batch\[\"pixel_values\"\], "),
        ({"val": [{"x": IMAGES, "y": TARGET}]}, "val_loader yields a dict with x, y"),
        ({"train": [IMAGES]}, r"train_loader yields a Tensor of shape \[4, 3, 8, 8\]"),
        ({"train": [(IMAGES,)]}, "train_loader yields a tuple of 1"),
        ({"train": [(IMAGES, [1, 2, 3, 4])]}, "entry 1 is a list"),
        ({"val": [(IMAGES, TARGET + 50)]}, "validation fails on the first batch of val_loader"),
        ({"val": [(IMAGES[:, :1], TARGET)]}, "validation fails on the first batch of val_loader"),
        ({"val": [(IMAGES, torch.rand(4, CLASSES))]},
         r"val_loader: target is torch.float32 of shape \[4, 7\]; expected int64 labels \[N\]"),
        ({"val": (pair for pair in GOOD)}, "val_loader is a generator, but there are 2 epochs"),
        ({"train": zip([IMAGES], [TARGET], strict=True)}, "train_loader is a zip, but there are 2 epochs"),
        ({"train": iter(GOOD)}, "train_loader is a list_iterator, but there are 2 epochs; a list_"),
        ({"val": itertools.islice(GOOD, 1)}, "val_loader is a islice, but there are 2 epochs"),
        ({"train": iter(DataLoader([(IMAGES[0], 1)]))}, "is a _SingleProcessDataLoaderIter, but there are 2"),
        ({"val": (pair for pair in GOOD), "epochs": 1, "ema": 0.9},
         "val_loader is a generator, but with ema an epoch is validated twice; a generator can be "),
    ],
)  # fmt: skip
def test_loaders(loaders: dict[str, Any], words: str) -> None:
    method = make_method("kd")
    before = copy.deepcopy(method.state_dict())
    with pytest.raises(TrainError, match=words):
        train(method, **{"epochs": 2, "train": GOOD, "val": GOOD, **loaders})
    assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())


def test_loaders_that_are_read_once() -> None:
    assert train(make_method("kd"), train=iter(GOOD), val=(pair for pair in GOOD)).history

    class Restarting:  # an iterator, as those of NVIDIA DALI
        def __iter__(self) -> Any:
            self.batches = iter(GOOD)
            return self

        def __next__(self) -> Any:
            return next(self.batches)

    assert train(make_method("kd"), train=Restarting(), val=Restarting(), epochs=2, ema=0.9).history


def test_looking_at_the_validation_loader_changes_nothing() -> None:
    def losses(val: Any) -> list[float]:
        method = make_method("kd", dropout=0.2)
        torch.manual_seed(5)
        data = TensorDataset(LOADER.images, LOADER.target)
        shuffled = DataLoader(data, batch_size=16, shuffle=True)
        return [record["loss"] for record in train(method, train=shuffled, val=val, epochs=2).history]

    class Unseen:  # not a list: its first batch is not read in advance
        def __init__(self, loader: Any) -> None:
            self.loader = loader

        def __iter__(self) -> Any:
            return iter(self.loader)

    val = DataLoader(TensorDataset(LOADER.images, LOADER.target), batch_size=16, shuffle=True)
    assert losses(val) == losses(Unseen(val))


@pytest.mark.parametrize(
    ("student", "teacher", "val", "words"),
    [
        (Net(4).half(), Net(6), GOOD, "val_loader: the student's parameters are torch.float16, but its"),
        (Net(4).bfloat16(), Net(6), None, "student's parameters .* give it as float32, and precision="),
        (Net(4), Net(6).half(), GOOD, "teacher's parameters are .* give teacher_precision='float16'"),
    ],
)  # fmt: skip
def test_networks_of_another_format(student: Any, teacher: Any, val: Any, words: str) -> None:
    loss = fastkd.DistillLoss(ce_weight=0.1, kd_weight=0.9)
    with pytest.raises(TrainError, match=words):
        fit(student, teacher, GOOD, val, loss=loss, epochs=1, progress=False)
    if val is not None and student.fc.weight.dtype == torch.float32:
        assert fit(student, teacher, GOOD, val, loss=loss, epochs=1, teacher_precision="float16").history


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_networks_of_torch_jit(role: str) -> None:
    networks = {"student": Net(4), "teacher": Net(6)}
    networks[role] = torch.jit.trace(networks[role].eval(), IMAGES)
    with pytest.raises(ValueError, match=f"{role} is a TopLevelTracedModule of torch.jit.*expected the"):
        fit(**networks, train_loader=GOOD, loss=fastkd.DistillLoss(ce_weight=0.1), epochs=1)


def test_without_a_teacher_a_loss_of_labels_alone() -> None:
    torch.manual_seed(0)
    student = Net(4)
    loss = fastkd.DistillLoss(ce_weight=2.0, kd_weight=0.0, label_smoothing=0.1)
    record = fit(student, None, GOOD, GOOD, loss=loss, epochs=1, progress=False).last
    torch.manual_seed(0)
    expected = nn.functional.cross_entropy(Net(4)(IMAGES), TARGET, label_smoothing=0.1).item()
    assert record["loss"] == pytest.approx(2 * expected, rel=1e-5)
    assert record["terms"] == {"ce": pytest.approx(expected, rel=1e-5)}
    distilling = fastkd.DistillLoss(ce_weight=1.0, kd_weight=0.9)
    with pytest.raises(ValueError, match=r"teacher is None, but DistillLoss\(.*kd_weight=0\.9.*\) takes its"):
        fit(student, None, GOOD, GOOD, loss=distilling, epochs=1)
    for other in (fastkd.KDLoss(), fastkd.DKDLoss(), fastkd.NKDLoss()):
        with pytest.raises(ValueError, match="teacher is None"):
            fit(student, None, GOOD, GOOD, loss=other, epochs=1)


@pytest.mark.parametrize("loss", [fastkd.KDLoss, fastkd.BinaryKLLoss(), nn.CrossEntropyLoss(), "kd"])
def test_a_loss_that_cannot_be_called(loss: Any) -> None:
    with pytest.raises(ValueError, match=r"loss .*\(student_logits, teacher_logits, target\)"):
        fit(Net(4), Net(6), GOOD, GOOD, loss=loss, epochs=1)
