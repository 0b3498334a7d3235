"""`fastkd export`: the student of a run as a plain state dict, a torch.export program or an ONNX model."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.command import add_json, print_json
from fastkd.distill.taps import logits_of, named_logits
from fastkd.errors import TrainError
from fastkd.files.atomic import make_folder, write_atomically
from fastkd.files.regular import read_regular
from fastkd.models import build_model
from fastkd.recipe.schema import load_recipe
from fastkd.train.display.console import make_console
from fastkd.train.evaluation import ACCURACIES
from fastkd.train.run.checkpoint import load_checkpoint
from fastkd.train.run.weights import state_dict_in
from fastkd.train.state_dicts import fill

SUFFIXES = {"state_dict": ".pt", "torch-export": ".pt2", "onnx": ".onnx"}
_TOLERANCE = 1e-3  # relative to the largest output; allows for another order of summation


class ExportError(TrainError):
    """The run cannot be exported, the file exists, or the exported network's outputs differ."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--format", choices=list(SUFFIXES), default="state_dict")
    parser.add_argument("--weights", choices=["best", "last"], default="best", help="of which epoch")
    parser.add_argument("--to", type=Path, metavar="FILE", help="default: RUN/student.pt, .pt2 or .onnx")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    path = args.to or args.folder / f"student{SUFFIXES[args.format]}"
    if path.exists():
        raise ExportError(f"{path} already exists and is not overwritten; choose another file with --to")
    model, shape = load_student(args.folder, args.weights)
    difference = export(model, shape, args.format, path)
    size = path.stat().st_size / 1e6
    if difference is None:
        result = "not verified: onnxruntime is not installed"
    elif difference == 0:
        result = "verified: its outputs are bit-identical to the network's"
    else:
        result = f"verified: its outputs differ from the network's by at most {difference:.1e}"
    measured = accuracies_of(args.folder, args.weights)
    names = {"val_accuracy": "validation accuracy", "val_top5_accuracy": "top-5"}
    accuracy = "".join(f", {names[key]} {value:.2%}" for key, value in measured.items())
    make_console(stderr=args.json).print(
        f"{path} ({size:.1f} MB), {args.weights} epoch{accuracy}, input {tuple(shape)}; {result}",
        soft_wrap=True,
        markup=False,
    )
    if args.json:
        print_json(
            {
                "file": str(path), "format": args.format, "weights": args.weights, "input": shape,
                "largest_difference": difference, **measured,
            }
        )  # fmt: skip
    return 0


def accuracies_of(folder: Path, which: str) -> dict[str, float]:
    """Validation accuracies of the best or the last epoch, as far as the run's metrics say."""
    try:
        lines = read_regular(folder / "metrics.jsonl").decode("utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        chosen = records[-1] if which == "last" else max(records, key=lambda record: record["val_accuracy"])
        return {key: float(chosen[key]) for key in ACCURACIES if key in chosen}
    except (OSError, ValueError, IndexError, KeyError, TypeError, RecursionError):
        return {}  # the weights are what was asked for


def load_student(folder: Path, which: str = "best") -> tuple[nn.Module, list[int]]:
    """The student of a run in eval mode, and the shape of one input. Raises ``TrainError``."""
    if (folder / "seeds.json").exists():
        raise ExportError(f"{folder} is a group of seeds; name one of its runs: {folder}/seed-…")
    if not (folder / "recipe.yaml").is_file():
        raise ExportError(f"{folder} is not a run folder (it has no recipe.yaml)")
    _, recipe = load_recipe(str(folder / "recipe.yaml"))
    remedy = "a run writes it after its first epoch"
    facts = load_checkpoint(folder / "best.pt", remedy=remedy)
    if "input" not in facts:
        raise ExportError(
            f"{folder / 'best.pt'} lacks the shape of its inputs: an older version of fastkd wrote it"
        )
    content = facts if which == "best" else load_checkpoint(folder / "last.pt", remedy=remedy)
    shape: list[int] = facts["input"]
    if not (
        isinstance(shape, list)
        and len(shape) == 3
        and all(isinstance(size, int) and size > 0 for size in (*shape, facts.get("num_classes")))
    ):
        raise ExportError(f"{folder / 'best.pt'} lacks a valid input shape or number of classes")
    student = recipe.student
    try:
        model = build_model(
            student.name,
            num_classes=facts["num_classes"],
            width=student.width,
            channels=shape[0],
            size=shape[-1],
        )
    except ValueError as error:
        raise ExportError(f"{folder}: {error}") from None
    weights = state_dict_in(content, model)
    if weights is None:
        raise ExportError(f"{folder / which}.pt holds no state dict of tensors")
    fill(model, weights, f"{folder / which}.pt", "the recipe and the weights of a run must match")
    return model.eval(), shape


def export(model: nn.Module, shape: list[int], form: str, path: Path) -> float | None:
    """Write ``model`` to ``path`` and load it again; returns the largest difference of the outputs.

    Returns None if onnxruntime is needed to load it and is not installed. The number of images is dynamic.
    Raises ``ExportError`` and leaves no file if the outputs differ too much.
    """
    example = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)) * 4 - 2
    probe = torch.rand(3, *shape, generator=torch.Generator().manual_seed(1)) * 4 - 2
    if form != "state_dict":
        model = _LogitsOf(model)
    with torch.no_grad():
        expected = logits_of(model, probe, "student")
    difference: float | None = None

    def write(temporary: Path) -> None:
        nonlocal difference
        saved, again = _FORMATS[form]
        saved(model, example, temporary)
        outputs = again(model, probe, temporary)
        if outputs is None:
            return
        difference = (outputs - expected).abs().max().item()
        if not difference <= _TOLERANCE * expected.abs().max().item():
            raise ExportError(
                f"the exported network's outputs differ by {difference:.3g}; nothing was written"
            )

    make_folder(path.parent)
    write_atomically(path, write)
    return difference


class _LogitsOf(nn.Module):
    """Returns the logits as one tensor, also for a student whose output is a mapping."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = named_logits(self.model(images))
        return logits


def _save_state_dict(model: nn.Module, example: Tensor, path: Path) -> None:
    # Through memory: on a full disk torch's own writer reports no reason.
    buffer = io.BytesIO()
    torch.save({key: value.cpu() for key, value in model.state_dict().items()}, buffer)
    path.write_bytes(buffer.getbuffer())


def _run_state_dict(model: nn.Module, probe: Tensor, path: Path) -> Tensor:
    weights = torch.load(path, weights_only=True)
    with torch.no_grad():
        outputs: Tensor = named_logits(torch.func.functional_call(model, weights, (probe,), strict=True))
    return outputs


def _save_program(model: nn.Module, example: Tensor, path: Path) -> None:
    with _quiet():
        program = torch.export.export(model, (example,), dynamic_shapes=_FREE_BATCH)
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
    path.write_bytes(buffer.getbuffer())


def _run_program(model: nn.Module, probe: Tensor, path: Path) -> Tensor:
    with torch.no_grad():
        outputs: Tensor = torch.export.load(path).module()(probe)
    return outputs


def _save_onnx(model: nn.Module, example: Tensor, path: Path) -> None:
    try:
        import onnxscript  # noqa: F401  # needed by torch's exporter
    except ImportError:
        raise ExportError('ONNX needs onnx and onnxscript: pip install "fastkd[onnx]"') from None
    with _quiet():
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            dynamic_shapes=_FREE_BATCH,
            input_names=["images"],
            output_names=["logits"],
            verbose=False,
        )
    assert program is not None
    program.save(str(path), external_data=False)  # a single file, which can be renamed


def _run_onnx(model: nn.Module, probe: Tensor, path: Path) -> Tensor | None:
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (outputs,) = session.run(None, {"images": probe.numpy()})
    return torch.from_numpy(outputs)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporter's progress messages and warnings about operators of other packages."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


_FREE_BATCH: Any = ({0: torch.export.Dim.DYNAMIC},)
_Save = Callable[[nn.Module, Tensor, Path], None]
_Run = Callable[[nn.Module, Tensor, Path], "Tensor | None"]
_FORMATS: dict[str, tuple[_Save, _Run]] = {
    "state_dict": (_save_state_dict, _run_state_dict),
    "torch-export": (_save_program, _run_program),
    "onnx": (_save_onnx, _run_onnx),
}
