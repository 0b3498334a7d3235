"""Runs each row of `bad_inputs`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from . import bad_inputs


@pytest.mark.parametrize(
    ("must", "act"),
    [pytest.param(must, act, id=f"{what} {must}"[:90]) for what, must, act in bad_inputs.ROWS],
)
def test_a_bad_input(must: str, act: Callable[..., str], tmp_path: Path) -> None:
    try:
        seen = bad_inputs.happened(act, tmp_path)
    except bad_inputs.NotTriedError as reason:
        pytest.skip(str(reason))
    assert must
    assert isinstance(seen, str)
    assert seen
