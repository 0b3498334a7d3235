"""`fastkd train … --eval-only`: validate existing networks, without training or writing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from fastkd.data.data import load_data
from fastkd.errors import CheckpointError, RecipeError
from fastkd.recipe.sections import Recipe
from fastkd.train import distributed
from fastkd.train.evaluation import evaluate_rows
from fastkd.train.run.build import build_network, prepare_device, tried
from fastkd.train.run.checkpoint import load_checkpoint
from fastkd.train.run.teachers import load_given_teacher
from fastkd.train.run.weights import averaged_weights, check_class_names, load_weights, state_dict_in
from fastkd.train.state_dicts import fill


def evaluate_networks(name: str, recipe: Recipe, folder: Path | None, console: Console) -> dict[str, Any]:
    """Validate the given teacher and, with a run folder, its students; returns the results.

    Raises ``TrainError``, also if there is nothing to validate.
    """
    device = prepare_device(recipe.train)
    with distributed.first_rank_first():
        data = load_data(recipe.data)
    console.print(f"data: {data.describe()}")
    networks: dict[str, nn.Module] = {}
    if recipe.teacher is not None and (recipe.teacher.checkpoint or recipe.teacher.weights):
        teacher = load_given_teacher(recipe.teacher, data, device, console)
        assert teacher is not None
        networks["teacher"] = teacher.model
    for what, path in (("best epoch", "best.pt"), ("newest state", "last.pt")) if folder else ():
        assert folder is not None
        if not (folder / path).exists():
            continue
        student = build_network(recipe.student, data)
        if path == "best.pt":
            remedy = "it cannot be validated"
            facts = load_weights(student, folder / path, num_classes=data.num_classes, remedy=remedy)
            check_class_names(facts, folder / path, data, remedy)
            networks[f"student, {what}"] = student
            continue
        state: dict[str, Any] = load_checkpoint(folder / path, remedy="it cannot be validated")
        if (weights := state_dict_in(state, student)) is None:
            raise CheckpointError(f"checkpoint {folder / path} holds no state dict of tensors")
        fill(student, weights, f"checkpoint {folder / path}", "it cannot be validated")
        networks[f"student, {what}"] = student
        if state.get("ema") is not None:
            average = build_network(recipe.student, data)
            fill(average, averaged_weights(state["ema"]), f"the average of {folder / path}", "see above")
            networks[f"student, {what}, averaged"] = average
    if not networks:
        raise RecipeError(
            "--eval-only: nothing to validate; give --resume RUN_FOLDER or teacher.checkpoint=FILE"
        )
    table = Table(title=f"{name}, validated", title_justify="left")
    results = {}
    for label, network in networks.items():
        results[label] = tried(
            f"{label} on the validation images",
            evaluate_rows,
            network.to(device),
            data.val_loader(device, recipe.train.val_batch_size or recipe.train.batch_size),
            device=device,
            precision=recipe.train.precision,
        )
    with_top5 = any(result.top5 is not None for result in results.values())
    columns = ["accuracy, %", *(["top-5, %"] if with_top5 else []), "cross-entropy", "images"]
    for column in ("network", *columns):
        table.add_column(column, justify="left" if column == "network" else "right")
    for label, result in results.items():
        top5 = [] if result.top5 is None else [f"{100 * result.top5:.2f}"]
        accuracies = [f"{100 * result.accuracy:.2f}", *top5]
        table.add_row(label, *accuracies, f"{result.loss:.4f}", f"{result.rows:,}")
    console.print(table)
    return {"name": name, "networks": {label: result.record() for label, result in results.items()}}
