"""The planner: tiles that cover the row, and an explanation whose numbers are the plan's."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastkd
from fastkd.ops import plan

H100 = plan.Device(multiprocessors=132, cache_bytes=50 << 20)


@given(
    st.sampled_from(["softmax", "mixture", "pointwise", "scale"]),
    st.integers(1, 100_000),
    st.integers(2, 3_000_000),
)
def test_plans_cover_the_rows(family, rows, classes):
    planned = plan.plan_rows(family, rows, classes, 2, H100)
    assert planned.tile & (planned.tile - 1) == 0
    assert planned.rows & (planned.rows - 1) == 0
    assert 1 <= planned.warps <= 16
    assert 1 <= planned.parts <= plan.MAX_PARTS
    tiles = -(-classes // planned.tile)
    assert planned.parts <= tiles
    assert planned.one_tile == (family == "softmax" and classes <= plan.RESIDENT_CLASSES)
    if planned.one_tile:
        assert tiles == 1
        assert planned.tile < 2 * max(classes, 9)
    # A new number of rows changes how many programs run, not what is compiled.
    other = plan.plan_rows(family, rows + 1, classes, 2, H100)
    assert planned[:4] == other[:4]


def test_rows_are_shared_bounded_or_put_together_by_shape():
    few = plan.plan_rows("softmax", 4, 1_000_000, 2, H100)
    assert 2 * H100.multiprocessors <= few.parts * 4 <= 3 * H100.multiprocessors
    many = plan.plan_rows("softmax", 8192, 32768, 2, H100)
    assert many.parts == 1
    assert H100.multiprocessors < many.programs < 8192
    assert many.programs * 2 * 32768 * 2 < H100.cache_bytes
    short = plan.plan_rows("softmax", 256, 10, 4, H100)
    assert short.rows > 1
    assert short.one_tile


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


def test_native_cuda_paths_are_told_with_what_they_keep():
    def told(loss, rows, classes, dtype=torch.bfloat16):
        return plan._team_path(loss, rows, classes, dtype, H100)

    assert "rows a block" in told("kd", 8192, 10).words
    whole = told("dkd", 4096, 131_072)
    assert whole.accesses == 3
    assert "cluster of 8 blocks" in whole.words
    assert "the row on chip" in whole.words
    partly = told("kd", 256, 1_000_000)
    assert 3 < partly.accesses < 5
    assert "read again" in partly.words
    assert told("lskd", 256, 1_000_000).accesses > told("jsd", 256, 1_000_000).accesses > partly.accesses
    assert told("binary_kl", 256, 1_000_000).accesses == 3


def test_bad_input():
    with pytest.raises(ValueError, match="classes 1"):
        fastkd.explain(3, 1)
    with pytest.raises(ValueError, match="loss is 'kl'"):
        fastkd.explain(3, 10, loss="kl")
    with pytest.raises(TypeError, match="int64"):
        fastkd.explain(3, 10, torch.int64)
