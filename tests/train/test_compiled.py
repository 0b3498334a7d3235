"""Networks that the caller has compiled, and those that ``fit`` compiles while it trains them."""

from __future__ import annotations

import contextlib
import copy
import io
from typing import Any

import pytest
import torch

import fastkd
from fastkd.distill import KD
from fastkd.train import Watcher, fit, fit_method

from .tiny import VARIANTS, Loader, Net, make_method

LOADER = Loader(16, 8)
IMAGES = LOADER.images


class Stops(Watcher):
    """Stops in the first epoch, like Ctrl-C or a callback that fails."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def epoch_done(self, record: Any, state: Any) -> None:
        raise self.error


def trained(method: Any, **options: Any) -> dict[str, float]:
    """The last epoch's terms and validation."""
    optimizer = torch.optim.SGD(method.parameters(), lr=0.05)
    options = {"epochs": 2, "optimizer": optimizer, "progress": False, **options}
    record = fit_method(method, LOADER, LOADER, **options).last
    return {**record["terms"], **{key: record[key] for key in ("loss", "val_loss", "val_accuracy")}}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_compiled_teacher_is_the_same_teacher(variant: str) -> None:
    plain, compiled = (make_method(variant, compile_teacher=backend) for backend in (None, "eager"))
    assert trained(plain) == pytest.approx(trained(compiled), rel=1e-5)


def test_fit_with_a_compiled_teacher() -> None:
    student, teacher = Net(4), torch.compile(Net(6), backend="eager")
    assert fit(student, teacher, LOADER, LOADER, loss=fastkd.KDLoss(), epochs=1, progress=False).history


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, RuntimeError])
def test_networks_are_as_given_after_training(error: type[BaseException] | None) -> None:
    student, teacher = Net(4), Net(6)
    given = vars(student).keys(), vars(teacher).keys()
    watcher = Watcher() if error is None else Stops(error)
    method = KD(student, teacher)
    with contextlib.nullcontext() if error is None else pytest.raises(error):
        trained(method, compile="eager", watcher=watcher)
    assert (vars(student).keys(), vars(teacher).keys()) == given

    twin = copy.deepcopy(method.export()).eval()
    expected = twin(IMAGES)
    with torch.no_grad():
        student.fc.bias.add_(1.0)
    assert torch.equal(twin(IMAGES), expected)
    for network in (student, teacher):
        torch.save(network, io.BytesIO())


def test_a_later_average_is_that_of_an_uncompiled_training() -> None:
    records = []
    for backend in ("eager", False):
        method = make_method("kd")
        trained(method, compile=backend)
        records.append(trained(method, ema=0.5))
    assert records[0] == pytest.approx(records[1], rel=1e-5)


def test_a_forward_of_the_callers_own_stays() -> None:
    method = make_method("kd")
    plain = method.student.forward
    method.student.forward = own = lambda images: 2 * plain(images)
    trained(method, compile="eager")
    assert method.student.forward is own
    compiled = torch.compile(plain, backend="eager")
    method.student.forward = compiled
    trained(method, compile="eager")
    assert method.student.forward is compiled
