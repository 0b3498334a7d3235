from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fastkd
from fastkd.data.glyphs.loader import GlyphData, load_glyph_data
from fastkd.distill import CrossEntropy, Method, find_method
from fastkd.errors import NonFiniteLossError, TrainError
from fastkd.models import GlyphCNN
from fastkd.recipe.sections import GlyphsData
from fastkd.train import FitResult, Watcher, evaluate, fit, fit_method
from fastkd.train.meters import PARTS, LossMeter
from fastkd.train.run.checkpoint import load_checkpoint, save_checkpoint

from .tiny import VARIANTS, Loader, labels_alone, make_method, without_time

CPU = torch.device("cpu")
KD = fastkd.DistillLoss(ce_weight=0.1, kd_weight=0.9)


@pytest.fixture
def data(fonts: Path) -> GlyphData:
    return load_glyph_data(GlyphsData(fonts=str(fonts), characters="41-5A,61-7A"))


def network(data: GlyphData, width: int = 2, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return GlyphCNN(data.num_classes, width=width)


def run(data: GlyphData, student: nn.Module, teacher: nn.Module | None, **options: Any) -> FitResult:
    options = {"loss": KD if teacher else labels_alone, "epochs": 2, "progress": False, **options}
    return fit(student, teacher, data.train_loader(16, 0, CPU), data.val_loader(CPU), **options)


class StopAfter(Watcher):
    """Keeps the state of an epoch and stops there, like Ctrl-C."""

    def __init__(self, epoch: int, path: Path) -> None:
        self.epoch = epoch
        self.path = path

    def epoch_done(self, record: dict[str, Any], state: Callable[[], dict[str, Any]]) -> None:
        if record["epoch"] == self.epoch:
            save_checkpoint(self.path, state())
            raise KeyboardInterrupt


def test_a_network_learns_real_glyphs(data: GlyphData) -> None:
    student = network(data, width=4)
    optimizer = torch.optim.AdamW(student.parameters(), lr=6e-3)
    result = run(data, student, None, epochs=12, optimizer=optimizer)
    assert [record["epoch"] for record in result.history] == list(range(1, 13))
    assert result.best["val_accuracy"] > 0.5
    assert result.last["loss"] < result.history[0]["loss"] / 2
    assert result.best["val_accuracy"] == max(r["val_accuracy"] for r in result.history)
    accuracy, val_loss = evaluate(student, data.val_loader(CPU), device=CPU)
    assert accuracy == result.last["val_accuracy"]
    assert val_loss == result.last["val_loss"]


def test_history_holds_terms_and_time(data: GlyphData) -> None:
    result = run(data, network(data), network(data, 4, 1))
    for record in result.history:
        assert set(record["terms"]) == {"ce", "kd"}
        weighted = (
            0.1 * record["terms"]["ce"] + 0.9 * record["terms"]["kd"]
        )  # the loss's own terms, as they come
        assert record["loss"] == pytest.approx(weighted, rel=1e-4)
        assert set(record["seconds"]) == set(PARTS)
        assert all(record["seconds"][part] > 0 for part in PARTS)
    assert result.seconds["loss"] == pytest.approx(sum(r["seconds"]["loss"] for r in result.history))


def test_a_step_is_the_step_of_a_bare_loop(data: GlyphData) -> None:
    teacher = network(data, 4, 1).eval()
    images, target = next(iter(data.train_loader(64, 0, CPU)))

    whole = network(data)
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1)
    with torch.no_grad():
        teacher_logits = teacher(images)
    KD(whole(images), teacher_logits, target)[0].backward()
    optimizer.step()

    fitted = network(data)
    optimizer = torch.optim.SGD(fitted.parameters(), lr=0.1)
    batch = [(images, target)]
    fit(fitted, teacher, batch, batch, loss=KD, epochs=1, optimizer=optimizer, progress=False)
    for (name, expected), got in zip(whole.named_parameters(), fitted.parameters(), strict=True):
        torch.testing.assert_close(got, expected, msg=name)


def test_the_teacher_is_as_before(data: GlyphData) -> None:
    teacher = network(data, 4, 1).train()
    teacher.stages[0].eval()
    teacher.head.requires_grad_(False)
    modes = [module.training for module in teacher.modules()]
    flags = [parameter.requires_grad for parameter in teacher.parameters()]
    weights = {key: value.clone() for key, value in teacher.state_dict().items()}
    seen = []

    def loss(student: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
        seen.append((teacher.training, teacher_logits.requires_grad))
        return KD(student, teacher_logits, target)[0]

    run(data, network(data), teacher, loss=loss, epochs=1)
    assert set(seen) == {(False, False)}

    def fails(student: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        run(data, network(data), teacher, loss=fails)
    assert [module.training for module in teacher.modules()] == modes
    assert [parameter.requires_grad for parameter in teacher.parameters()] == flags
    assert all(parameter.grad is None for parameter in teacher.parameters())
    for key, value in teacher.state_dict().items():
        assert torch.equal(value, weights[key]), key  # batch norm statistics included


@pytest.mark.parametrize("stop", [1, 2])
@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_a_resumed_run_ends_the_same_to_the_bit(
    data: GlyphData, tmp_path: Path, stop: int, interval: str
) -> None:
    teacher = network(data, 4, 1)

    def start(**options: Any) -> tuple[nn.Module, Callable[[], FitResult]]:
        # Dropout draws from the global generator, which must be restored too.
        student = nn.Sequential(nn.Dropout(0.1), network(data))
        optimizer = torch.optim.AdamW(student.parameters(), lr=6e-3)
        steps = 3 * (len(data.train_loader(16, 0, CPU)) if interval == "step" else 1)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps)
        shared = {"optimizer": optimizer, "scheduler": scheduler, "scheduler_interval": interval}
        return student, lambda: run(data, student, teacher, epochs=3, **shared, **options)

    whole, go = start()
    expected = go().history

    path = tmp_path / "last.pt"
    _, go = start(watcher=StopAfter(stop, path))
    with pytest.raises(KeyboardInterrupt):
        go()
    torch.rand(7)  # whatever happens in between
    resumed, go = start(resume=load_checkpoint(path, remedy=""))
    got = go().history

    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    assert without_time(expected) == without_time(got)


OPTIONS: dict[str, dict[str, Any]] = {
    "kd": {"warmup_epochs": 3},
    "dckd": {"hint_layer": "stages.1", "hint_weight": 0.1, "distance_weight": 1.0},
    "fitnets": {"hint_layer": "stages.0", "hint_weight": 1.0},
    "dhkd": {"hidden": 8, "alpha": 0.1, "stop_epoch": 2, "dropout": 0.5},
    "mhkd": {"layers": ["stages.0"], "head_width": 4},
}


@pytest.mark.parametrize("name", ["cross_entropy", "lskd", "dkd", "nkd", "binary_kl_norm", "rkd", *OPTIONS])
def test_every_method_resumes_to_the_bit(data: GlyphData, tmp_path: Path, name: str) -> None:
    batches = list(data.train_loader(32, 0, CPU))[:4]

    def start(**options: Any) -> tuple[Method, Callable[[], FitResult]]:
        teacher, student = network(data, 4, 1), network(data)
        method = find_method(name)(student, teacher, example=batches[0][0][:2], **OPTIONS.get(name, {}))
        optimizer = torch.optim.SGD(method.parameters(), lr=0.05, momentum=0.9)
        shared = {"epochs": 3, "optimizer": optimizer, "progress": False, "clip_norm": 5.0}
        return method, lambda: fit_method(method, batches, batches, **shared, **options)

    whole, go = start()
    expected = go().history
    path = tmp_path / "last.pt"
    _, go = start(watcher=StopAfter(1, path))
    with pytest.raises(KeyboardInterrupt):
        go()
    torch.rand(7)
    resumed, go = start(resume=load_checkpoint(path, remedy=""))
    got = go().history
    assert whole.state_dict().keys() == resumed.state_dict().keys()
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    assert without_time(expected) == without_time(got)
    assert set(expected[0]["seconds"]) == set(PARTS)
    uses_teacher = name != "cross_entropy"
    assert (expected[0]["seconds"]["teacher"] > 0) == uses_teacher
    for record in expected:
        assert record["loss"] == pytest.approx(sum(record["terms"].values()), rel=1e-4)
    assert not whole.student._forward_hooks


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_lost(data: GlyphData) -> None:
    student = network(data)
    calls = 0

    def loss(logits: Tensor, teacher: Any, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        nonlocal calls
        calls += 1
        value = F.cross_entropy(logits, target) * (math.nan if calls == 3 else 1.0)
        return value, {"ce": value.detach()}

    with pytest.raises(NonFiniteLossError, match="epoch 1, step 3: loss nan, ce nan"):
        run(data, student, None, loss=loss)
    assert calls == 3
    assert all(parameter.isfinite().all() for parameter in student.parameters())


def test_the_meter_finds_a_bad_step_late_but_names_it() -> None:
    meter = LossMeter(CPU, epoch=4, interval=20)  # as on a GPU
    logits, target = torch.eye(4), torch.tensor([0, 1, 2, 0])
    for value in (1.0, 3.0, math.inf, 2.0):
        meter.add(torch.tensor(value), {"kd": torch.tensor(value)}, logits, target)
        meter.end_step()
    with pytest.raises(NonFiniteLossError, match="epoch 4, step 3: loss inf, kd inf"):
        meter.drain()


def test_a_bad_step_is_named_where_a_later_one_was_left_out() -> None:
    meter = LossMeter(CPU, interval=20)
    for value in (1.0, math.nan, None, 2.0):
        if value is None:
            meter.skip_step()
            continue
        meter.add(torch.tensor(value), {}, torch.eye(4), torch.tensor([0, 1, 2, 0]))
        meter.end_step()
    with pytest.raises(NonFiniteLossError, match="step 2"):
        meter.drain()


@pytest.mark.parametrize("log_every", [1, 100])
def test_the_batch_of_a_loss_that_is_not_finite_is_that_batch(log_every: int) -> None:
    """Read again from a loader that draws its order from torch's global generator."""
    given: list[Any] = []

    class Keeps(Watcher):
        def not_finite(self, error: NonFiniteLossError, batch: Any) -> None:
            given.append(batch)

    images = torch.randn(512, 3, 8, 8)
    images[5] = math.nan
    loader = DataLoader(TensorDataset(images, torch.randint(0, 7, (512,))), 16, shuffle=True)
    method = CrossEntropy(nn.Sequential(nn.Flatten(), nn.Linear(192, 7)))
    with pytest.raises(NonFiniteLossError):
        fit_method(method, loader, epochs=1, log_every=log_every, watcher=Keeps())
    ((batch, _),) = given
    assert batch.isnan().any()


def test_the_meter_weights_by_rows() -> None:
    meter = LossMeter(CPU)
    meter.add(torch.tensor(1.0), {"ce": torch.tensor(2.0)}, torch.eye(3), torch.tensor([0, 1, 0]))
    meter.end_step()
    meter.add(torch.tensor(5.0), {"ce": torch.tensor(6.0)}, torch.eye(3)[:1], torch.tensor([0]))
    meter.end_step()
    assert meter.loss == pytest.approx(2.0)
    assert meter.terms == pytest.approx({"ce": 3.0})
    assert meter.accuracy == pytest.approx(3 / 4)


def test_the_training_accuracy_is_of_rows_with_a_label() -> None:
    meter = LossMeter(CPU)
    for target in ([0, -100, 2, 0], [-100, -100, -100, -100]):
        meter.add(torch.tensor(1.0), {}, torch.eye(4), torch.tensor(target))
        meter.end_step()
    assert (meter.rows, meter.accuracy) == (8, pytest.approx(2 / 3))
    resumed = LossMeter(CPU)
    resumed.load_state(meter.state())
    assert resumed.accuracy == meter.accuracy
    # The state of a run that was stopped before labelled rows were counted.
    earlier = {name: value for name, value in meter.state().items() if name != "_labelled"}
    resumed.load_state(earlier)
    assert resumed.accuracy == pytest.approx(2 / 8)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_last_batch_may_be_of_one_row(variant: str) -> None:
    method = make_method(variant)
    before = {key: value.clone() for key, value in method.state_dict().items()}
    result = fit_method(method, Loader(17, 16), Loader(5), epochs=2, progress=False)
    assert all(math.isfinite(value) for value in result.last["terms"].values())
    assert all(value.isfinite().all() for value in method.state_dict().values())
    assert any(not torch.equal(before[key], value) for key, value in method.state_dict().items())


def test_loaders_are_told_the_epoch(data: GlyphData) -> None:
    images, target = next(iter(data.train_loader(32, 0, CPU)))

    class Sampler:
        def __init__(self) -> None:
            self.epochs: list[int] = []

        def set_epoch(self, epoch: int) -> None:
            self.epochs.append(epoch)

    class Loader:
        sampler = Sampler()

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            yield images, target

    loader = Loader()
    fit(network(data), None, loader, loader, loss=labels_alone, epochs=3, progress=False)
    assert loader.sampler.epochs == [0, 1, 2]


def test_plain_iterables_and_their_faults(data: GlyphData) -> None:
    batches = list(data.train_loader(32, 0, CPU))
    student = network(data)

    def go(train: Any, val: Any = batches, loss: Any = labels_alone) -> FitResult:
        return fit(student, None, train, val, loss=loss, epochs=2, progress=False)

    assert len(go(batches).history) == 2
    assert student.training
    with pytest.raises(TrainError, match="no batch in epoch 1"):
        go([])
    with pytest.raises(TrainError, match="but there are 2 epochs; a generator can be iterated once"):
        go(batch for batch in batches)
    with pytest.raises(TrainError, match="validation loader"):
        go(batches, [])
    with pytest.raises(TrainError, match="does not depend on student_logits"):
        go(batches, loss=lambda s, t, y: torch.zeros(()))
    with pytest.raises(TrainError, match="scalar"):
        go(batches, loss=lambda s, t, y: s)
    with pytest.raises(ValueError, match="epochs"):
        fit(student, None, batches, batches, loss=labels_alone, epochs=0)
    with pytest.raises(ValueError, match="scheduler_interval"):
        fit(student, None, batches, batches, loss=labels_alone, epochs=1, scheduler_interval="batch")


def test_bfloat16_networks(data: GlyphData) -> None:
    dtypes = set()

    def loss(student: Tensor, teacher: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        dtypes.update((student.dtype, teacher.dtype))
        return KD(student, teacher, target)

    result = run(data, network(data), network(data, 4, 1), loss=loss, epochs=1, precision="bfloat16")
    assert dtypes == {torch.bfloat16}
    assert math.isfinite(result.last["loss"])


def test_evaluate_keeps_modes(data: GlyphData) -> None:
    student = network(data).train()
    student.stages[1].eval()
    modes = [module.training for module in student.modules()]
    before = {key: value.clone() for key, value in student.state_dict().items()}
    evaluate(student, data.val_loader(CPU), device="cpu")
    assert [module.training for module in student.modules()] == modes
    for key, value in student.state_dict().items():
        assert torch.equal(value, before[key])


def test_fit_is_at_the_top_level() -> None:
    assert fastkd.fit is fit


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(data: GlyphData) -> None:
    device = torch.device("cuda")
    student, teacher = network(data), network(data, 4, 1)
    result = fit(
        student,
        teacher,
        data.train_loader(16, 0, device),
        data.val_loader(device),
        loss=KD,
        epochs=2,
        device=device,
        progress=False,
    )
    assert next(student.parameters()).is_cuda
    assert result.last["loss"] < result.history[0]["loss"]
    for record in result.history:
        assert all(record["seconds"][part] > 0 for part in PARTS)
