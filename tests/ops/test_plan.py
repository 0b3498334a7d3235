"""The planner of the Triton kernels."""

from hypothesis import given
from hypothesis import strategies as st

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
    # The number of rows changes the number of programs, not the compiled kernel.
    other = plan.plan_rows(family, rows + 1, classes, 2, H100)
    assert planned[:4] == other[:4]


def test_rows_are_split_bounded_or_grouped_by_shape():
    few = plan.plan_rows("softmax", 4, 1_000_000, 2, H100)
    assert 2 * H100.multiprocessors <= few.parts * 4 <= 3 * H100.multiprocessors
    many = plan.plan_rows("softmax", 8192, 32768, 2, H100)
    assert many.parts == 1
    assert H100.multiprocessors < many.programs < 8192
    assert many.programs * 2 * 32768 * 2 < H100.cache_bytes
    # With two pairs half as many rows of each.
    assert plan.plan_rows("softmax", 2 * 8192, 32768, 2, H100, pairs=2).programs == many.programs // 2
    # Longer rows do not stay in the cache: what is resident.
    longer = plan.plan_rows("softmax", 4096, 131072, 2, H100)
    assert longer.programs == 2 * H100.multiprocessors
    short = plan.plan_rows("softmax", 256, 10, 4, H100)
    assert short.rows > 1
    assert short.one_tile


@given(st.integers(1, 100_000), st.integers(1, 3_000_000))
def test_plans_for_known_classes_cover_the_rows(rows, classes):
    planned = plan.plan_known(rows, classes, H100)
    assert planned.tile & (planned.tile - 1) == 0
    assert 1 <= planned.warps <= 8
    assert 1 <= planned.parts <= min(plan.MAX_PARTS, -(-classes // planned.tile))
    assert planned[:4] == plan.plan_known(rows + 1, classes, H100)[:4]
