"""Options of the loop, one by one, and the overhead of the loop."""

from __future__ import annotations

import math
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastkd.cli import main
from fastkd.distill import CrossEntropy
from fastkd.errors import RecipeError
from fastkd.recipe.schema import load_recipe
from fastkd.train import Watcher, evaluate, fit, fit_method
from fastkd.train.batches import Batches, micro_batches
from fastkd.train.display.console import ConsoleProgress, make_console
from fastkd.train.meters import LossMeter
from fastkd.train.optimization import build_optimizer, build_scheduler
from fastkd.train.run.checkpoint import load_checkpoint
from fastkd.train.run.folder import averaged_weights

from .tiny import CLASSES, Loader, Net, Notes, make_method

pytestmark = pytest.mark.usefixtures("workplace")

CPU = torch.device("cpu")
TINY = ["data.synthetic=60", "student.width=2", "train.batch_size=16", "train.device=cpu", "train.threads=1"]
STUDENT = ["fashion-mnist/student", *TINY, "train.epochs=3"]


def trained(variant: str = "kd", loader: Any = None, *, net: Any = None, **options: Any) -> dict[str, Tensor]:
    method = make_method(variant, **(net or {}))
    optimizer = torch.optim.SGD(method.parameters(), lr=0.05)
    options = {"epochs": 1, "optimizer": optimizer, "progress": False, **options}
    fit_method(method, loader or Loader(), Loader(17, 4, shuffle=False), **options)
    return {key: value.clone() for key, value in method.state_dict().items()}


def close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> None:
    for key, value in a.items():
        torch.testing.assert_close(value, b[key], rtol=tolerance, atol=tolerance, msg=lambda m, k=key: k + m)


@pytest.mark.parametrize(
    ("variant", "precision"), [("kd", "bfloat16"), ("dhkd", "float16"), ("mhkd", "float16")]
)
def test_half_precision_goes_the_same_way(variant: str, precision: str) -> None:
    close(trained(variant), trained(variant, precision=precision), 0.05)


@pytest.fixture
def fresh_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("fresh_memory_is_nan")
def test_float16_whose_first_step_overflows() -> None:
    """Torch's fused SGD took its momentum from memory that the step left out had not written."""
    weights = []
    for fused in (True, False):
        student = make_method("kd").student
        optimizer = torch.optim.SGD(student.parameters(), 0.1, momentum=0.9, fused=fused)
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
        options: dict[str, Any] = {"optimizer": optimizer, "scheduler": scheduler}
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # such as torch's of a scheduler before its optimizer
            fit(student, None, Loader(), loss=steep, epochs=2, precision="float16", **options)
        weights.append(student.state_dict())
    for key, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][key], msg=lambda m, k=key: f"{k}: {m}")


def steep(student: Tensor, teacher: Tensor | None, target: Tensor) -> Tensor:
    return 32 * nn.functional.cross_entropy(student, target)


def test_the_teacher_in_a_format_of_its_own() -> None:
    dtypes = []
    for precision, teacher in (("float32", "bfloat16"), ("bfloat16", "float32"), ("bfloat16", None)):
        method = make_method("kd")
        method.teacher.register_forward_hook(lambda *a: dtypes.append((a[2].dtype, a[2].requires_grad)))
        method.student.register_forward_hook(lambda *a: dtypes.append(a[2].dtype))
        options = {"epochs": 1, "precision": precision, "teacher_precision": teacher, "progress": False}
        fit_method(method, [next(iter(Loader()))], [next(iter(Loader()))], **options)
    half, full = torch.bfloat16, torch.float32
    # Teacher and student in training, then the student in validation.
    trial, rest = dtypes[::4], [dtypes[i] for i in range(12) if i % 4]
    assert trial == [full, half, half]  # of validation, before training
    assert rest == [(half, False), full, full, (full, False), half, half, (half, False), half, half]


def test_channels_last_and_compiled_networks_are_the_same_function() -> None:
    expected = trained("kd")
    close(trained("kd", channels_last=True), expected, 1e-4)
    close(trained("kd", compile="aot_eager"), expected, 1e-4)


def test_networks_that_are_looked_into_stay_eager() -> None:
    watcher = Notes()
    close(trained("dhkd", compile="aot_eager", watcher=watcher), trained("dhkd"), 1e-4)
    compiled, offset = watcher.notes
    assert compiled == "train.compile: the student stays eager, dhkd reads fc:input"
    assert offset.startswith("teacher's logits in the first batch: row mean")


def test_accumulation_is_the_same_step() -> None:
    plain = {"norm": False}
    close(trained("kd", net=plain, accumulate=3), trained("kd", net=plain), 1e-5)


def test_micro_batches() -> None:
    batch = (torch.arange(10.0), torch.arange(10))
    for count in (1, 2, 3, 4, 5, 100):
        parts = micro_batches(batch, count)
        assert torch.cat([part[0] for part, _ in parts]).tolist() == batch[0].tolist()
        assert len(parts) <= count
        assert sum(1 / divisor for _, divisor in parts) == pytest.approx(1)
        assert all(len(part[1]) >= 1 for part, _ in parts)


def test_the_average_is_torchs_formula_and_what_is_validated() -> None:
    class Keeps(Watcher):
        def epoch_done(self, record: Any, state: Any) -> None:
            self.record, self.state = record, state()

    watcher = Keeps()
    method = make_method("kd")
    weights: list[Tensor] = []
    optimizer = torch.optim.SGD(method.parameters(), lr=0.05)
    optimizer.register_step_post_hook(lambda *_: weights.append(method.student.fc.weight.detach().clone()))
    val = Loader(17, 4, shuffle=False)
    result = fit_method(method, Loader(), val, epochs=1, optimizer=optimizer, ema=0.5, watcher=watcher)
    expected = weights[0]
    for one in weights[1:]:
        expected = 0.5 * expected + 0.5 * one
    average = averaged_weights(watcher.state["ema"])
    torch.testing.assert_close(average["fc.weight"], expected)
    model = Net(4)
    model.load_state_dict(average)
    assert isinstance(result.average, Net)
    for network in (model, result.average):
        assert evaluate(network, val, device=CPU) == tuple(
            result.last[k] for k in ("val_accuracy", "val_loss")
        )
    assert watcher.record["student_accuracy"] == evaluate(method.student, val, device=CPU)[0]
    assert fit_method(method, Loader(), val, epochs=1, progress=False).average is None


def test_the_average_keeps_tables_of_whole_numbers() -> None:
    class Permuted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("order", torch.arange(192).flip(0))
            self.fc = nn.Linear(192, CLASSES)

        def forward(self, images: Tensor) -> Tensor:
            return self.fc(images.flatten(1)[:, self.order])

    method = CrossEntropy(Permuted())
    average = fit_method(method, Loader(), epochs=2, ema=0.9, progress=False).average
    assert average is not None
    assert average.order.tolist() == list(range(191, -1, -1))


def test_uint8_images_are_normalised_on_the_device() -> None:
    class Bytes(list):
        mean, std = (0.5, 0.25, 0.0), (0.5, 1.0, 2.0)

    images = torch.randint(0, 256, (4, 3, 2, 2), dtype=torch.uint8)
    for batches in (Bytes([(images, torch.arange(4))]), [(images, torch.arange(4))]):
        ((moved, _),) = Batches(batches, CPU, even=True).start()
        expected = images.double() / 255
        if isinstance(batches, Bytes):
            mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (batches.mean, batches.std))
            expected = (expected - mean) / std
        torch.testing.assert_close(moved.double(), expected, rtol=1e-6, atol=1e-6)


def test_a_loader_may_start_anywhere_itself() -> None:
    asked = []

    class Native(Loader):
        def batches(self, start: int, rank: int, world: int, even: bool) -> Any:
            asked.append((start, rank, world, even))
            return iter(list(self)[start:])

    whole = list(Batches(Loader(), CPU, even=True).start(2))
    for got, expected in zip(Batches(Native(), CPU, even=True).start(2), whole, strict=True):
        assert torch.equal(got[0], expected[0])
    assert asked == [(2, 0, 1, True)]


@pytest.mark.parametrize("schedule", ["cosine", "steps", "constant"])
def test_warm_up(schedule: str) -> None:
    overrides = [f"train.schedule={schedule}", "train.milestones=[2]", "train.lr=1.0", "train.epochs=4"]

    def rates(warmup: float) -> list[float]:
        _, recipe = load_recipe("fashion-mnist/student", [*overrides, f"train.warmup_epochs={warmup}"])
        optimizer = build_optimizer(CrossEntropy(nn.Linear(2, 2)), recipe.train)
        scheduler = build_scheduler(optimizer, recipe.train, 10)
        found = []
        for _ in range(40):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
        return found

    plain, warmed = rates(0), rates(0.5)
    growth = [(step + 1) / 6 for step in range(5)]
    for step, (with_warmup, without) in enumerate(zip(warmed, plain, strict=True)):
        assert with_warmup == pytest.approx(without * (growth[step] if step < 5 else 1), rel=1e-3)


@pytest.mark.parametrize("schedule", ["one_cycle", "cosine"])
def test_the_momentum_is_the_given_one(schedule: str) -> None:
    overrides = [f"train.schedule={schedule}", "train.optimizer=sgd", "train.momentum=0.3"]
    _, recipe = load_recipe("fashion-mnist/student", overrides)
    optimizer = build_optimizer(CrossEntropy(nn.Linear(2, 2)), recipe.train)
    scheduler = build_scheduler(optimizer, recipe.train, 10)
    for _ in range(10):
        optimizer.step()
        scheduler.step()
        assert optimizer.param_groups[0]["momentum"] == 0.3


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.warmup_epochs=1", "one_cycle has a warm-up of its own"),
        ("train.schedule=steps", "milestones: schedule steps needs epochs"),
        ("train.checkpoint_every=often", "such as 15min"),
        ("train.checkpoint_every=0", "expected at least 1"),
        ("train.accumulate=1000", "more than batch_size"),
        ("train.ema=1.0", "less than 1"),
        ("train.nonfinite=ignore", "'stop' or 'skip'"),
        ("train.precision=float8", "'float16'"),
    ],
)
def test_values_that_are_refused(override: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe("fashion-mnist/student", [override])


def test_what_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *STUDENT, "train.keep_every=2", "train.ema=0.5"]) == 0
    (run,) = Path("runs").iterdir()
    assert {path.name for path in run.glob("*.pt")} == {"last.pt", "previous.pt", "best.pt", "epoch-0002.pt"}
    for name, epochs in (("last.pt", 3), ("previous.pt", 2), ("epoch-0002.pt", 2)):
        assert len(load_checkpoint(run / name, remedy="")["history"]) == epochs
    best = load_checkpoint(run / "best.pt", remedy="")
    last = load_checkpoint(run / "last.pt", remedy="")
    if best["epoch"] == 3:
        assert torch.equal(best["model"]["head.weight"], last["ema"]["module.head.weight"])
    capsys.readouterr()

    before = {path: path.stat().st_mtime_ns for path in run.iterdir()}
    assert main(["train", "--resume", str(run), "--eval-only"]) == 0
    out = capsys.readouterr().out
    assert "student, best epoch" in out
    assert "student, newest state, averaged" in out
    assert f"{100 * best['val_accuracy']:.2f}" in out
    assert {path: path.stat().st_mtime_ns for path in run.iterdir()} == before


def test_evaluating_nothing_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *STUDENT, "--eval-only"]) == 2
    assert "--eval-only: nothing to validate" in capsys.readouterr().err


def test_resume_without_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *STUDENT, "--resume", "train.seed=3"]) == 0  # none yet: a new run
    assert main(["train", *STUDENT, "train.seed=3", "--resume"]) == 0  # finished: shows its results
    assert main(["train", *STUDENT, "--resume"]) == 0  # another recipe
    first, second = sorted(Path("runs").iterdir())
    assert (first.name[-3:], second.name[-3:]) == ("001", "002")
    out = capsys.readouterr().out.replace("\n", " ")
    assert f"no run of this recipe yet: {first} differs in train.seed: 3 → 0" in out


def test_a_run_is_found_after_it_was_resumed_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *STUDENT]) == 0
    (run,) = Path("runs").iterdir()
    # Resuming writes the recipe with these settings, which the line of a job script does not have.
    assert main(["train", "--resume", str(run), "train.threads=1", "train.log_every=7"]) == 0
    assert main(["train", *STUDENT, "--resume"]) == 0
    assert f"resuming {run}" in capsys.readouterr().out.replace("\n", " ")
    assert list(Path("runs").iterdir()) == [run]
    # But these say how a run is computed: whoever compares them has a run of each.
    assert main(["train", *STUDENT, "train.accumulate=2", "--resume"]) == 0
    assert len(list(Path("runs").iterdir())) == 2


def test_tensorboard_is_asked_for_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert main(["train", *STUDENT, "train.tensorboard=true"]) == 2
    assert "pip install 'fastkd[tensorboard]'" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_tensorboard_has_the_curves() -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main(["train", *STUDENT, "train.tensorboard=true"]) == 0
    (run,) = Path("runs").iterdir()
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("val_accuracy")] == [1, 2, 3]
    assert "terms/ce" in events.Tags()["scalars"]


def test_the_progress_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastkd.train.display.console._LOG_SECONDS", 0.0)
    shown = ConsoleProgress("student", make_console())
    meter = LossMeter(CPU, epoch=2)
    shown.epoch_started(2, 3, 10)
    meter.add(torch.tensor(1.0), {"ce": torch.tensor(1.0)}, torch.eye(4), torch.arange(4))
    meter.end_step()
    time.sleep(0.01)
    shown.batch_done(meter)
    line = capsys.readouterr().out
    assert line.startswith("student epoch 2/3, step 1/10  loss 1.000  train 100.00%")
    assert all(word in line for word in (" img/s", "data 0%", " left"))


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images)


def test_the_loop_costs_less_than_a_millisecond_a_step() -> None:
    """CPU time per step beyond that of the same model, loss and optimizer in a minimal loop."""
    batches = [(torch.randn(4, 8), torch.randint(0, 4, (4,))) for _ in range(300)]

    def prepared() -> tuple[CrossEntropy, torch.optim.Optimizer]:
        method = CrossEntropy(Linear())
        return method, torch.optim.SGD(method.parameters(), lr=0.01)

    def bare() -> float:
        method, optimizer = prepared()
        start = time.process_time()
        for batch in batches:
            optimizer.zero_grad(set_to_none=True)
            method.backward(method(batch))
            optimizer.step()
        return time.process_time() - start

    def looped() -> float:
        method, optimizer = prepared()
        start = time.process_time()
        fit_method(method, batches, batches[:1], epochs=1, optimizer=optimizer, progress=False)
        return time.process_time() - start

    bare(), looped()
    extra = statistics.median(looped() - bare() for _ in range(5)) / len(batches)
    assert math.isfinite(extra)
    assert extra < 1e-3, f"{extra * 1e6:.0f} µs a step"
