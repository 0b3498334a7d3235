"""Resuming a run with another recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from fastkd.train.run.checkpoint import load_checkpoint

from .common import CONSTANT, RUN, TRAIN, Row, refused, succeeds


def resumed_with(change: str, *words: str, started: tuple[str, ...] = (CONSTANT,)) -> Callable[[], str]:
    def act() -> str:
        succeeds("train", *TRAIN, *started)
        before = {path: path.read_bytes() for path in Path(RUN).iterdir()}
        told = refused(["train", "--resume", RUN, change], RUN, change.partition("=")[0], "→", *words)
        assert {path: path.read_bytes() for path in Path(RUN).iterdir()} == before
        return told

    return act


def edited_recipe() -> str:
    succeeds("train", *TRAIN, CONSTANT)
    recipe = Path(RUN, "recipe.yaml")
    recipe.write_text(recipe.read_text().replace("train.lr: 0.01", "train.lr: 0.5"))
    return refused(["train", "--resume", RUN], "train.lr: 0.01 → 0.5")


def extended(schedule: str, *more: str) -> Callable[[], str]:
    def act() -> str:
        options = [f"train.schedule={schedule}", *more]
        succeeds("train", *TRAIN, *options)
        succeeds("train", "--resume", RUN, "train.epochs=3")
        succeeds("train", *TRAIN, *options, "train.epochs=3", "--runs", "whole")
        states = [
            load_checkpoint(Path(runs, Path(RUN).name, "last.pt"), remedy="") for runs in ("runs", "whole")
        ]
        assert all(torch.equal(states[0]["student"][k], v) for k, v in states[1]["student"].items())
        return "extended; the same bits as a run of 3 epochs from the start"

    return act


def before_recipes_were_kept() -> str:
    succeeds("train", *TRAIN, CONSTANT)
    path = Path(RUN, "last.pt")
    state = torch.load(path, weights_only=True)
    for name in ("recipe", "data", "teacher", "batches"):
        del state[name]
    torch.save({**state, "format": "fastkd-1"}, path)
    refused(["train", "--resume", RUN, "train.lr=0.5"], "train.lr: 0.01 → 0.5")
    succeeds("train", "--resume", RUN, "train.epochs=2")
    return "another learning rate refused; resumed and extended"


RESUME: list[Row] = [
    (f"`--resume RUN {change}`", must, resumed_with(change, *words))
    for change, must, *words in (
        ("student.width=3", "refused: was → is", "2 → 3"),
        ("train.optimizer=sgd", "refused: was → is", "adamw → sgd"),
        ("train.ema=0.9", "refused: was → is", "not set → 0.9"),
        ("train.lr=0.5", "refused: was → is", "0.01 → 0.5"),
        ("train.schedule=cosine", "refused: was → is", "constant → cosine"),
        ("train.batch_size=8", "refused: was → is", "16 → 8"),
        ("data.synthetic=50", "refused: was → is", "40 → 50"),
        ("method.label_smoothing=0.1", "refused: was → is", "0.0 → 0.1"),
        ("train.seed=1", "refused: was → is", "0 → 1"),
    )
] + [
    (
        "`--resume RUN train.epochs=3` under one_cycle",
        "refused before training, with the reason",
        resumed_with("train.epochs=3", "spread over all epochs", started=("train.schedule=one_cycle",)),
    ),
    (
        "`--resume RUN train.epochs=3` under cosine",
        "refused before training, with the reason",
        resumed_with("train.epochs=3", "spread over all epochs", started=("train.schedule=cosine",)),
    ),
    (
        "`--resume RUN train.epochs=1` of a run of 2",
        "refused: more are trained",
        resumed_with("train.epochs=1", "2 are already trained", started=(CONSTANT, "train.epochs=2")),
    ),
    ("`--resume RUN train.epochs=3` under constant", "extended", extended("constant")),
    ("`--resume RUN train.epochs=3` under steps", "extended", extended("steps", "train.milestones=[2]")),
    ("a run's recipe.yaml with another learning rate", "refused: was → is", edited_recipe),
    ("a run from before states kept their recipe", "resumed and extended", before_recipes_were_kept),
]
