"""`fastkd cache-teacher`: store what the teacher gives for every epoch's images."""

from __future__ import annotations

import argparse
import os
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from fastkd.data.data import Data, load_data
from fastkd.data.order import IndexedLoader, with_rows
from fastkd.errors import RecipeError, Stopped
from fastkd.files.paths import user_path
from fastkd.messages import kind_and_text
from fastkd.recipe.schema import Recipe, load_recipe
from fastkd.train.display.console import make_console
from fastkd.train.distributed import number
from fastkd.train.run.build import build_network, prepare_device, tried, try_method
from fastkd.train.run.cache_agreement import measure_agreement, teacher_outputs
from fastkd.train.run.cache_stores import STORES, LogitsStore, Store, TopKStore, features_store
from fastkd.train.run.folder import write_json
from fastkd.train.run.lock import locked
from fastkd.train.run.teacher_cache import CacheWriter, TeacherCache, top_k_temperature, wanted_facts
from fastkd.train.run.teachers import find_teacher

_TOP_K = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="+", metavar="RECIPE [key=value …]", help="as for `fastkd train`")
    parser.add_argument(
        "--to", type=user_path, required=True, metavar="FOLDER", help="a new folder for the cache"
    )
    parser.add_argument(
        "--store",
        choices=STORES,
        default="top_k",
        help="top_k (default): the K most probable classes at the method's temperature; logits: all classes; "
        "features: the input of the teacher's last linear layer",
    )
    parser.add_argument(
        "--top-k", type=int, metavar="K", help=f"classes that top_k keeps (default: {_TOP_K})"
    )
    parser.add_argument("--all", action="store_true", help=argparse.SUPPRESS)  # its name before --store
    parser.add_argument(
        "--runs",
        type=user_path,
        default=Path("runs"),
        metavar="FOLDER",
        help="where a trained teacher is stored",
    )


def run(args: argparse.Namespace) -> int:
    processes = number("WORLD_SIZE", 1, least=1)
    if processes > 1:
        raise RecipeError(
            f"cache-teacher runs in one process, but WORLD_SIZE is {processes}: start it without torchrun"
        )
    if args.all:
        raise RecipeError("--all is now --store logits")
    if args.top_k is not None and args.store != "top_k":
        raise RecipeError(f"--top-k is of --store top_k, but the store is {args.store}")
    console = make_console()
    _, recipe = load_recipe(args.words[0], args.words[1:])
    device = prepare_device(recipe.train)
    data = load_data(recipe.data)
    console.print(f"data: {data.describe()}")
    facts = wanted_facts(recipe, data, device)
    assert recipe.teacher is not None
    if recipe.teacher.cache is not None:
        raise RecipeError("teacher.cache is given, but this command creates a cache")
    if os.path.lexists(args.to):  # before a teacher is trained; also a link to nothing
        raise RecipeError(
            f"--to {args.to}: it already exists; a cache is never overwritten: choose a new folder"
        )
    # Tried with an untrained teacher before one is trained.
    untrained = tried(f"teacher {recipe.teacher.name}", build_network, recipe.teacher, data)
    tried_with = _store(args, recipe, data, untrained)
    for note in try_method(recipe, data, device, given=tried_with.teacher()):
        console.print(note)
    try:
        teacher = find_teacher(recipe.teacher, data, args.runs, device, console)
        facts["val_accuracy"] = teacher.summary["val_accuracy"]
        console.print(f"teacher: {facts['val_accuracy']:.2%}, {teacher.summary['checkpoint']}")
        store = _store(args, recipe, data, teacher.model.to(device))
        writer = CacheWriter(args.to, facts, store)
        cache = _fill(writer, store, recipe, data, teacher.model, facts["epochs"], device, console)
    except KeyboardInterrupt:
        raise Stopped("stopped; the same command resumes after the last complete epoch") from None
    override = shlex.quote(f"teacher.cache={args.to}")
    try:
        report = {
            "store": store.facts,
            "bytes_per_sample": cache.bytes_per_sample,
            "megabytes": cache.bytes_in_all / 1e6,
            "agreement": measure_agreement(cache, store, recipe, data, teacher.model, device),
        }
        write_json(args.to / "report.json", report)
        for line in _described(report, data):
            console.print(line, soft_wrap=True)
    except KeyboardInterrupt:
        raise Stopped(f"stopped; the cache is complete, but has no report: {override}") from None
    except Exception as error:  # the cache is complete: a report must not make it fail
        console.print(
            f"the cache is complete, but its report failed: {kind_and_text(error)}",
            soft_wrap=True,
        )
    console.print(f"to train from it: {override}", soft_wrap=True)
    return 0


def _store(args: argparse.Namespace, recipe: Recipe, data: Data, teacher: nn.Module) -> Store:
    """The store that the arguments name. Raises ``TrainError`` if recipe or teacher do not fit it."""
    if args.store == "logits":
        return LogitsStore(data.num_classes)
    if args.store == "features":
        device = next(teacher.parameters()).device
        precision = recipe.train.teacher_precision or recipe.train.precision
        return features_store(teacher, data.example()[0].to(device), precision)
    most = data.num_classes - 1
    k = min(_TOP_K, most) if args.top_k is None else args.top_k
    if not 1 <= k <= most:
        raise RecipeError(
            f"--top-k {k}: expected 1 to {most}, of {data.num_classes} classes; --store logits keeps all"
        )
    return TopKStore(data.num_classes, k, top_k_temperature(recipe))


def _fill(
    writer: CacheWriter,
    store: Store,
    recipe: Recipe,
    data: Data,
    teacher: nn.Module,
    epochs: int,
    device: torch.device,
    console: Console,
) -> TeacherCache:
    loader = data.train_loader(recipe.train.batch_size, recipe.train.seed, device)
    with locked(writer.partial):
        for epoch in writer.missing_epochs():
            began = time.perf_counter()
            writer.write_epoch(epoch, _outputs(loader, epoch, store, teacher, recipe))
            seconds = time.perf_counter() - began
            console.print(f"epoch {epoch + 1}/{epochs} cached, {seconds:.1f} s")
    return writer.finish()


def _outputs(
    loader: IndexedLoader, epoch: int, store: Store, teacher: nn.Module, recipe: Recipe
) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
    loader.set_epoch(epoch)
    for images, target, indices in with_rows(loader.indexed()):
        yield indices, teacher_outputs(store, teacher, images, target, recipe)


def _described(report: dict[str, Any], data: Data) -> Iterator[str]:
    found = report["agreement"]
    by = "all parameters" if found["gradient_by"] == "parameters" else "the student's logits"
    yield (
        f"{report['store']['store']}: {report['bytes_per_sample']} bytes per sample and epoch, "
        f"{report['megabytes']:.1f} MB in total"
    )
    yield (
        f"largest difference from the teacher in {found['batches']} batches, with an untrained student: "
        f"loss {found['loss']:.2e}, gradient by {by} {found['gradient']:.2e} (cosine {found['cosine']:.6f})"
    )
    if "rounding" in found:
        rounding, others = found["rounding"], data.num_classes - report["store"]["k"]
        yield (
            f"this is the definition's, in which the other classes ({others:,}) are one class; float16 alone "
            f"causes {rounding['loss']:.2e} of the loss and {rounding['gradient']:.2e} of the gradient"
        )
