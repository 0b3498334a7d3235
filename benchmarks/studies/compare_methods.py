"""Train several methods with several seeds and print them as tables, with differences paired by seed.

    python benchmarks/studies/compare_methods.py glyphs --output FILE.jsonl
    python benchmarks/studies/compare_methods.py glyphs train.epochs=24 --rows KD DHKD --output FILE.jsonl
    python benchmarks/studies/compare_methods.py glyphs --table FILE.jsonl

The rows of each problem are in ``comparison_rows.py``: recipes with overrides. key=value words apply to every
row, ``teacher.*`` to every row with a teacher; {seed} in one is replaced. With ``--cache FOLDER``, of `fastkd
cache-teacher`, rows that read nothing of the teacher but its logits train from these; {seed} is replaced here
too. FILE gets one line per run as it ends, with the commit that it was made at. Runs already in it are not
repeated, so several processes with different ``--rows`` can share it; a row whose recipe equals another row's
takes its result, and a row whose recipe has changed is trained again.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from choose_hyperparameters import append, read
from comparison_rows import DIFFERENCES, PROBLEMS, rows_of

from fastkd.distill import find_method
from fastkd.files.sealed import short_digest_of
from fastkd.recipe.schema import load_recipe
from fastkd.train.display.console import make_console
from fastkd.train.run.run import run_recipe

Line = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("problem", choices=PROBLEMS)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="all of the problem's if not given")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--runs", type=Path, default=Path("runs"), metavar="FOLDER")
    parser.add_argument("--cache", metavar="FOLDER", help="the teacher's logits, stored")
    files = parser.add_mutually_exclusive_group(required=True)
    files.add_argument("--output", type=Path, metavar="FILE.jsonl")
    files.add_argument("--table", type=Path, metavar="FILE.jsonl", help="print it")
    args = parser.parse_intermixed_args()
    rows = rows_of(args.problem)
    unknown = [label for label in args.rows or () if label not in rows]
    if unknown:
        raise SystemExit(f"--rows: there is no row {unknown}; there are {', '.join(rows)}")
    if args.table is not None:
        lines = [line for line in read(args.table) if line["overrides"] == args.overrides]
        print(tables(sorted(lines, key=lambda line: list(rows).index(line["row"]))))
        return
    for seed in args.seeds:
        for label in args.rows or rows:
            train(label, rows[label], seed, args)


def train(label: str, words: list[str], seed: int, args: argparse.Namespace) -> None:
    """One run, unless ``args.output`` has it."""
    problem, output = args.problem, args.output
    given = [word.replace("{seed}", str(seed)) for word in args.overrides]
    rest = [word for word in given if not word.startswith("teacher.")]
    if load_recipe(words[0], [*words[1:], *rest])[1].teacher is None:
        given = rest
    name, recipe = load_recipe(words[0], [*words[1:], *given, f"train.seed={seed}"])
    reads_layers = find_method(recipe.method).reads_layers(recipe.options)
    cached = args.cache is not None and recipe.teacher is not None and not reads_layers
    if cached:
        given.append(f"teacher.cache={args.cache.replace('{seed}', str(seed))}")
        name, recipe = load_recipe(words[0], [*words[1:], *given, f"train.seed={seed}"])
    key = {"problem": problem, "row": label, "seed": seed, "overrides": args.overrides}
    # Where the teacher's logits come from is not part of what is compared.
    compared = {option: value for option, value in recipe.flat().items() if option != "teacher.cache"}
    key["recipe"] = short_digest_of({**compared, "description": ""})
    equal = [line for line in read(output) if line["recipe"] == key["recipe"]]
    if equal:
        if not any(line["row"] == label for line in equal):
            append(output, {**equal[0], **key, "words": words})
        return
    console = make_console()
    console.print(f"{problem}, {label}, seed {seed}")
    summary = run_recipe(name, recipe, runs=args.runs, console=console)
    teacher = summary["teacher"] or {}
    line = {**key, "words": words}
    line |= {which: summary[which] for which in ("best", "last", "made_with")}
    line |= {"teacher": teacher.get("val_accuracy"), "seconds": round(sum(summary["seconds"].values()), 1)}
    append(output, {**line, "cache": cached, "commit": commit()})


def commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def tables(lines: list[Line]) -> str:
    """Means over seeds, and differences paired by seed, in percentage points; Markdown."""
    rows: dict[str, dict[int, Line]] = {}
    for line in lines:
        rows.setdefault(line["row"], {})[line["seed"]] = line
    out = ["| row | seeds | best epoch, % | last epoch, % |", "|---|---|---|---|"]
    for label, runs in rows.items():
        best, last = (
            spread([100 * run[which]["val_accuracy"] for run in runs.values()]) for which in ("best", "last")
        )
        out.append(f"| {label} | {len(runs)} | {best} | {last} |")
    teachers = sorted({f"{100 * line['teacher']:.2f}" for line in lines if line["teacher"] is not None})
    out += ["", f"Teacher, %: {', '.join(teachers)}", ""]
    out += ["| last epoch, points, paired by seed | mean | each |", "|---|---|---|"]
    for first, second in DIFFERENCES:
        seeds = sorted(set(rows.get(first, {})) & set(rows.get(second, {})))
        if seeds:
            apart = [
                100 * (rows[first][seed]["last"]["val_accuracy"] - rows[second][seed]["last"]["val_accuracy"])
                for seed in seeds
            ]
            each = ", ".join(f"{value:+.2f}" for value in apart)
            out.append(f"| {first} - {second} | {spread(apart, '+')} | {each} |")
    return "\n".join(out)


def spread(values: list[float], sign: str = "") -> str:
    mean = f"{statistics.mean(values):{sign}.2f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.2f}"


if __name__ == "__main__":
    main()
