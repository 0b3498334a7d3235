"""The planner of the Triton kernels."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastkd
from fastkd.ops import plan
from fastkd.ops.call import Call
from fastkd.ops.spec import CASES, Needs, needs_of

H100 = plan.Device(multiprocessors=132)
B200 = plan.Device(multiprocessors=148, capability=(10, 0))


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


@pytest.mark.parametrize(
    ("arguments", "planned"),
    [
        # The longest row of one tile, and the shortest that is streamed.
        (("softmax", 1000, 8192, 2, H100), (1, 8192, True, 8, None, 1, 1000)),
        (("softmax", 1000, 8193, 2, H100), (1, 4096, False, 8, 80, 1, 396)),
        # Labels in float32 take twice the warps.
        (("labelled", 1000, 2048, 2, H100), (1, 2048, True, 2, None, 1, 1000)),
        (("labelled", 1000, 2048, 4, H100), (1, 2048, True, 4, None, 1, 1000)),
        # Scaling has a factor per row, so that rows do not share a program.
        (("scale", 1000, 10, 2, H100), (1, 16, False, 1, None, 1, 1000)),
        # Rows are split only where a multiprocessor would have none; without statistics where programs fit.
        (("softmax", 131, 100_000, 2, H100), (1, 4096, False, 8, 80, 3, 396)),
        (("softmax", 132, 100_000, 2, H100), (1, 4096, False, 8, 80, 1, 396)),
        (("pointwise", 200, 100_000, 2, H100), (1, 2048, False, 4, None, 3, 660)),
        # 245 tiles in 99 parts would be of 3 and of 2: 82 are of 3.
        (("softmax", 4, 1_000_000, 2, H100), (1, 4096, False, 8, 80, 82, 396)),
        # From compute capability 10.0 with half the loads, except where nothing stays in registers.
        (("softmax", 8192, 32768, 2, B200), (1, 2048, False, 8, 96, 1, 296)),
        (("standardized", 8192, 32768, 4, B200), (1, 1024, False, 8, 128, 1, 296)),
        (("pointwise", 8192, 32768, 2, B200), (1, 2048, False, 4, None, 1, 740)),
    ],
)
def test_plans_at_their_limits(arguments, planned):
    assert tuple(plan.plan_rows(*arguments)) == planned


def test_few_rows_of_known_classes_are_split():
    assert plan.plan_known(1, 131_072, H100)[-2:] == (64, 1)
    assert plan.plan_known(100, 100_000, H100)[-2:] == (22, 100)
    assert plan.plan_known(4096, 131_072, H100)[-2:] == (1, 4096)


def test_the_kind_of_every_loss():
    kinds = {
        name: plan.kind_of(loss.family, needs_of(loss, tuple(case.options), case.labelled))
        for name, (loss, case) in CASES.items()
    }
    # NKD has a cross-entropy of both models.
    for name, kind in {
        "kd": "softmax", "reverse-kl": "softmax", "dkd": "labelled", "ce": "one model",
        "ce-kd": "cross-entropy", "nkd": "cross-entropy", "lskd": "standardized",
        "ce-lskd": "standardized", "ls-dkd": "standardized",
        "jsd": "mixture", "tvd": "mixture", "binary-kl": "pointwise",
    }.items():  # fmt: skip
        assert kinds[name] == kind, name


def test_a_call_without_labels_excludes_no_class():
    """Whether its loss could take some or not."""
    options = CASES["kd"][1].options
    without = Call(None, None, 1, "softmax", options, None, "native", True, False)
    assert not without.needs & Needs.LABELLED
    assert without._replace(target=torch.zeros(1, dtype=torch.int64)).needs & Needs.LABELLED


def test_the_properties_of_a_gpu(monkeypatch):
    found = SimpleNamespace(major=9, minor=1, multi_processor_count=114)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    assert plan.device_of.__wrapped__(torch.device("cuda")) == plan.Device(114, (9, 1))
