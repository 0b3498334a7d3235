"""Do cross-entropy and logit loss pull against each other, and where? DHKD's study, along a real glyph
training.

    python benchmarks/studies/gradient_conflict.py --output benchmarks/results/gradient-conflict

DHKD (Yang et al. 2024) claims that on one shared head the gradients of cross-entropy and of BinaryKL-Norm
point against each other in the linear classifier, late in training, while they agree in the backbone; hence
two heads. The student is trained with both losses, on one head and on two (without alignment), from the same
start. At regular steps the two gradients are computed separately on the current batch, and their cosine is
recorded, for the classifier (with two heads: between the main and the auxiliary head's weights, each from its
own loss) and for the backbone. Writes OUTPUT.jsonl, a header and one line per measurement, and OUTPUT.png.
key=value words override the recipe.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fastkd.bench.results import header
from fastkd.data.data import Data, load_data
from fastkd.distill import Method
from fastkd.recipe.schema import Recipe, load_recipe
from fastkd.train.display.console import make_console
from fastkd.train.loop import evaluate
from fastkd.train.optimization import build_optimizer, build_scheduler
from fastkd.train.run.build import build_method, build_network, resolve_device
from fastkd.train.run.teachers import own_teacher

# One head and two, at one weight of the logit loss.
HEADS = {
    "one head": ["method=binary_kl_norm", "method.weight={weight}"],
    "two heads": ["method=dhkd", "method.alpha={weight}", "method.head=linear", "method.align=none"],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--output", type=Path, required=True, metavar="STEM")
    parser.add_argument("--weights", default="1e-3,1e-2,1e-1", help="of the logit loss, with commas")
    parser.add_argument("--every", type=int, default=20, metavar="STEPS")
    parser.add_argument("--runs", type=Path, default=Path("runs"), metavar="FOLDER")
    args = parser.parse_intermixed_args()
    rows: list[dict[str, Any]] = []
    device = resolve_device(load_recipe("glyphs/dhkd", args.overrides)[1].train.device)
    for weight in map(float, args.weights.split(",")):
        for head, words in HEADS.items():
            chosen = [word.format(weight=weight) for word in words]
            _, recipe = load_recipe("glyphs/dhkd", [*chosen, *args.overrides])
            rows += study(recipe, device, head, weight, args.every, args.runs)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    path = args.output.with_name(args.output.name + ".jsonl")
    about = header(device.type, {}, command=" ".join(sys.argv))
    path.write_text("".join(json.dumps(line) + "\n" for line in (about, *rows)), encoding="utf-8")
    plot(rows, args.output.with_name(args.output.name + ".png"))
    print(f"written: {path} and the picture beside it")


def study(
    recipe: Recipe, device: torch.device, head: str, weight: float, every: int, runs: Path
) -> list[dict[str, Any]]:
    """Train as the recipe says; a row of cosines every so many steps."""
    if recipe.train.threads is not None:
        torch.set_num_threads(recipe.train.threads)
    console = make_console()
    data: Data = load_data(recipe.data)
    assert recipe.teacher is not None
    teacher = own_teacher(recipe.teacher, data, runs, device, console)
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
                position = {"head": head, "weight": weight, "step": step, "epoch": step / len(loader)}
                rows.append({**position, **cosines(method, terms)})
            optimizer.zero_grad(set_to_none=True)
            method.backward(terms)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            step += 1
        accuracy, _ = evaluate(method.student, data.val_loader(device), device=device)
        last = rows[-1]
        console.print(
            f"{head}, weight {weight:g}, epoch {epoch + 1}/{recipe.train.epochs}: validation {accuracy:.2%}, "
            f"cosine in the classifier {last['classifier']:+.3f}, in the backbone {last['backbone']:+.3f}",
            markup=False,
        )
    return [{**row, "val_accuracy": accuracy} for row in rows]


def cosines(method: Method, terms: dict[str, Tensor]) -> dict[str, float]:
    """Cosines of the two losses' gradients, and how large the logit loss's is beside the cross-entropy's."""
    student = method.student
    backbone = [p for name, p in student.named_parameters() if not name.startswith("head.")]
    main_head: nn.Linear = student.head
    other_head: nn.Linear = getattr(method, "head", main_head)
    ce, logit = terms["ce"], terms["binary_kl_norm"]
    ce_gradients = torch.autograd.grad(ce, [*backbone, main_head.weight, main_head.bias], retain_graph=True)
    logit_gradients = torch.autograd.grad(
        logit, [*backbone, other_head.weight, other_head.bias], retain_graph=True
    )
    result = {}
    for part, chosen in (("backbone", slice(0, -2)), ("classifier", slice(-2, None))):
        first, second = flat(ce_gradients[chosen]), flat(logit_gradients[chosen])
        result[part] = nn.functional.cosine_similarity(first, second, dim=0).item()
        result[f"{part}_norm_ratio"] = (second.norm() / first.norm()).item()
    return result


def flat(gradients: Sequence[Tensor]) -> Tensor:
    return torch.cat([gradient.flatten().double() for gradient in gradients])


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    weights = sorted({row["weight"] for row in rows})
    figure = Figure(figsize=(4.5 * len(weights), 6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(weights), sharex=True, sharey=True, squeeze=False)
    for line, part in zip(panels, ("classifier", "backbone"), strict=True):
        for axes, weight in zip(line, weights, strict=True):
            for head, colour in zip(HEADS, ("#D55E00", "#0072B2"), strict=True):
                chosen = [row for row in rows if (row["weight"], row["head"]) == (weight, head)]
                label = f"{head}, validation {chosen[-1]['val_accuracy']:.1%}"
                axes.plot(
                    [row["epoch"] for row in chosen], [row[part] for row in chosen], color=colour, label=label
                )
            axes.axhline(0, color="0.5", linewidth=1)
            axes.set_title(f"{part}, weight {weight:g}")
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False, fontsize="small")
        line[0].set_ylabel("cosine of CE and BinaryKL-Norm")
    for axes in panels[-1]:
        axes.set_xlabel("epoch")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
