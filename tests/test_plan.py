"""The planner: tiles that cover the row, and an explanation whose numbers are the plan's."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastkd
from fastkd.ops import plan


@given(st.integers(2, 3_000_000))
def test_plans_cover_the_row(classes):
    planned = plan.plan_rows(classes)
    assert planned.tile & (planned.tile - 1) == 0
    assert planned.one_tile == (classes <= plan.RESIDENT_CLASSES)
    if planned.one_tile:
        assert planned.tile // 2 < max(classes, 9) <= max(planned.tile, 9)
    assert 1 <= planned.warps <= 16


@pytest.mark.parametrize("loss", plan.LOSSES)
def test_explanation(fused, loss):
    for classes in (10, 1000, 21841):
        told = fastkd.explain(128, classes, torch.bfloat16, fused, loss=loss)
        assert told.backend == fastkd.get_backend()
        assert told.bytes == told.accesses * 128 * classes * 2
        assert told.accesses >= 3
        assert 0 < told.seconds < 10
        for words in (loss, told.path, f"{told.tile} classes", "GB/s"):
            assert words in str(told)


def test_the_path_follows_the_length_of_the_row():
    with fastkd.use_backend("triton"):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        assert fastkd.explain(8, 1000, device=device).accesses == 3
        assert fastkd.explain(8, 100_000, device=device).accesses == 5
        assert fastkd.explain(8, 100_000, device=device, loss="jsd").accesses == 7


def test_bad_input():
    with pytest.raises(ValueError, match="classes 1"):
        fastkd.explain(3, 1)
    with pytest.raises(ValueError, match="loss is 'kl'"):
        fastkd.explain(3, 10, loss="kl")
    with pytest.raises(TypeError, match="int64"):
        fastkd.explain(3, 10, torch.int64)
