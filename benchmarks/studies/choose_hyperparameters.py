"""Choose a method's options on data that no reported number is made of.

    python benchmarks/studies/choose_hyperparameters.py glyphs/dhkd glyphs/mhkd --output FILE.jsonl

Glyphs: one training face, Serif Bold, validates; the reported faces are left out altogether, and the
teacher is trained without any of them. Fashion-MNIST: 10,000 training images validate; the test images are
not used. Every point of the grid below is trained as the recipe says (seed 100 unless ``--seeds`` gives
more, never the reported seeds); the mean accuracy of the last epoch decides, the recipe's own value in a
tie. FILE gets one line per run as it ends and one with the choice; runs already in it are not repeated.
key=value words after the recipes are passed to every run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fastkd.data.glyphs.fonts import DEJAVU_HOLDOUT
from fastkd.recipe.schema import load_recipe
from fastkd.train.display.console import make_console
from fastkd.train.run.run import run_recipe

# By method: the options to try, every combination of them. A recipe's own comes first: BinaryKL-Norm is a sum
# over classes, and what a weight means depends on their number.
GRIDS: dict[str, dict[str, list[Any]]] = {
    "kd": {"temperature": [2.0, 4.0, 8.0]},
    "lskd": {"kd_weight": [3.0, 9.0], "temperature": [2.0, 4.0]},
    "dkd": {"beta": [2.0, 8.0], "temperature": [2.0, 4.0]},
    "dckd": {"beta": [2.0, 8.0], "temperature": [2.0, 4.0]},
    "nkd": {"gamma": [0.5, 1.5], "temperature": [1.0, 3.0]},
    "binary_kl_norm": {"weight": [1e-3, 1e-2, 1e-1]},
    "dhkd": {"alpha": [1e-2, 1e-1, 1.0], "head": ["nonlinear", "linear"]},
    "glyphs/dhkd": {"alpha": [1e-4, 1e-3, 1e-2], "head": ["nonlinear", "linear"]},
    "mhkd": {"alpha": [0.3, 1.0, 3.0]},
}
SPLITS = {
    "glyphs": ["data.holdout=[DejaVu Serif Bold]", f"data.exclude=[{', '.join(DEJAVU_HOLDOUT)}]"],
    "fashion-mnist": ["data.holdout=10000"],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="+", metavar="RECIPE … [key=value …]")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument("--seeds", type=int, default=1, metavar="N")
    parser.add_argument("--runs", type=Path, default=Path("runs/choice"), metavar="FOLDER")
    args = parser.parse_intermixed_args()
    overrides = [word for word in args.words if "=" in word]
    for name in args.words:
        if "=" not in name:
            choose(name, overrides, range(100, 100 + args.seeds), args.output, args.runs)


def choose(name: str, overrides: list[str], seeds: range, output: Path, runs: Path) -> None:
    split = SPLITS.get(name.partition("/")[0])
    if split is None:
        raise SystemExit(f"{name}: no split to choose on; there is one for {', '.join(SPLITS)}")
    console = make_console()
    _, stated = load_recipe(name, overrides)
    if stated.method not in GRIDS:
        raise SystemExit(f"{name}: no grid for the method {stated.method}; there are {', '.join(GRIDS)}")
    grid = GRIDS.get(name, GRIDS[stated.method])
    earlier = read(output)
    done = {
        (line["recipe"], json.dumps(line["options"]), line["seed"]): line
        for line in earlier
        if "seed" in line and line["overrides"] == overrides
    }
    means: dict[str, float] = {}
    for values in itertools.product(*grid.values()):
        options = dict(zip(grid, values, strict=True))
        key = json.dumps(options)
        accuracies = []
        for seed in seeds:
            line = done.get((name, key, seed))
            if line is None:
                given = [f"method.{option}={value}" for option, value in options.items()]
                _, recipe = load_recipe(name, [*split, *overrides, *given, f"train.seed={seed}"])
                console.print(f"{name}, {key}, seed {seed}", markup=False)
                summary = run_recipe(name, recipe, runs=runs, console=console)
                line = {
                    "recipe": name,
                    "options": options,
                    "seed": seed,
                    "last": summary["last"]["val_accuracy"],
                }
                line |= {"best": summary["best"]["val_accuracy"], "overrides": overrides, "split": split}
                append(output, {**line, "made_with": summary["made_with"]})
            accuracies.append(line["last"])
        means[key] = statistics.mean(accuracies)

    def rank(key: str) -> tuple[float, bool]:
        return means[key], all(stated.options[option] == value for option, value in json.loads(key).items())

    best = max(means, key=rank)
    console.print(f"{name}: chosen {best}, {means[best]:.2%} on the face or images held out", markup=False)
    choice = {"recipe": name, "chosen": json.loads(best), "last": means[best], "grid": grid}
    choice |= {"overrides": overrides, "split": split}
    if choice not in earlier:
        append(output, choice)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, line: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
