"""The planner of the Triton kernels."""

import torch
from hypothesis import given
from hypothesis import strategies as st

import fastkd
from fastkd.ops import plan

H100 = plan.Device(multiprocessors=132)


@given(
    st.sampled_from(list(plan.KINDS)),
    st.integers(1, 100_000),
    st.integers(2, 3_000_000),
)
def test_plans_cover_the_rows(kind, rows, classes):
    planned = plan.plan_rows(kind, rows, classes, 2, H100)
    assert planned.tile & (planned.tile - 1) == 0
    assert planned.rows & (planned.rows - 1) == 0
    assert 1 <= planned.warps <= 16
    assert 1 <= planned.parts <= plan.MAX_PARTS
    tiles = -(-classes // planned.tile)
    assert planned.parts <= tiles
    of = plan.KINDS[kind]
    assert planned.one_tile == (of.resident and classes <= of.longest)
    if planned.one_tile:
        assert tiles == 1
        assert planned.tile < 2 * max(classes, 9)
    # The number of rows changes the number of programs, not the compiled kernel.
    other = plan.plan_rows(kind, rows + 1, classes, 2, H100)
    assert planned[:5] == other[:5]


def test_rows_are_split_bounded_or_grouped_by_shape():
    resident = 3 * H100.multiprocessors
    few = plan.plan_rows("softmax", 4, 1_000_000, 2, H100)
    assert resident / 2 < few.parts * 4 <= resident
    # As many rows on each multiprocessor.
    many = plan.plan_rows("softmax", 8192, 32768, 2, H100)
    assert (many.parts, many.programs) == (1, resident)
    assert plan.plan_rows("standardized", 8192, 32768, 2, H100).programs == 2 * H100.multiprocessors
    # With two pairs half as many rows of each.
    assert plan.plan_rows("softmax", 2 * 8192, 32768, 2, H100, pairs=2).programs == resident // 2
    short = plan.plan_rows("softmax", 256, 10, 4, H100)
    assert short.rows > 1
    assert short.one_tile


@given(st.sampled_from(list(plan.KINDS)), st.integers(2, 512), st.sampled_from([2, 4]))
def test_rows_that_share_a_program_share_one_warp(kind, classes, element_bytes):
    planned = plan.plan_rows(kind, 1000, classes, element_bytes, H100)
    if planned.rows > 1:
        assert planned.warps == 1
        assert planned.rows * planned.tile <= 16 * 32  # a thread has 16 logits at most


@given(st.integers(1, 100_000), st.integers(1, 3_000_000))
def test_plans_for_known_classes_cover_the_rows(rows, classes):
    planned = plan.plan_known(rows, classes, H100)
    assert planned.tile & (planned.tile - 1) == 0
    assert 1 <= planned.warps <= 8
    assert 1 <= planned.parts <= min(plan.MAX_PARTS, -(-classes // planned.tile))
    assert planned[:4] == plan.plan_known(rows + 1, classes, H100)[:4]


def test_models_of_two_dtypes_stay_with_triton(monkeypatch):
    """Native was measured with both in bfloat16; the choice is asked for these alone."""
    from fastkd.losses import dispatch

    asked = []
    monkeypatch.setattr(dispatch, "faster_for", lambda chosen, *of: asked.append(of[-1]) or chosen)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student, teacher = torch.randn(2, 3, 5, device=device).bfloat16()
    with fastkd.use_backend("triton"):
        fastkd.kd_loss(student, teacher.float())
        assert not asked
        fastkd.kd_loss(student, teacher)
    assert asked == [torch.bfloat16]
