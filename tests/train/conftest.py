from pathlib import Path

import pytest

from tests.small_fonts import cache, fonts, shared_cache, tiny  # noqa: F401


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
