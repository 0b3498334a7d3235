"""Shared by the tests of the benchmark suite's numbers."""

import time
from types import SimpleNamespace

import pytest


@pytest.fixture
def ticking(monkeypatch):
    """A clock that stands still but for what the test adds: ``ticking.now``, in seconds."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    return clock
