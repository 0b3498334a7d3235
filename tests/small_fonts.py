"""Fixtures with a few real fonts and characters, so that a complete run takes a second."""

from __future__ import annotations

import shutil
from pathlib import Path

import matplotlib
import pytest

DEJAVU = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
SMALL_FACES = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSerif", "DejaVuSerif-Bold")


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def cache(shared_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache shared by the tests, so that each font folder is rendered once; never the user's."""
    monkeypatch.setenv("FASTKD_CACHE", str(shared_cache))
    return shared_cache


@pytest.fixture(scope="session")
def fonts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fonts")
    for name in SMALL_FACES:
        shutil.copy(DEJAVU / f"{name}.ttf", folder)
    return folder


@pytest.fixture
def tiny(fonts: Path) -> list[str]:
    """Overrides that make a glyph recipe (with a teacher) train in about a second."""
    return [*tiny_student(fonts), "teacher.width=4", "teacher.epochs=2", "teacher.batch_size=32"]


def tiny_student(fonts: Path) -> list[str]:
    return [
        f"data.fonts={fonts}",
        "data.characters=41-5A,61-7A,391-3A1",
        "student.width=2",
        "train.epochs=3",
        "train.batch_size=32",
        "train.threads=1",
        "train.device=cpu",
    ]
