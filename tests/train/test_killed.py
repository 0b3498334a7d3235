"""The short form of tools/kill_and_resume.py: JPEG files, two gloo ranks, SIGKILL at a random step."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from tests.data.image_trees import load_script, make_tree

from .ranks import in_folder, kill_after, launch, start, steps_done

SCRIPT = load_script("kill_and_resume")
RANKS, STEPS = 2, 12  # of 3 epochs
OPTIONS = [
    *SCRIPT.NETWORKS, "data.root=tree", "data.size=32", "data.workers=0", "teacher.checkpoint=teacher.pt",
    "train.batch_size=4", "train.epochs=3", "train.checkpoint_every=1", "--resume",
]  # fmt: skip


@pytest.mark.parametrize("method", SCRIPT.METHODS)
def test_a_killed_training_ends_with_the_same_bits(method: str, workplace: Path) -> None:
    make_tree(Path("tree"), classes=4, train=4, val=1)
    SCRIPT.make_teacher(Path("teacher.pt"), classes=4)
    words = ["imagenet/r18-kd", *SCRIPT.METHODS[method], *OPTIONS]
    assert launch(RANKS, workplace, [*words, "--runs", "whole"]) == [0] * RANKS
    (whole,) = Path("whole").iterdir()
    run = Path("runs", whole.name)
    steps = random.SystemRandom().randint(1, STEPS // 2)
    kill_after(steps, run, start(RANKS, in_folder, str(workplace), words))
    assert steps <= steps_done(run) < STEPS
    assert launch(RANKS, workplace, words) == [0] * RANKS
    tensors, different = SCRIPT.compare_runs(whole, run)
    assert tensors > 20
    assert not different, steps


def test_a_difference_is_found() -> None:
    def state(last: float) -> dict[str, object]:
        return {"weights": torch.tensor([1.0, last]), "history": [{"loss": last, "seconds": 3}], "ema": None}

    assert not [*SCRIPT.differences(state(0.0), {**state(0.0), "history": [{"loss": 0.0, "seconds": 4}]})]
    assert [*SCRIPT.differences(state(0.0), state(-0.0))] == ["/weights"]  # equal, but other bits
    assert [*SCRIPT.differences(state(0.0), state(1.0))] == ["/weights", "/history/0/loss"]
