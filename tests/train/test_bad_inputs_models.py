"""Every row of ``bad_inputs_models``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .bad_inputs_models import ROWS


@pytest.mark.parametrize(("given", "must", "run"), ROWS, ids=[row[0] for row in ROWS])
def test_a_bad_input(
    given: str, must: str, run: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert must
    assert run()
