"""`fastkd export`: the student of a run as safetensors, state dict, torch.export program or ONNX model.

Each file has a description (``run/about.py``): in the header of safetensors, in the metadata of ONNX, among
the extra files of torch.export, and beside every file as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import logging
import os
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
from fastkd.files.paths import user_path
from fastkd.files.plain import load_plain
from fastkd.files.regular import read_regular
from fastkd.train.display.console import make_console
from fastkd.train.run.about import About
from fastkd.train.run.exported import load_exported
from fastkd.train.run.folder import write_text
from fastkd.train.run.safetensors_file import KEY, SUFFIX, save_safetensors
from fastkd.train.run.student import read_student

SUFFIXES = {"safetensors": SUFFIX, "state_dict": ".pt", "torch-export": ".pt2", "onnx": ".onnx"}
EXTRA_FILE = f"{KEY}.json"  # of torch.export
_TOLERANCE = 1e-3  # relative to the largest output; allows for another order of summation


class ExportError(TrainError):
    """The run cannot be exported, the file exists, or the exported network's outputs differ."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=user_path, metavar="RUN", help="a run folder")
    parser.add_argument("--format", choices=list(SUFFIXES), default="safetensors")
    parser.add_argument("--weights", choices=["best", "last"], default="best", help="of which epoch")
    parser.add_argument(
        "--to", type=user_path, metavar="FILE", help="default: RUN/student.safetensors, .pt, .pt2 or .onnx"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    path = args.to or args.folder / f"student{SUFFIXES[args.format]}"
    beside = path.with_suffix(".json")
    if path == beside:
        raise ExportError(f"--to {path}: that is the name of the description; expected another suffix")
    other = {suffix: form for form, suffix in SUFFIXES.items()}.get(path.suffix, args.format)
    if other != args.format:
        raise ExportError(
            f"--to {path}: {path.suffix} is the suffix of --format {other}; expected "
            f"{SUFFIXES[args.format]} for --format {args.format}"
        )
    if os.path.lexists(path):
        raise ExportError(f"{path} already exists and is not overwritten; choose another file with --to")
    model, about = read_student(args.folder, args.weights)
    text = about.to_json()
    described = _is(beside, text)
    difference = export(model, about, args.format, path)
    if not described:
        write_text(beside, text)
    size = path.stat().st_size / 1e6
    if difference is None:
        result = "not verified: onnxruntime is not installed"
    elif difference == 0:
        result = "verified: its outputs are bit-identical to the network's"
    else:
        result = f"verified: its outputs differ from the network's by at most {difference:.1e}"
    measured = {
        name: value
        for name in ("val_accuracy", "val_top5_accuracy")
        if (value := getattr(about.run, name)) is not None
    }
    names = {"val_accuracy": "validation accuracy", "val_top5_accuracy": "top-5"}
    accuracy = "".join(f", {names[key]} {value:.2%}" for key, value in measured.items())
    shape = _shape_of(about)
    make_console(stderr=args.json).print(
        f"{path} ({size:.1f} MB) and {beside.name}, {args.weights} epoch{accuracy}, input {tuple(shape)}, "
        f"{about.network.num_classes:,} classes; {result}",
        soft_wrap=True,
    )
    if args.json:
        print_json(
            {
                "file": str(path), "description": str(beside), "format": args.format, "weights": args.weights,
                "input": shape, "largest_difference": difference, **measured,
            }
        )  # fmt: skip
    return 0


def _is(beside: Path, text: str) -> bool:
    """Whether the description is there already. Raises ``ExportError`` for another file of that name."""
    if not os.path.lexists(beside):
        return False
    with contextlib.suppress(OSError):
        if read_regular(beside) == text.encode():
            return True
    raise ExportError(
        f"{beside} already exists, is not the description of this export, and is not overwritten; choose "
        "another file with --to"
    )


def _shape_of(about: About) -> list[int]:
    network = about.network
    return [network.channels, network.size, network.size]


def export(model: nn.Module, about: About, form: str, path: Path) -> float | None:
    """Write ``model`` to ``path`` and load it again; returns the largest difference of the outputs.

    Returns None if onnxruntime is needed to load it and is not installed. The number of images is dynamic.
    Raises ``ExportError`` and leaves no file if the outputs differ too much.
    """
    shape = _shape_of(about)
    example = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)) * 4 - 2
    probe = torch.rand(3, *shape, generator=torch.Generator().manual_seed(1)) * 4 - 2
    if form in ("torch-export", "onnx"):
        model = _LogitsOf(model)
    with torch.no_grad():
        expected = logits_of(model, probe, "student")
    difference: float | None = None

    def write(temporary: Path) -> None:
        nonlocal difference
        saved, again = _FORMATS[form]
        with _named(form, about.network.name):
            saved(model, example, about.to_json(), temporary)
        outputs = again(model, probe, temporary)
        if outputs is None:
            return
        difference = (outputs - expected).abs().max().item()
        if not difference <= _TOLERANCE * expected.abs().max().item():
            raise ExportError(
                f"the exported network's outputs differ by {difference:.3g}; nothing was written"
            )

    if form == "safetensors":
        for key, value in model.state_dict().items():
            if not isinstance(value, Tensor):
                raise ExportError(
                    f"--format safetensors: {key} is a {type(value).__name__}, but the format holds tensors "
                    "only; expected --format state_dict for this network"
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


def _save_safetensors(model: nn.Module, example: Tensor, about: str, path: Path) -> None:
    save_safetensors(path, model, about)


def _run_safetensors(model: nn.Module, probe: Tensor, path: Path) -> Tensor:
    again, _ = load_exported(path, copy.deepcopy(model))
    return _outputs_of(again, probe)


def _save_state_dict(model: nn.Module, example: Tensor, about: str, path: Path) -> None:
    # Through memory: on a full disk torch's own writer reports no reason.
    buffer = io.BytesIO()
    # The model is on the CPU. An extra state may be no tensor.
    torch.save(dict(model.state_dict()), buffer)
    path.write_bytes(buffer.getbuffer())


def _run_state_dict(model: nn.Module, probe: Tensor, path: Path) -> Tensor:
    again = copy.deepcopy(model)
    again.load_state_dict(load_plain(path))
    return _outputs_of(again, probe)


def _outputs_of(again: nn.Module, probe: Tensor) -> Tensor:
    with torch.no_grad():
        outputs: Tensor = named_logits(again(probe))
    return outputs


def _save_program(model: nn.Module, example: Tensor, about: str, path: Path) -> None:
    with _quiet():
        program = torch.export.export(model, (example,), dynamic_shapes=_FREE_BATCH)
        buffer = io.BytesIO()
        torch.export.save(program, buffer, extra_files={EXTRA_FILE: about})
    path.write_bytes(buffer.getbuffer())


def _run_program(model: nn.Module, probe: Tensor, path: Path) -> Tensor:
    with torch.no_grad():
        outputs: Tensor = torch.export.load(path).module()(probe)
    return outputs


def _save_onnx(model: nn.Module, example: Tensor, about: str, path: Path) -> None:
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
    program.model.metadata_props[KEY] = about
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
def _named(form: str, network: str) -> Iterator[None]:
    """Turn what torch's exporters raise for a network that they cannot trace into ``ExportError``."""
    try:
        yield
    except (TrainError, OSError, MemoryError):
        raise
    except Exception as error:  # torch's, which differ by release, or the network's own
        first: BaseException = error
        while first.__cause__ is not None:  # the ONNX exporter's is about its steps
            first = first.__cause__
        reason = next(filter(None, map(str.strip, str(first).splitlines())), "")
        raise ExportError(
            f"--format {form}: torch cannot export {network}: {type(first).__name__}: {reason}; "
            "--format safetensors and --format state_dict work for any network"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporters' progress messages, graphs and warnings about operators of other packages."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        void = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stdout(void), contextlib.redirect_stderr(void):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


_FREE_BATCH: Any = ({0: torch.export.Dim.DYNAMIC},)
_Save = Callable[[nn.Module, Tensor, str, Path], None]
_Run = Callable[[nn.Module, Tensor, Path], "Tensor | None"]
_FORMATS: dict[str, tuple[_Save, _Run]] = {
    "safetensors": (_save_safetensors, _run_safetensors),
    "state_dict": (_save_state_dict, _run_state_dict),
    "torch-export": (_save_program, _run_program),
    "onnx": (_save_onnx, _run_onnx),
}
