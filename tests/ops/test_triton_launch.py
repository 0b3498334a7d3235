"""The Triton launcher: layouts, weights, options, sums over rows, and kept launches."""

import functools
import math
import types

import pytest
import torch

pytest.importorskip("triton")

from fastkd.ops import plan
from fastkd.ops.call import Call, Marks, Outputs
from fastkd.ops.spec import CASES
from fastkd.ops.spec import LOSSES as SPEC
from fastkd.ops.triton import launch, launch_options, row_sums, row_weights
from fastkd.ops.triton.launch_options import _kinds
from tests.ops.triton_calls import (
    DEVICE,
    LOSSES,
    PATHS,
    SOFTMAX,
    assert_close,
    each_kernel,
    kernel,
    labels,
    logits,
    reference_in,
    run,
)

# ---- layouts, weights, options -------------------------------------------------------------------------


@each_kernel
@pytest.mark.parametrize("classes", [10, 48])
def test_leading_dimensions_of_any_stride(name, classes):
    student = logits(3, 5, classes)[:, :-1]
    teacher = logits(4, 3, classes).transpose(0, 1)
    target = labels(24, classes)[::2]
    assert not student.is_contiguous()
    assert_close(
        kernel(name, student, teacher, target), reference_in(torch.float64, name, student, teacher, target)
    )


def test_broadcast_rows():
    student, teacher = logits(1, 1, 40).expand(2, 3, 40), logits(2, 1, 40).expand(2, 3, 40)
    found = kernel("kd", student, teacher, None)
    assert_close(found, reference_in(torch.float64, "kd", student, teacher, None))


# Rows of an odd stride, or that start between two multiples of 16 bytes, have no accesses of 16 bytes.
@pytest.mark.parametrize("odd", ["student", "teacher", "gradient"])
@pytest.mark.parametrize("skipped", [0, 1], ids=["stride", "start"])
def test_wide_accesses_only_where_all_rows_are_aligned(odd, skipped, monkeypatch):
    vectors = []
    monkeypatch.setattr(launch, "launch", lambda *given: vectors.append(given[-1]["VECTOR"]))
    rows = {name: logits(2, 48) for name in ("student", "teacher", "gradient")}
    apart = logits(2, 56 if skipped else 49)[:, skipped : skipped + 48]
    for of in (rows, {**rows, odd: apart}):
        call = Call(None, None, 1, *LOSSES["kd"][:2], None, "triton", False, False)
        losses = torch.empty(2, device=DEVICE)
        launch.row_loss([of["student"]], [of["teacher"]], call, Outputs(losses, None, of["gradient"]))
        launch.scale_rows_(of["gradient"], torch.ones(1, 2, device=DEVICE))
    assert vectors == [8, 8, 1, 1 if odd == "gradient" else 8]


@pytest.mark.parametrize("classes", [48, 9000])
def test_rows_of_an_odd_stride(classes):
    student, teacher = logits(2, classes + 1)[:, :-1], logits(2, classes + 3)[:, :-3]
    found = kernel("kd", student, teacher, None)
    assert_close(found, reference_in(torch.float64, "kd", student, teacher, None))


@pytest.mark.parametrize("name", ["ls-dkd", "nkd-t3", "jsd"])
def test_programs_that_have_several_long_rows(name, monkeypatch):
    """As many programs as a GPU of one multiprocessor has, which take turns in the rows."""
    monkeypatch.setattr(launch, "device_of", lambda _device: plan.Device(1))
    student, teacher, target = logits(5, 9000), logits(5, 9000), labels(5, 9000)
    student[:, 8999] += 20  # the models' maxima move by different steps
    planned = plan.plan_rows(plan.kind_of(CASES[name][0].family, 0), 5, 9000, 4, plan.Device(1))
    assert planned.parts == 1
    assert planned.programs < 5
    found = kernel(name, student, teacher, target)
    assert_close(found, reference_in(torch.float64, name, student, teacher, target))


@each_kernel
def test_weights_of_each_pair(name):
    loss, options, labelled = LOSSES[name]
    students, teachers = [logits(4, 30) for _ in range(3)], [logits(4, 30) for _ in range(3)]
    target = labels(4, 30)
    weight = torch.rand(3, 4, device=DEVICE)
    rows, gradient = torch.empty(12, device=DEVICE), torch.empty(12, 30, device=DEVICE)
    label = target if labelled else None
    run(students, teachers, label, weight, 0.5, loss, options, rows, gradient)
    for pair in range(3):
        alone = kernel(name, students[pair], teachers[pair], target, weight[pair].contiguous(), 0.5)
        of_pair = slice(4 * pair, 4 * pair + 4)
        torch.testing.assert_close((rows[of_pair], gradient[of_pair]), alone)


@each_kernel
@pytest.mark.parametrize(("rows", "classes"), [(6, 10), (2, 9000)])
def test_options_that_are_read_from_memory(name, rows, classes):
    student, teacher, target = logits(rows, classes), logits(rows, classes), labels(rows, classes)
    found = kernel(name, student, teacher, target, dynamic=True)
    torch.testing.assert_close(found, kernel(name, student, teacher, target), rtol=1e-6, atol=1e-6)


@each_kernel
@pytest.mark.parametrize(("rows", "classes"), PATHS[:2])
def test_a_row_of_weight_0_may_hold_anything(name, rows, classes):
    student, teacher, target = logits(rows, classes), logits(rows, classes), labels(rows, classes)
    weight = torch.ones(rows, device=DEVICE)
    expected = kernel(name, student, teacher, target)
    weight[1] = 0.0
    for one in (student, teacher):
        one[1] = math.nan
        one[1, ::2] = math.inf
    target[1] = -100
    found = kernel(name, student, teacher, target, weight)
    for value, true in zip(found, expected, strict=True):
        assert (value[1] == 0).all()
        others = torch.arange(rows, device=DEVICE) != 1
        assert torch.equal(value[others], true[others])


@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_propagates(weight):
    weights = torch.tensor([1.0, weight], device=DEVICE)
    rows, gradient = kernel("kd", logits(2, 10), logits(2, 10), None, weights)
    assert rows.isfinite().tolist() == [True, False]
    assert gradient.isfinite().all(-1).tolist() == [True, False]


@pytest.mark.parametrize("rows", [1, 300, row_weights.TILE, 2 * row_weights.TILE + 5])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("mean", [False, True])
def test_row_weights_of_labels(rows, dtype, mean):
    target = torch.randint(-2, 3, (2 * rows,), device=DEVICE)[::2]
    target[: rows // 2] = 1
    valid = target != -1
    weight, expected = None, valid.double()
    if dtype is not None:
        weight = torch.rand(3 * rows, device=DEVICE).to(dtype)[1::3]
        expected = weight.double().masked_fill(~valid, 0.0)
        weight[~valid] = math.nan
    if mean:
        expected = expected / max(int(valid.sum()), 1)
    found = row_weights.row_weights(Marks(target, -1, mean), weight)
    assert torch.equal(found == 0, expected == 0)
    torch.testing.assert_close(found, expected.float(), rtol=2e-7, atol=0)


def test_row_weights_with_a_stride_beyond_32_bits():
    stride = 2**30  # times 2
    memory = torch.empty(2 * stride + 1, dtype=torch.bfloat16, device=DEVICE)  # only the weights are accessed
    weight = memory.as_strided((3,), (stride,)).copy_(torch.tensor([1.0, 2.0, 3.0], device=DEVICE))
    found = row_weights.row_weights(Marks(torch.tensor([0, -100, 1], device=DEVICE), -100, False), weight)
    assert found.tolist() == [1.0, 0.0, 3.0]


def test_row_weights_where_every_label_is_ignored():
    target = torch.full((300,), -100, device=DEVICE)
    assert not row_weights.row_weights(Marks(target, -100, True), None).any()


@each_kernel
@pytest.mark.parametrize(("rows", "classes"), PATHS[:2])
@pytest.mark.parametrize(("weighted", "mean"), [(False, True), (True, False)])
def test_labels_counted_by_the_row_kernel(monkeypatch, name, rows, classes, weighted, mean):
    student, teacher, target = logits(rows, classes), logits(rows, classes), labels(rows, classes)
    target[::2] = 1
    student[target == 1] = math.nan
    marks = Marks(target, 1, mean)
    weight = torch.rand(rows, device=DEVICE) if weighted else None
    expected = kernel(name, student, teacher, target, row_weights.row_weights(marks, weight))
    if LOSSES[name][0] in SOFTMAX:  # the others have no labels
        monkeypatch.setattr(row_weights, "row_weights", None)
    found = kernel(name, student, teacher, target, weight, marks=marks)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert not found[0][::2].any()
    assert found[0].isfinite().all()


@pytest.mark.parametrize(("rows", "classes"), [(600, 10), PATHS[2]])
def test_labels_counted_in_several_steps_or_launches(rows, classes):
    student, teacher, target = logits(rows, classes), logits(rows, classes), labels(rows, classes)
    target[0] = 1
    marks, weight = Marks(target, 1, True), torch.rand(rows, device=DEVICE)
    expected = kernel("ls-dkd", student, teacher, target, row_weights.row_weights(marks, weight))
    found = kernel("ls-dkd", student, teacher, target, weight, marks=marks)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize(
    ("rows", "programs", "step", "dtype", "mean", "expected"),
    [
        (2048, 512, 1, None, True, True),
        (2049, 1, 1, torch.float32, True, False),
        (2048, 513, 1, None, True, False),
        (5000, 5000, 1, torch.float32, False, True),
        (10, 10, 2, None, True, False),
        (10, 10, 1, torch.bfloat16, True, False),
    ],
)
def test_which_labels_the_row_kernel_counts(rows, programs, step, dtype, mean, expected):
    target = torch.zeros(rows * step, dtype=torch.int64)[::step]
    weight = None if dtype is None else torch.ones(rows, dtype=dtype)
    assert row_weights.by_row_kernel(Marks(target, -100, mean), weight, programs) is expected


def test_labels_beside_weights_that_are_not_contiguous():
    student, teacher, target = logits(6, 10), logits(6, 10), labels(6, 10)
    weight, marks = torch.rand(12, device=DEVICE)[::2], Marks(target, int(target[1]), False)
    found = kernel("ce-kd", student, teacher, target, weight, marks=marks)
    expected = kernel("ce-kd", student, teacher, target, weight.clone(), marks=marks)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_every_label_ignored_in_the_row_kernel():
    student, teacher, target = logits(6, 10), logits(6, 10), torch.full((6,), -100, device=DEVICE)
    found = kernel("ce-kd", student, teacher, target, marks=Marks(target, -100, True))
    assert not any(one.any() for one in found)


@pytest.mark.parametrize(("rows", "classes"), [(5, 7), (300, 20), (2, 9000)])
@pytest.mark.parametrize("pairs", [1, 3])
@pytest.mark.parametrize("one_per_pair", [False, True])
def test_scaled_rows(rows, classes, pairs, one_per_pair):
    gradient = torch.randn(pairs * rows, classes, device=DEVICE)
    factors = torch.randn(pairs, 2 * rows, device=DEVICE)[:, ::2]
    factors[:, rows // 2] = 1.0
    if one_per_pair:
        factors[1:2] = 1.0
        factors = factors[:, :1].expand(pairs, rows)
    scaled = gradient.clone()
    launch.scale_rows_(scaled, factors)
    assert torch.equal(scaled, gradient * factors.reshape(-1, 1))


# ---- sums over rows ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ce-kd", "jsd", "binary-kl-norm"])
@pytest.mark.parametrize(
    ("rows", "classes", "pairs"), [(6, 10, 3), (300, 10, 1), (3, 700, 1), (2, 9000, 1), (1, 9000, 2)]
)
def test_rows_are_summed_by_the_last_program(name, rows, classes, pairs):
    loss, options, labelled = LOSSES[name]
    students, teachers = [logits(rows, classes) for _ in range(pairs)], [logits(rows, classes)] * pairs
    target = labels(rows, classes) if labelled else None
    with_terms = bool(SPEC[loss].terms)
    call = Call(target, None, 1, loss, options, None, "triton", True, with_terms)
    terms = torch.empty(4, pairs * rows, device=DEVICE) if with_terms else None
    alone = Outputs(torch.empty(pairs * rows, device=DEVICE), terms)
    launch.row_loss(students, teachers, call, alone)
    for _ in range(2):  # the counters are reset
        outputs = launch.with_sums(Outputs(torch.empty(pairs * rows, device=DEVICE), terms), pairs, call)
        launch.row_loss(students, teachers, call, outputs)
        assert outputs.sums.shape == (() if pairs == 1 else (pairs,))
        torch.testing.assert_close(outputs.sums.view(-1), alone.rows.view(pairs, -1).sum(-1))
        if with_terms:
            sums = terms.view(4, pairs, rows).sum(-1)
            torch.testing.assert_close(outputs.term_sums.view(4, pairs), sums)
        assert not outputs.counters.any()


def test_more_rows_are_summed_afterwards():
    call = Call(None, None, 1, "softmax", LOSSES["kd"][1], None, "triton", True, False)
    for rows, summed in ((row_sums.MOST_ROWS, True), (row_sums.MOST_ROWS + 1, False)):
        outputs = launch.with_sums(Outputs(torch.empty(2 * rows, device=DEVICE)), 2, call)
        assert (outputs.sums is not None) == summed


def test_counters_are_shared_on_a_stream_and_given_away_once_otherwise():
    rows = torch.empty(3, device=DEVICE)
    shared = row_sums.counters_of(rows, 1)
    assert row_sums.counters_of(rows, 5).data_ptr() == shared.data_ptr()
    assert row_sums.counters_of(rows, row_sums.MOST_PAIRS).data_ptr() == shared.data_ptr()
    assert row_sums.counters_of(rows, row_sums.MOST_PAIRS + 1) is None
    pool = row_sums._Pool(rows.device)
    taken = [pool.take(5) for _ in range(row_sums.COUNTERS // 8)]
    assert len({counters.data_ptr() for counters in taken}) == len(taken)
    assert all(counters.data_ptr() % 16 == 0 for counters in taken)
    assert pool.take(1) is None


def test_kept_launches_tell_widths_of_numbers_as_triton_does():
    """It types whole numbers from -2^31 to 2^31 - 1 as i32, all others as i64."""
    narrow, wide = [_kinds([number]) for number in (5, -(2**31))], [_kinds([2**31]), _kinds([-(2**31) - 1])]
    assert narrow[0] == narrow[1] != wide[0] == wide[1]


def test_kept_launches_tell_kernels_and_devices_apart(monkeypatch):
    """A kernel is compiled for a device and loaded into its memory."""
    driver = types.SimpleNamespace()
    monkeypatch.setattr(launch_options, "driver", types.SimpleNamespace(active=driver))
    keys = set()
    for device in (0, 1):
        driver.get_current_device = functools.partial(int, device)
        for of in (launch.scale_rows, launch.pointwise_rows) * 2:
            keys.add(launch_options.key_of(of, (logits(3), 1), {"TILE": 16}))
    assert len(keys) == 4
