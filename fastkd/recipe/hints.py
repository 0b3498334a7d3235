"""Hints for options that are keys of a recipe: ``--epochs 3`` is written ``train.epochs=3``."""

from __future__ import annotations

from collections.abc import Sequence


def hint(option: str, argv: Sequence[str]) -> str | None:
    """The override that ``option``, an unknown word of ``argv`` such as ``--lr=0.1``, stands for.

    None if no key of any recipe has its name.
    """
    from .keys import every_key

    name, _, value = option.lstrip("-").partition("=")
    wanted = name.replace("-", "_").lower()
    keys = every_key()
    for matches in (
        lambda key: key.replace(".", "_") == wanted.replace(".", "_"),
        lambda key: key.rpartition(".")[2] == wanted,
        lambda key: key == _OTHER_NAMES.get(wanted),
    ):
        for key in keys:
            if matches(key.name):
                return f"{key.name}={value or _value(option, argv, key.kind)}"
    return None


# What other trainers call it.
_OTHER_NAMES = {
    "learning_rate": "train.lr",
    "batch": "train.batch_size",
    "bs": "train.batch_size",
    "wd": "train.weight_decay",
    "opt": "train.optimizer",
    "scheduler": "train.schedule",
    "num_epochs": "train.epochs",
    "num_workers": "data.workers",
    "data_path": "data.root",
    "data_dir": "data.root",
    "dataset": "data.name",
    "model": "student.name",
    "amp": "train.precision",
    "tau": "method.temperature",
}


def _value(option: str, argv: Sequence[str], kind: str) -> str:
    """The word after the option, if it is a value."""
    after = list(argv).index(option) + 1 if option in argv else len(argv)
    word = argv[after] if after < len(argv) else ""
    if kind == "true or false":
        return word if word in ("true", "false") else "true"
    return word if word and not word.startswith("--") and "=" not in word else "…"
