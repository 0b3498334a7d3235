"""Two processes compute the same as one: weights of every method, metrics, statistics, shares of batches."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from fastkd.data.files import load_file_data
from fastkd.data.order import rows_of
from fastkd.errors import LaunchError, RecipeError
from fastkd.recipe.schema import load_recipe
from fastkd.recipe.sections import FolderData
from fastkd.train import FitResult, distributed, evaluate, fit_method
from fastkd.train.run import build
from fastkd.train.run.run import check_ranks
from tests.data.image_trees import make_tree

from .ranks import on_two_ranks
from .sync_batchnorm import synchronised
from .tiny import VARIANTS, Loader, Net, make_method

CPU = torch.device("cpu")


def train(variant: str, norm: bool = True, **options: Any) -> tuple[dict[str, torch.Tensor], FitResult]:
    """A short training in the current process group, with synchronised statistics in student and heads."""
    method = make_method(variant, synchronised, norm=norm)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.05, momentum=0.9)
    options = {"epochs": 2, "optimizer": optimizer, "progress": False, "clip_norm": 5.0, **options}
    result = fit_method(method, Loader(), Loader(17, 4, shuffle=False), **options)
    return {key: value.detach().clone() for key, value in method.state_dict().items()}, result


def all_variants(tree: Path) -> dict[str, Any]:
    done: dict[str, Any] = {}
    for variant in VARIANTS:
        weights, result = train(variant)
        done[variant] = weights, result.history
    for label, (_, of_two) in MORE.items():
        weights, result = train("dhkd shared", **of_two)
        done[label] = weights, result.history
    done["left out"] = left_out(), left_out(files(tree))
    done["in parts"] = train("kd", norm=False, accumulate=2)[0]
    done["counts"] = counts()
    done["normalised"] = normalised(slice(8 * distributed.rank(), 8 * distributed.rank() + 8))
    done["orders"] = orders()
    done["unused"] = unused()
    done["agreement"] = distributed.any_over_ranks(distributed.rank() == 1, False)
    return done


# Options of one process, and of two.
MORE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "averaged": ({"ema": 0.9}, {"ema": 0.9, "log_every": 3}),
    "skipping": ({}, {"nonfinite": "skip", "channels_last": True}),
}


def files(tree: Path) -> Any:
    """A loader of 9 images, of the last of which two ranks get none."""
    config = FolderData(name="imagefolder", root=str(tree), size=24, workers=0)
    return load_file_data(config).train_loader(4, 1, CPU)


def left_out(loader: Any = None) -> list[tuple[float, int]]:
    """Learning rate and steps left out, by epoch. Of the last 3 of 33 images each of two ranks gets one."""
    method = make_method("kd")
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [8])
    options = {"epochs": 3, "optimizer": optimizer, "scheduler": scheduler, "progress": False}
    history = fit_method(method, loader or Loader(33, 10), None, **options).history
    return [(record["lr"], record["skipped"]) for record in history]


def unused() -> torch.Tensor:
    """The weights after a training of a student with a layer that no pass uses."""
    method = make_method("kd", norm=False)
    method.student.spare = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.05)
    fit_method(method, Loader(), None, epochs=1, optimizer=optimizer, progress=False, accumulate=2)
    return nn.utils.parameters_to_vector(method.parameters()).detach()


def orders() -> list[str]:
    """What becomes of a loader that shuffles by the global generator, and of one with its own."""
    data = Loader()
    found = []
    for generator in (None, torch.Generator()):
        method = make_method("kd")
        torch.manual_seed(5 + distributed.rank())  # as is usual, so that dropout differs
        loader = DataLoader(TensorDataset(data.images, data.target), 8, shuffle=True, generator=generator)
        try:
            fit_method(method, loader, None, epochs=1, progress=False)
            found.append("trained")
        except LaunchError as error:
            found.append(str(error))
    return found


def counts() -> dict[str, Any]:
    """Validation of 11 images on two ranks, by shared batches and by a sampler that pads."""
    loader = Loader(11, 4)
    torch.manual_seed(0)
    model = Net(4)
    data = TensorDataset(loader.images, loader.target)
    found = {"shared": evaluate(model, DataLoader(data, 4), device=CPU)}
    if distributed.world() > 1:
        sampler = DistributedSampler(data, shuffle=False)
        found["padded"] = evaluate(model, DataLoader(data, 4, sampler=sampler), device=CPU)
    return found


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tree(tmp_path_factory.mktemp("images") / "tree", train=3)


@pytest.fixture(scope="module")
def both(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_two_ranks(functools.partial(all_variants, tree), tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("variant", [*VARIANTS, *MORE])
def test_two_processes_train_as_one(both: list[dict[str, Any]], variant: str) -> None:
    expected, result = train("dhkd shared", **MORE[variant][0]) if variant in MORE else train(variant)
    for weights, history in (one[variant] for one in both):
        assert weights.keys() == expected.keys()
        for key, value in weights.items():
            torch.testing.assert_close(
                value, expected[key], rtol=1e-3, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}"
            )
        for got, record in zip(history, result.history, strict=True):
            assert (got["rows"], got["val_rows"], got["epoch"]) == (56, 17, record["epoch"])
            assert got["loss"] == pytest.approx(record["loss"], rel=1e-4)
            assert got["terms"] == pytest.approx(record["terms"], rel=1e-3, abs=1e-6)
            assert got["train_accuracy"] == record["train_accuracy"]
            assert got["val_accuracy"] == record["val_accuracy"]
            assert got["val_loss"] == pytest.approx(record["val_loss"], rel=1e-4)
            assert got["lr"] == record["lr"]
    assert all(torch.equal(both[0][variant][0][key], both[1][variant][0][key]) for key in expected)


def test_micro_batches_on_two_ranks_are_the_step_of_one(both: list[dict[str, Any]]) -> None:
    expected, _ = train("kd", norm=False)
    in_parts, _ = train("kd", norm=False, accumulate=3)  # 16 rows are 6, 6 and 4
    for weights in (in_parts, *(one["in parts"] for one in both)):
        for key, value in weights.items():
            torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-6)


def test_each_image_counts_once(both: list[dict[str, Any]]) -> None:
    expected = counts()["shared"]
    for one in both:
        for found in one["counts"].values():
            assert found == pytest.approx(expected, rel=1e-6)


def test_a_batch_that_is_left_out_is_a_step_of_the_schedule(both: list[dict[str, Any]], tree: Path) -> None:
    # The milestone, step 8, is the end of the second epoch of 4 steps, and in the third of 3.
    rates = [pytest.approx([0.1, 0.01, 0.01]), pytest.approx([0.1, 0.1, 0.01])]
    one_process = left_out(), left_out(files(tree))
    for found, skipped in ((one_process, 0), *((one["left out"], 1) for one in both)):
        for epochs, expected in zip(found, rates, strict=True):
            assert [lr for lr, _ in epochs] == expected
            assert [count for _, count in epochs] == [skipped] * 3


def test_loaders_that_draw_another_order_on_each_rank_are_refused(both: list[dict[str, Any]]) -> None:
    for first, second in (one["orders"] for one in both):
        assert "checksum of the labels in train_loader's first batch is" in first
        assert "give the loader a torch.Generator of the same seed on all ranks" in first
        assert second == "trained"


def test_parameters_without_gradient(both: list[dict[str, Any]]) -> None:
    for one in both:
        torch.testing.assert_close(one["unused"], unused(), rtol=1e-3, atol=1e-5)


def test_ranks_agree_on_flags(both: list[dict[str, Any]]) -> None:
    assert [one["agreement"] for one in both] == [[True, False], [True, False]]


def test_synchronised_statistics_are_those_of_the_whole_batch(both: list[dict[str, Any]]) -> None:
    whole = normalised(slice(None))
    for rank, one in enumerate(both):
        weights, output, gradient = one["normalised"]
        mine = slice(8 * rank, 8 * rank + 8)
        torch.testing.assert_close(output, whole[1][mine], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradient, whole[2][mine], rtol=1e-4, atol=1e-6)
        for key, value in weights.items():
            torch.testing.assert_close(value, whole[0][key], rtol=1e-4, atol=1e-6)


def test_a_layer_that_does_more_than_normalise_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    class WithActivation(nn.BatchNorm2d):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return super().forward(inputs).relu()

    monkeypatch.setattr(distributed, "world", lambda: 2)
    with pytest.raises(RecipeError, match=r"layer '1' is a WithActivation"):
        build.synchronised(nn.Sequential(nn.Conv2d(3, 3, 1), WithActivation(3)))


def test_batch_normalisation_is_synchronised_on_gpus_only(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    _, recipe = load_recipe("fashion-mnist/student", ["train.sync_batchnorm=true"])
    assert build.synchronised(layers) is layers  # unchanged with one rank
    check_ranks(recipe, CPU)
    monkeypatch.setattr(distributed, "world", lambda: 2)
    with pytest.raises(RecipeError, match=r"SyncBatchNorm runs on GPUs, but train.device is cpu"):
        check_ranks(recipe, CPU)
    check_ranks(recipe, torch.device("cuda"))
    converted = build.synchronised(layers)
    assert isinstance(converted, nn.Sequential)
    assert [type(layer) for layer in converted] == [nn.Conv2d, nn.SyncBatchNorm]


def normalised(mine: slice) -> Any:
    """A layer's buffers, output and the gradient of its input, for some rows of a batch."""
    torch.manual_seed(1)
    images = torch.randn(16, 3, 4, 4)
    weights = torch.randn(16, 3, 4, 4)[mine]
    part = images[mine].clone().requires_grad_()
    layer = synchronised(nn.BatchNorm2d(3)).train()
    output = layer(part)
    (output * weights).sum().backward()
    return dict(layer.state_dict()), output.detach(), part.grad


def test_an_environment_in_part_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(RecipeError, match=r"RANK, .*MASTER_ADDR.* not set: start with torchrun"):
        distributed.launched().__enter__()


def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world", lambda: 3)
    _, recipe = load_recipe("fashion-mnist/student", ["train.batch_size=16"])
    with pytest.raises(RecipeError, match="batch_size = 16 cannot be shared among 3 processes"):
        check_ranks(recipe, CPU)
    monkeypatch.setattr(distributed, "world", lambda: 16)
    with pytest.raises(RecipeError, match="two images or more to each"):
        check_ranks(recipe, CPU)
    monkeypatch.setattr(distributed, "world", lambda: 4)
    check_ranks(recipe, CPU)
    _, recipe = load_recipe("fashion-mnist/kd", ["train.batch_size=16", "teacher.batch_size=6"])
    with pytest.raises(RecipeError, match=r"teacher\.batch_size = 6 cannot be shared among 4 processes"):
        check_ranks(recipe, CPU)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 16])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_rows_are_shared_without_gaps(count: int, world: int) -> None:
    rows = list(range(count))
    shared = [rows[rows_of(count, rank, world, even=False)] for rank in range(world)]
    assert [*itertools.chain(*shared)] == rows
    even = [rows[rows_of(count, rank, world, even=True)] for rank in range(world)]
    assert len({len(part) for part in even}) == 1
    assert [*itertools.chain(*even)] == rows[: count - count % world]
