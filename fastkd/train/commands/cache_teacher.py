"""`fastkd cache-teacher`: store the teacher's logits for every epoch's images."""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from fastkd.data.data import Data, load_data
from fastkd.data.order import IndexedLoader
from fastkd.distill.method import total_of
from fastkd.distill.taps import eval_mode, logits_of
from fastkd.errors import RecipeError
from fastkd.recipe.schema import Recipe, load_recipe
from fastkd.train.display.console import make_console
from fastkd.train.distributed import number
from fastkd.train.run.build import build_method, build_network, resolve_device, try_method
from fastkd.train.run.folder import write_json
from fastkd.train.run.lock import locked
from fastkd.train.run.teacher_cache import CachedLoader, CacheWriter, TeacherCache, wanted_facts
from fastkd.train.run.teachers import find_teacher


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="+", metavar="RECIPE [key=value …]", help="as for `fastkd train`")
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="a new folder for the cache")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--top-k", type=int, default=16, metavar="K", help="classes to keep (default: 16)")
    form.add_argument("--all", action="store_true", help="keep all classes")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), metavar="FOLDER", help="where a trained teacher is stored"
    )


def run(args: argparse.Namespace) -> int:
    processes = number("WORLD_SIZE", 1, least=1)
    if processes > 1:
        raise RecipeError(
            f"cache-teacher runs in one process, but WORLD_SIZE is {processes}: start it without torchrun"
        )
    console = make_console()
    _, recipe = load_recipe(args.words[0], args.words[1:])
    device = resolve_device(recipe.train.device)
    data = load_data(recipe.data)
    console.print(f"data: {data.describe()}", markup=False)
    facts = wanted_facts(recipe, data)
    assert recipe.teacher is not None
    if recipe.teacher.cache is not None:
        raise RecipeError("teacher.cache is given, but this command creates a cache")
    if not args.all and args.top_k < 1:
        raise RecipeError(f"--top-k {args.top_k}: expected at least 1")
    facts["top_k"] = None if args.all or args.top_k >= data.num_classes else args.top_k
    if args.to.exists():  # before a teacher is trained
        raise RecipeError(
            f"--to {args.to}: it already exists; a cache is never overwritten: choose a new folder"
        )
    for note in try_method(recipe, data, device, cached=True):
        console.print(note, markup=False)
    teacher = find_teacher(recipe.teacher, data, args.runs, device, console)
    facts["val_accuracy"] = teacher.summary["val_accuracy"]
    console.print(f"teacher: {facts['val_accuracy']:.2%}, {teacher.summary['checkpoint']}", markup=False)
    writer = CacheWriter(args.to, facts)
    try:
        cache = _fill(writer, recipe, data, teacher.model, facts["epochs"], device, console)
    except KeyboardInterrupt:
        console.print("stopped; the same command resumes after the last complete epoch")
        return 130
    report = _report(cache, recipe, data, teacher.model, device)
    write_json(args.to / "report.json", report)
    console.print(
        f"{report['bytes_per_sample']} bytes per sample and epoch, {report['megabytes']:.1f} MB in total\n"
        f"largest relative error of the loss from the cache: {report['loss_difference']:.2e} "
        "(untrained student, first batches)\n"
        f"to train from it: teacher.cache={args.to}",
        markup=False,
        soft_wrap=True,
    )
    return 0


def _fill(
    writer: CacheWriter,
    recipe: Recipe,
    data: Data,
    teacher: nn.Module,
    epochs: int,
    device: torch.device,
    console: Console,
) -> TeacherCache:
    loader: Any = data.train_loader(recipe.train.batch_size, recipe.train.seed, device)
    precision = recipe.train.teacher_precision or recipe.train.precision
    with locked(writer.partial):
        for epoch in writer.missing_epochs():
            began = time.perf_counter()
            writer.write_epoch(epoch, _logits(loader, epoch, teacher, device, precision))
            seconds = time.perf_counter() - began
            console.print(f"epoch {epoch + 1}/{epochs} cached, {seconds:.1f} s")
    return writer.finish()


@torch.no_grad()
def _logits(
    loader: IndexedLoader, epoch: int, teacher: nn.Module, device: torch.device, precision: str
) -> Iterator[tuple[Tensor, Tensor]]:
    teacher.to(device).eval()
    loader.set_epoch(epoch)
    for images, _, indices in loader.indexed():
        with torch.autocast(device.type, getattr(torch, precision), enabled=precision != "float32"):
            logits = logits_of(teacher, images, "teacher")
        yield indices, logits


def _report(
    cache: TeacherCache, recipe: Recipe, data: Data, teacher: nn.Module, device: torch.device
) -> dict[str, Any]:
    """Size of the cache, and error of the loss on the first batches of the first epoch."""
    torch.manual_seed(recipe.train.seed)
    student = build_network(recipe.student, data).to(device)
    method = build_method(recipe, student, teacher, data, device)
    loader: Any = data.train_loader(recipe.train.batch_size, recipe.train.seed, device)
    differences = []
    with torch.no_grad(), eval_mode(method, teacher):
        for images, target, logits in itertools.islice(CachedLoader(loader, cache), 4):
            exact = total_of(method.loss((images, target))).item()
            cached = total_of(method.loss((images, target, logits))).item()
            differences.append(abs(cached - exact) / max(abs(exact), 1e-12))
    return {
        "bytes_per_sample": cache.bytes_per_sample,
        "megabytes": sum(path.stat().st_size for path in cache.folder.iterdir()) / 1e6,
        "loss_difference": max(differences),
    }
