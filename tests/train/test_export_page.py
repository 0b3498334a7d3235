"""Runs docs/export.md from top to bottom: train, export, load, classify a picture, in every format."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastkd
from fastkd.cli import main

PAGE = Path(__file__).resolve().parents[2] / "docs" / "export.md"
BLOCK = re.compile(r"(?:<!-- (?P<mark>[^\n]*) -->\n)?```(?P<language>\w+)\n(?P<code>.*?)```", re.DOTALL)


def test_the_page(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_onnx = all(importlib.util.find_spec(name) for name in ("onnxruntime", "onnxscript"))
    names: dict[str, Any] = {}
    blocks = list(BLOCK.finditer(PAGE.read_text(encoding="utf-8")))
    assert [block["language"] for block in blocks].count("bash") == 4
    for block in blocks:
        code = block["code"]
        if not with_onnx and ("--format onnx" in code or block["mark"] == "run with onnxruntime"):
            continue
        if block["language"] == "bash":
            for line in code.splitlines():
                program, *words = shlex.split(line)
                assert program == "fastkd"
                assert main(words) == 0, line
            capsys.readouterr()
        else:
            exec(compile(code, str(PAGE), "exec"), names)
            out = capsys.readouterr().out
            assert re.fullmatch(r"R(, \d+%)?\n", out) if "print(" in code else not out, code
    assert {path.suffix for path in Path("runs/glyphs-kd-001").glob("student.*")} == {
        ".safetensors", ".json", ".pt2", *([".onnx"] if with_onnx else [])
    }  # fmt: skip
    loaded = fastkd.load("runs/glyphs-kd-001")
    assert names["about"] == loaded.about
    torch.testing.assert_close(
        torch.from_numpy(names["images"])[0], loaded.transform(Image.open("letter.png")), rtol=0, atol=1e-6
    )


def test_its_numpy_transform_on_photographs(tmp_path: Path) -> None:
    text = PAGE.read_text(encoding="utf-8")
    names: dict[str, Any] = {"np": np, "Image": Image}
    exec(re.search(r"^def prepared.*?(?=^\n^with)", text, re.DOTALL | re.MULTILINE)[0], names)  # type: ignore[index]
    transform = fastkd.ValidationTransform(
        channels=3, resize=48, crop=32, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]
    )
    for width, height in ((100, 67), (75, 113), (48, 48), (333, 50)):
        random = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(random).save(tmp_path / "photo.png")
        ours = transform(Image.open(tmp_path / "photo.png"))
        theirs = names["prepared"](tmp_path / "photo.png", transform.model_dump())
        assert theirs.dtype == np.float32
        # Pillow's bilinear scaling and torch's differ by at most one level.
        levels = (torch.from_numpy(theirs)[0] - ours) * torch.tensor(transform.std)[:, None, None] * 255
        assert levels.abs().max() < 1.01
