"""Do cross-entropy and logit loss pull against each other, and where? DHKD's study, along real trainings.

    python benchmarks/studies/gradient_conflict.py glyphs/dhkd --output benchmarks/results/gradient-conflict

DHKD (Yang et al. 2024) claims that on one shared head the gradients of cross-entropy and of BinaryKL-Norm
point against each other in the linear classifier, late in training, while they agree in the backbone; hence
two heads. The student is trained with both losses, on one head and on two (linear, without alignment), with
the teacher's logits as they are and centred, from the same start. At regular steps the two gradients are
computed separately on the current batch, and their cosine is recorded, for the classifier (with two heads:
between the main and the auxiliary head's weights, each from its own loss) and for the backbone. Writes
OUTPUT.jsonl, a header and one line per measurement, and OUTPUT.png: means over seeds, with their range.
Trainings that OUTPUT.jsonl has are not repeated. key=value words override the recipe.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from choose_hyperparameters import append, read

from fastkd.bench.results import header
from fastkd.data.data import Data, load_data
from fastkd.distill import DHKD, Method, find_classifier
from fastkd.recipe.schema import load_recipe
from fastkd.recipe.sections import Recipe
from fastkd.train.display.console import make_console
from fastkd.train.loop import evaluate
from fastkd.train.optimization import build_optimizer, build_scheduler
from fastkd.train.run.build import build_method, build_network, prepare_device
from fastkd.train.run.teachers import find_teacher

Row = dict[str, Any]

# One head and two, at one weight of the logit loss.
HEADS = {
    "one head": ["method=binary_kl_norm", "method.weight={weight}"],
    "two heads": ["method=dhkd", "method.alpha={weight}", "method.head=linear", "method.align=none"],
}
TEACHERS = {"raw teacher": "false", "centred teacher": "true"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--output", type=Path, required=True, metavar="STEM")
    parser.add_argument("--weights", type=float, nargs="+", default=[1e-3, 1e-2], help="of the logit loss")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--every", type=int, default=20, metavar="STEPS")
    parser.add_argument("--runs", type=Path, default=Path("runs"), metavar="FOLDER")
    args = parser.parse_intermixed_args()
    path = args.output.with_name(args.output.name + ".jsonl")
    device = prepare_device(load_recipe(args.recipe, args.overrides)[1].train)
    if not path.exists():
        append(path, header(device.type, {}, command=" ".join(sys.argv)))
    for seed in args.seeds:
        for weight in args.weights:
            for teacher, centred in TEACHERS.items():
                for head, words in HEADS.items():
                    known = {"head": head, "teacher": teacher, "weight": weight, "seed": seed}
                    if any(all(row.get(k) == v for k, v in known.items()) for row in read(path)):
                        continue
                    chosen = [word.format(weight=weight) for word in words]
                    chosen += [f"method.center_teacher={centred}", f"train.seed={seed}"]
                    _, recipe = load_recipe(args.recipe, [*chosen, *args.overrides])
                    rows = study(recipe, device, ", ".join(map(str, known.values())), args.every, args.runs)
                    append(path, *({**known, **row} for row in rows))
    plot([row for row in read(path) if "head" in row], args.output.with_name(args.output.name + ".png"))
    print(f"written: {path} and the picture beside it")


def study(recipe: Recipe, device: torch.device, title: str, every: int, runs: Path) -> list[Row]:
    """Train as the recipe says; a row of cosines every so many steps."""
    console = make_console()
    data: Data = load_data(recipe.data)
    assert recipe.teacher is not None
    teacher = find_teacher(recipe.teacher, data, runs, device, console)
    torch.manual_seed(recipe.train.seed)
    method = build_method(recipe, build_network(recipe.student, data), teacher.model, data, device)
    loader = data.train_loader(recipe.train.batch_size, recipe.train.seed, device)
    optimizer = build_optimizer(method, recipe.train)
    scheduler = build_scheduler(optimizer, recipe.train, len(loader))
    rows, step = [], 0
    for epoch in range(recipe.train.epochs):
        loader.set_epoch(epoch)
        method.set_epoch(epoch)
        method.train()
        for batch in loader:
            terms = method(batch)
            if step % every == 0:
                rows.append({"step": step, "epoch": step / len(loader), **cosines(method, terms)})
            optimizer.zero_grad(set_to_none=True)
            method.backward(terms)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            step += 1
        accuracy, _ = evaluate(
            method.student, data.val_loader(device, recipe.train.batch_size), device=device
        )
        last = rows[-1]
        console.print(
            f"{title}, epoch {epoch + 1}/{recipe.train.epochs}: validation {accuracy:.2%}, "
            f"cosine in the classifier {last['classifier']:+.3f}, in the backbone {last['backbone']:+.3f}",
        )
    return [{**row, "val_accuracy": accuracy} for row in rows]


def cosines(method: Method, terms: dict[str, Tensor]) -> dict[str, float]:
    """Cosines of the two losses' gradients, and how large the logit loss's is beside the cross-entropy's."""
    _, main_head = find_classifier(method.student)
    other_head = method.head if isinstance(method, DHKD) else main_head
    of_head = {id(parameter) for parameter in main_head.parameters()}
    backbone = [p for p in method.student.parameters() if id(p) not in of_head]
    gradients = [
        torch.autograd.grad(terms[name], [*backbone, *head.parameters()], retain_graph=True)
        for name, head in (("ce", main_head), ("binary_kl_norm", other_head))
    ]
    result = {}
    for part, chosen in (("backbone", slice(len(backbone))), ("classifier", slice(len(backbone), None))):
        first, second = (flat(of_loss[chosen]) for of_loss in gradients)
        result[part] = nn.functional.cosine_similarity(first, second, dim=0).item()
        result[f"{part}_norm_ratio"] = (second.norm() / first.norm()).item()
    return result


def flat(gradients: Sequence[Tensor]) -> Tensor:
    return torch.cat([gradient.flatten().double() for gradient in gradients])


def curves(rows: list[Row], part: str) -> Iterator[tuple[str, list[float], list[list[float]], float]]:
    """For each head: its label, the epochs, the cosines of all seeds at each, and the mean last accuracy."""
    for head in HEADS:
        by_epoch: dict[float, list[float]] = {}
        accuracy: dict[int, float] = {}
        for row in rows:
            if row["head"] == head:
                by_epoch.setdefault(row["epoch"], []).append(row[part])
                accuracy[row["seed"]] = row["val_accuracy"]
        if by_epoch:
            yield head, list(by_epoch), list(by_epoch.values()), statistics.mean(accuracy.values())


def plot(rows: list[Row], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = sorted({(row["teacher"], row["weight"]) for row in rows}, reverse=True)
    figure = Figure(figsize=(4 * len(columns), 6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(columns), sharex=True, sharey=True, squeeze=False)
    for line, part in zip(panels, ("classifier", "backbone"), strict=True):
        for axes, (teacher, weight) in zip(line, columns, strict=True):
            chosen = [row for row in rows if (row["teacher"], row["weight"]) == (teacher, weight)]
            for (head, epochs, values, accuracy), colour in zip(
                curves(chosen, part), ("#D55E00", "#0072B2"), strict=False
            ):
                label = f"{head}, validation {accuracy:.1%}"
                axes.plot(epochs, [statistics.mean(several) for several in values], color=colour, label=label)
                axes.fill_between(
                    epochs, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.2, lw=0
                )
            axes.axhline(0, color="0.5", linewidth=1)
            axes.set_title(f"{part}, {teacher}, weight {weight:g}", fontsize="medium")
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False, fontsize="small")
        line[0].set_ylabel("cosine of CE and BinaryKL-Norm")
    for axes in panels[-1]:
        axes.set_xlabel("epoch")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
