"""Recipes that cannot be read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .common import TRAIN, Row, refused


def override(text: str, *words: str) -> Callable[[], str]:
    return lambda: refused(["train", *TRAIN, text], text.partition("=")[0], *words)


def recipe_file(more: str, *words: str) -> Callable[[], str]:
    def act() -> str:
        Path("r.yaml").write_text(
            f"description: x\nmethod: cross_entropy\nstudent.width: 2\ntrain.epochs: 1\n{more}\n"
        )
        return refused(["train", "r.yaml"], "r.yaml", *words)

    return act


ALIASES = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{f'*a{n - 1}, ' * 9}]\n" for n in range(1, 30))
RECIPES: list[Row] = [
    (f"`{text[:30]}{'…' if len(text) > 30 else ''}`", must, override(text, *words))
    for text, must, words in (
        ("train.epochs=0x1", "refused: no decimal number", ["'0x1' (str)", "valid integer"]),
        ("train.epochs=01", "refused: no decimal number", ["'01' (str)"]),
        ("train.epochs=1_0", "refused: no decimal number", ["'1_0' (str)"]),
        ("train.epochs=0b_", "refused by name", ["'0b_' (str)"]),
        ("train.lr=1:30.5", "refused: no decimal number", ["'1:30.5' (str)", "valid number"]),
        ("train.lr=1e999", "refused: not rounded to infinity", ["beyond the range of float64"]),
        ("train.lr=1e-999", "refused: not rounded to zero", ["beyond the range of float64"]),
        ("train.epochs=!!int foo", "refused by name", ["tags such as"]),
        ("train.lr=2024-13-45", "refused by name", ["'2024-13-45' (str)"]),
        ("train.epochs=" + "9" * 5000, "refused, the digits cut short", ["9999...", "valid integer"]),
        ("train.epochs=" + "[" * 5000, "refused by name", ["nested too deeply"]),
        ("data.synthetic=0", "refused, the whole key named", ["data.synthetic = 0", "greater than"]),
        ("data.synthetic=1" + "0" * 15, "refused, no attempt at the memory", ["data.synthetic"]),
        ("data.name=[a]", "refused by name", ["data.name = ['a'] is unknown"]),
        ("train.tensorboard=yes", "refused: only true and false are", ["'yes' (str)", "boolean"]),
    )
] + [
    ("aliases that stand for 9³⁰ values, in 1 KB", "refused at once", recipe_file(ALIASES, "aliases")),
    ("keys `1:` and `[a]:`", "refused by name", recipe_file("1: 2\n? [a]\n: 3", "key is a list")),
    ("a key `1:`", "refused by name", recipe_file("1: 2", "unknown key '1'")),
    ("two documents in a recipe", "one line", recipe_file("---\nx: 1", "not valid YAML")),
]
