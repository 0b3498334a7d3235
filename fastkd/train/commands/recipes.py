"""`fastkd recipes`: the recipes that come with fastkd, and the text of one."""

from __future__ import annotations

import argparse
import sys

from fastkd.command import add_json, print_json
from fastkd.recipe.files import find_recipe, parse_flat_yaml, shipped_recipes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="print this recipe, or that of a .yaml file")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    if args.name is None:
        return _list(args.json)
    found = find_recipe(args.name)
    values = parse_flat_yaml(found.text, found.origin)
    if args.json:
        print_json({"name": found.name, "recipe": values})
        return 0
    print(found.text, end="" if found.text.endswith("\n") else "\n")
    if sys.stdout.isatty():  # not into a file, which must stay a recipe
        print(
            f"\nfastkd train {args.name} --help    # its keys with type, default and meaning", file=sys.stderr
        )
    return 0


def _list(as_json: bool) -> int:
    # Read without validating them, which takes torch: the tests validate every recipe that comes with fastkd.
    described = {
        name: str(parse_flat_yaml(file.read_text(encoding="utf-8"), name).get("description", ""))
        for name, file in shipped_recipes().items()
    }
    if as_json:
        print_json({"recipes": [{"name": name, "description": text} for name, text in described.items()]})
        return 0
    width = max(map(len, described), default=0)
    for name, text in described.items():
        print(f"{name:{width}}  {text}")
    return 0
