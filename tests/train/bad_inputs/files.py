"""Files of a run and of other programs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.train.tiny import Evil

from .common import FILES, RUN, TRAIN, Row, refused, run_folder, succeeds, tree


def metrics(line: str, *words: str) -> Callable[[], str]:
    def act() -> str:
        Path("run").mkdir()
        Path("run/metrics.jsonl").write_text(line + "\n")
        return refused(["plot", "run"], "run/metrics.jsonl", *words)

    return act


def malformed_summaries() -> str:
    for number, content in enumerate((b"[1]", b'{"method": "cross_entropy"}', b"\xff", b"[" * 100_000)):
        Path(f"runs/other-{number}").mkdir(parents=True)
        Path(f"runs/other-{number}/summary.json").write_bytes(content)
    os.mkfifo("runs/summary.json")
    tree()
    kd = [FILES[0], *FILES[1:], "method=kd", "teacher.name=small_cnn", "teacher.width=2", "teacher.epochs=1"]
    assert "not known" in succeeds("train", *kd)
    return "trained; they are no results to compare with"


def name_with_markup() -> str:
    name = "my [/x] $\\frac$ run"
    succeeds("train", *TRAIN)
    Path(RUN, "run.json").write_text(json.dumps({"name": name}))
    assert name in succeeds("train", f"{RUN}/recipe.yaml")
    assert name in succeeds("train", "--resume", "runs/my-x-frac-run-001", "--eval-only")
    succeeds("plot", RUN, "runs/my-x-frac-run-001")
    return "trained, drawn and printed as written"


def checkpoint(content: Callable[[], Any], *words: str) -> Callable[[], str]:
    def act() -> str:
        tree()
        torch.save(content(), "t.pt")
        kd = ["method=kd", "teacher.name=small_cnn", "teacher.width=2", "teacher.checkpoint=t.pt"]
        told = refused(["train", *FILES, *kd], "t.pt", *words)
        return told.replace(os.getcwd() + "/", "")

    return act


def weights(change: Callable[[dict[Any, Any]], None]) -> Callable[[], Any]:
    def make() -> Any:
        from fastkd.models import build_model

        state = dict(build_model("small_cnn", num_classes=2, width=2, channels=3).state_dict())
        change(state)
        return state

    return make


def sparse(state: dict[Any, Any]) -> None:
    key = next(key for key, value in state.items() if value.dim() == 2)
    state[key] = state[key].to_sparse()


def quantised(state: dict[Any, Any]) -> None:
    key = next(key for key, value in state.items() if value.dim() == 2)
    state[key] = torch.quantize_per_tensor(state[key], 0.1, 0, torch.qint8)


def integers(state: dict[Any, Any]) -> None:
    key = next(key for key, value in state.items() if value.dim() == 2)
    state[key] = state[key].to(torch.int32)


def numbered(state: dict[Any, Any]) -> None:
    state[3] = state.pop(next(iter(state)))


def code_in_a_checkpoint() -> str:
    told = checkpoint(lambda: {"model": Evil()}, "more than tensors")()
    assert not Path("owned").exists()
    return told


def damaged_heads() -> str:
    tree()
    mhkd = [*FILES, "method=mhkd", "method.layers=[stages.0]", "method.head_width=4"]
    mhkd += ["teacher.name=small_cnn", "teacher.width=2", "teacher.epochs=1"]
    succeeds("train", *mhkd)
    shutil.copy(run_folder() / "last.pt", "h.pt")
    succeeds("train", *mhkd, "method.teacher_heads=h.pt")
    content = bytearray(Path("h.pt").read_bytes())
    content[len(content) // 2] ^= 1
    Path("h.pt").write_bytes(content)
    told = refused(["train", *mhkd, "method.teacher_heads=h.pt"], "teacher_heads", "h.pt", "SHA-256")
    Path("h.pt").unlink()
    os.mkfifo("h.pt")
    refused(["train", *mhkd, "method.teacher_heads=h.pt"], "teacher_heads", "h.pt", "FIFO")
    return told.replace(os.getcwd() + "/", "")


def seeds_file() -> str:
    succeeds("train", *TRAIN, "--seeds", "2")
    for content in ('{"count": "many"}', "[]", '{"count": -1}'):
        Path(RUN, "seeds.json").write_text(content)
        told = refused(["train", "--resume", RUN], "seeds.json", "expected a number of seeds")
    return told


def no_run_json() -> str:
    succeeds("train", *TRAIN)
    for content in ("[]", '{"name": 3}', "[" * 100_000):
        Path(RUN, "run.json").write_text(content)
        succeeds("plot", RUN, "--to", f"{len(content)}.png")
        succeeds("train", "--resume", RUN)
    return "named after its folder"


RECORD = {"epoch": 1, "val_accuracy": 0.5, "val_loss": 1.0, "seconds": {"data": 1.0}}
OTHER_FILES: list[Row] = [
    ("metrics.jsonl with a line that is no JSON", "refused by file", metrics("{", "cannot be read")),
    ("metrics.jsonl with a line `[]`", "refused by line and key", metrics("[]", "line 1", "'epoch'")),
    (
        "metrics.jsonl with a text for a number",
        "refused by line and key",
        metrics(json.dumps({**RECORD, "val_loss": "low"}), "line 1", "'val_loss'"),
    ),
    ("other runs' summary.json malformed, or a FIFO", "passed over, no late end", malformed_summaries),
    ("run.json malformed", "the folder's name instead", no_run_json),
    ("seeds.json malformed", "refused by file and value", seeds_file),
    ("a run's name with `[/x]` or `$`", "printed as written", name_with_markup),
    ("sparse weights", "refused by name and kind", checkpoint(weights(sparse), "is sparse")),
    ("quantised weights", "refused by name and kind", checkpoint(weights(quantised), "is quantised (qint8)")),
    ("integer weights", "refused, not converted", checkpoint(weights(integers), "is of int32")),
    ("a state dict with a key 3", "refused", checkpoint(weights(numbered), "holds no state dict")),
    ("method.teacher_heads: a bit is flipped, or a FIFO", "refused by file", damaged_heads),
    ("a checkpoint with code", "refused without torch's advice, not run", code_in_a_checkpoint),
]
