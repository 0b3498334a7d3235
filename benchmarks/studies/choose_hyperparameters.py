"""Choose a method's options on data that no reported number is made of.

    python benchmarks/studies/choose_hyperparameters.py glyphs/dhkd glyphs/mhkd --output FILE.jsonl

Glyphs: one training face, Serif Bold, validates; the reported faces are left out altogether, and the
teacher is trained without any of them. Fashion-MNIST: 10,000 training images validate; the test images are
not used. Emoji: one artist validates, the reported artist is left out; ``data.folder`` names such a folder.

The search starts at the recipe's own options and tries, for each option, the next smaller and the next larger
value (STEPS, or ``--step`` for other options), or every other value (VALUES); it moves to the best point
found and goes on until no neighbour of the best is better, so the best is never at the end of a grid. Every
point is trained as the recipe says (seed 100 unless ``--seeds`` gives more, never the reported seeds); the
mean accuracy of the last epoch decides. FILE gets one line per run as it ends and one with the choice; runs
already in it are not repeated.
key=value words after the recipes are passed to every run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fastkd.data.glyphs.fonts import DEJAVU_HOLDOUT
from fastkd.recipe.schema import load_recipe
from fastkd.train.display.console import make_console
from fastkd.train.run.run import run_recipe

Point = dict[str, Any]

# By method: options on a geometric scale, and the factor between neighbours.
STEPS: dict[str, dict[str, float]] = {
    "kd": {"temperature": 2.0},
    "lskd": {"kd_weight": 3.0, "temperature": 2.0},
    "dkd": {"beta": 2.0, "temperature": 2.0},
    "dckd": {"beta": 2.0, "temperature": 2.0},
    "nkd": {"gamma": 2.0, "temperature": 2.0},
    "fitnets": {"hint_weight": 10.0},
    "rkd": {"distance_weight": 5.0},
    "binary_kl": {"weight": 10**0.5},
    "binary_kl_norm": {"weight": 10**0.5},
    "dhkd": {"alpha": 10**0.5},
    "mhkd": {"alpha": 3.0, "beta": 3.0},
}
# Options with a few values, of which each is a neighbour of the others.
VALUES: dict[str, dict[str, list[Any]]] = {
    "dhkd": {"head": ["nonlinear", "linear"], "align": ["all", "none"]},
}
SPLITS: dict[str, list[str]] = {
    "glyphs": ["data.holdout=[DejaVu Serif Bold]", f"data.exclude=[{', '.join(DEJAVU_HOLDOUT)}]"],
    "fashion-mnist": ["data.holdout=10000"],
    "emoji": [],  # data.folder is of another split
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="+", metavar="RECIPE … [key=value …]")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument("--try", action="append", default=[], metavar="OPTION=VALUE", dest="tries")
    parser.add_argument(
        "--step", action="append", default=[], metavar="OPTION=FACTOR", help="search these options alone"
    )
    parser.add_argument("--seeds", type=int, default=1, metavar="N")
    parser.add_argument("--runs", type=Path, default=Path("runs/choice"), metavar="FOLDER")
    args = parser.parse_intermixed_args()
    overrides = [word for word in args.words if "=" in word]
    tries = [dict([word.split("=", 1)]) for word in args.tries]
    steps = {option: float(factor) for option, factor in (word.split("=", 1) for word in args.step)}
    for name in args.words:
        if "=" not in name:
            seeds = range(100, 100 + args.seeds)
            choose(name, overrides, steps, tries, seeds, args.output, args.runs)


def choose(
    name: str,
    overrides: list[str],
    steps: dict[str, float],
    tries: list[Point],
    seeds: range,
    output: Path,
    runs: Path,
) -> None:
    split = SPLITS.get(name.partition("/")[0])
    if split is None:
        raise SystemExit(f"{name}: no split to choose on; there is one for {', '.join(SPLITS)}")
    console = make_console()
    _, stated = load_recipe(name, overrides)
    values = {} if steps else VALUES.get(stated.method, {})
    steps = steps or STEPS.get(stated.method, {})
    if not steps and not values:
        raise SystemExit(f"{name}: nothing to choose for the method {stated.method}; see STEPS and VALUES")
    earlier = read(output)
    done = {
        (line["recipe"], json.dumps(line["options"]), line["seed"]): line
        for line in earlier
        if "seed" in line and line["overrides"] == overrides
    }
    means: dict[str, float] = {}

    def accuracy(point: Point) -> float:
        key = json.dumps(point)
        if key not in means:
            means[key] = statistics.mean(trained(point, seed) for seed in seeds)
        return means[key]

    def trained(point: Point, seed: int) -> float:
        line = done.get((name, json.dumps(point), seed))
        if line is None:
            given = [f"method.{option}={value}" for option, value in point.items()]
            _, recipe = load_recipe(name, [*overrides, *split, *given, f"train.seed={seed}"])
            console.print(f"{name}, {json.dumps(point)}, seed {seed}")
            summary = run_recipe(name, recipe, runs=runs, console=console)
            line = {"recipe": name, "options": point, "seed": seed, "last": summary["last"]["val_accuracy"]}
            line |= {"best": summary["best"]["val_accuracy"], "overrides": overrides, "split": split}
            append(output, {**line, "made_with": summary["made_with"]})
        return float(line["last"])

    start = {option: stated.options[option] for option in (*steps, *values)}
    for point in (start, *({**start, **{k: float(v) for k, v in one.items()}} for one in tries)):
        accuracy(point)
    best = start
    while True:
        for point in neighbours(best, steps, values):
            accuracy(point)
        found = json.loads(max(means, key=lambda key: means[key]))
        if accuracy(found) <= accuracy(best):
            break
        best = found
    console.print(f"{name}: chosen {best}, {accuracy(best):.2%} on the face or images held out")
    choice = {"recipe": name, "chosen": best, "last": accuracy(best), "tried": len(means)}
    choice |= {"overrides": overrides, "split": split}
    if choice not in earlier:
        append(output, choice)


def neighbours(point: Point, steps: dict[str, float], values: dict[str, list[Any]]) -> Iterator[Point]:
    for option, factor in steps.items():
        for value in (point[option] / factor, point[option] * factor):
            yield {**point, option: float(f"{value:.2g}")}
    for option, several in values.items():
        for value in several:
            if value != point[option]:
                yield {**point, option: value}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, *lines: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
