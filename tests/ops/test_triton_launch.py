"""The Triton launcher: layouts, weights, options and accuracy.

Results are compared with ``fastkd.reference`` in float64, on the same inputs.
"""

import functools
import math
import types

import pytest
import torch

pytest.importorskip("triton")

from fastkd import reference
from fastkd.ops import plan
from fastkd.ops.call import Call, Marks, Outputs
from fastkd.ops.spec import CASES, Needs
from fastkd.ops.spec import LOSSES as SPEC
from fastkd.ops.triton import launch, launch_options, row_sums, row_weights
from fastkd.ops.triton.launch_options import _kinds
from tests.cases import KERNELS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# By case name: loss, options, whether it takes a label.
LOSSES = {
    name: (loss.name, tuple(map(float, case.options)), case.labelled) for name, (loss, case) in CASES.items()
}
SOFTMAX = {name for name, loss in SPEC.items() if loss.family == "softmax"}
POINTWISE = tuple(name for name, (loss, _) in CASES.items() if loss.family == "pointwise")
each_loss = pytest.mark.parametrize("name", LOSSES)
each_kernel = pytest.mark.parametrize("name", KERNELS)
# (rows, classes): several rows per program; one tile; split over programs (one launch per phase).
PATHS = [(6, 10), (3, 700), (2, 9000)]


def run(students, teachers, target, weight, scale, loss, options, rows, gradient, dynamic=None, marks=None):
    call = Call(
        target, weight, 1 / scale, loss, options, dynamic, "triton", False, False, gradient is not None,
        marks=marks,
    )  # fmt: skip
    launch.row_loss(students, teachers, call, Outputs(rows, None, gradient))


def kernel(name, student, teacher, target, weight=None, scale=1.0, dynamic=False, marks=None):
    """Losses [N] and gradient [N, C] from the kernels."""
    loss, options, labelled = LOSSES[name]
    classes = student.shape[-1]
    count = student.numel() // classes
    values = None
    if dynamic:
        values = torch.tensor(options, device=DEVICE)
        options = tuple(value if value in (0.0, 1.0) else math.nan for value in options)
    rows = torch.full((count,), math.nan, device=DEVICE)
    gradient = torch.full((count, classes), math.nan, device=DEVICE, dtype=student.dtype)
    label = target if labelled else None
    run([student], [teacher], label, weight, scale, loss, options, rows, gradient, values, marks)
    return rows, gradient


def reference_in(dtype, name, student, teacher, target):
    """Losses and gradient of the reference in ``dtype``."""
    loss, options, _ = LOSSES[name]
    classes = student.shape[-1]
    student = student.reshape(-1, classes).to(dtype).requires_grad_()
    teacher = teacher.reshape(-1, classes).to(dtype)
    rows, _ = SPEC[loss].rows(student, teacher, target, *options)
    (gradient,) = torch.autograd.grad(rows.sum(), student)
    return rows.detach().double(), gradient.double()


def logits(*shape, spread=3.0):
    return spread * torch.randn(*shape, device=DEVICE)


def labels(rows, classes):
    return torch.randint(0, classes, (rows,), device=DEVICE)


def assert_close(found, expected, loss_error=1e-5, gradient_error=1e-5):
    (rows, gradient), (true_rows, true_gradient) = found, expected
    assert (rows - true_rows).norm() <= loss_error * true_rows.norm()
    assert (gradient - true_gradient).norm() <= gradient_error * true_gradient.norm()


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


# ---- NaN and infinity ----------------------------------------------------------------------------------


# Classes of student and teacher that are spoilt, a row for each: first, label, and last, in a tile that is
# not full. A row that programs share takes the interpreter a second.
EACH_PLACE = ((0, 3, -1), (0, 3, -1))
FEW_PLACES = ((3, -1), (0,))


def spoilt(name, rows, classes, value, places=EACH_PLACE):
    """Logits with ``value`` in rows of its own; the places (row, class); and the logits without it."""
    student, teacher, target = logits(rows, classes), logits(rows, classes), labels(rows, classes)
    target[:] = 3
    pair, spoilt_places = [student.clone(), teacher.clone()], []
    for which, of_model in enumerate(places[: 1 if name in ("ce", "ce-smoothed") else 2]):
        for place in of_model:
            spoilt_places.append((len(spoilt_places), place % classes))
            pair[which][spoilt_places[-1]] = value
    return pair, spoilt_places, (student, teacher, target)


@each_kernel
@pytest.mark.parametrize(("rows", "classes"), [(8, 10), (7, 700)])
def test_a_nan_is_a_nan_in_that_row_alone(name, rows, classes):
    pair, places, (student, teacher, target) = spoilt(name, rows, classes, math.nan)
    clean = kernel(name, student, teacher, target)
    values, gradient = kernel(name, *pair, target)
    for row, place in places:
        assert values[row].isnan()
        bad = gradient[row].isnan()
        assert bad.nonzero().flatten().tolist() == [place] if name in POINTWISE else bad.all()
    assert torch.equal(values[len(places) :], clean[0][len(places) :])
    assert torch.equal(gradient[len(places) :], clean[1][len(places) :])


@pytest.mark.parametrize("name", [name for name in KERNELS if name not in POINTWISE])
@pytest.mark.parametrize(("rows", "classes", "places"), [(6, 10, EACH_PLACE), (3, 9000, FEW_PLACES)])
def test_an_infinite_logit_is_not_hidden(name, rows, classes, places):
    pair, places, (_, _, target) = spoilt(name, rows, classes, math.inf, places)
    values, _ = kernel(name, *pair, target)
    for row, _ in places:
        assert not values[row].isfinite()


@pytest.mark.parametrize("name", [name for name in KERNELS if name not in POINTWISE])
def test_sums_of_earlier_tiles_vanish_before_a_huge_logit(name):
    """Their share is 0, whatever they come to relative to a maximum of 3e38."""
    if CASES[name][0].needs(CASES[name][1].options) & (Needs.STANDARDIZED | Needs.LOG_RATIO):
        pytest.skip("a variance or a gradient that overflows")
    student, teacher, target = logits(2, 9000), logits(2, 9000), torch.tensor([0, 8998], device=DEVICE)
    student[:, 8999], teacher[:, 8999] = 1e38, 3e38
    found = kernel(name, student, teacher, target)
    assert found[0].isfinite().all()
    assert found[1].isfinite().all()


# ---- accuracy ------------------------------------------------------------------------------------------


def regimes(rows, classes):
    """Names, students, teachers."""
    yield "random", logits(rows, classes), logits(rows, classes)
    yield "small", logits(rows, classes, spread=0.1), logits(rows, classes, spread=0.1)
    yield "offset", logits(rows, classes), logits(rows, classes) + 1000
    yield "at 10,000", logits(rows, classes) + 1e4, logits(rows, classes) + 1e4
    for apart in (1e-1, 1e-2, 1e-3):
        student = logits(rows, classes)
        yield f"{apart} apart", student, student + apart * torch.randn_like(student)
    student = logits(rows, classes)
    yield "offset and near", student, student + 0.03 * torch.randn_like(student) + 1000
    index = torch.arange(rows, device=DEVICE)
    student, teacher = logits(rows, classes), logits(rows, classes)
    student[index, index % classes] += 20
    teacher[index, index % classes] += 20
    yield "confident", student, teacher
    yield "confident and near", student, student + 1e-2 * torch.randn_like(student)


def mean_square(error):
    return error.square().mean().sqrt()


@each_loss
@pytest.mark.parametrize("classes", [10, 100])
def test_no_worse_than_eager(name, classes):
    """The error's root mean square over the rows of a regime is close to eager's or better.

    A single row's error is a few roundings of float32, and eager's may be 0 by chance, so it has a looser
    bound: twice eager's largest error, plus the rounding of the largest number that the loss adds up.
    """
    rows = 12
    target = torch.arange(rows, device=DEVICE) % classes
    for regime, student, teacher in regimes(rows, classes):
        if name in POINTWISE and "offset" in regime:
            continue  # these losses depend on the offset; rounding errors of their large sums are alike
        values, gradient = kernel(name, student, teacher, target)
        true_values, true_gradient = reference_in(torch.float64, name, student, teacher, target)
        eager_values, eager_gradient = reference_in(torch.float32, name, student, teacher, target)
        options = LOSSES[name][1]
        unit = 1e-7 * max(1.0, options[0] ** 2) * max(1.0, 1.0, *options[1:5])
        error, eager = values - true_values, eager_values - true_values
        assert mean_square(error) <= 1.5 * mean_square(eager) + 4e-7 * mean_square(true_values) + unit, regime
        assert (error.abs() <= 2 * eager.abs().max() + 1e-6 * true_values.abs() + 5 * unit).all(), regime
        error, eager = gradient - true_gradient, eager_gradient - true_gradient
        floor = 1e-6 * mean_square(true_gradient)
        # numpy's sums in the interpreter have more roundings than the tree sums of torch or a GPU.
        assert mean_square(error) <= 3 * mean_square(eager) + floor, regime


@pytest.mark.parametrize(
    ("name", "loss_error"),
    # Of eager 2e-3 to 2e-2 with DKD.
    [("kd-t1", 2e-3), ("reverse-kl", 2e-3), ("jsd", 2e-3), ("dkd", 4e-3), ("nkd", 2e-3)],
)
def test_a_common_offset_has_no_effect(name, loss_error):
    """32,000 classes, near equality, the teacher 1000 above the student."""
    student = 3 * torch.randn(2, 32_000, device=DEVICE)
    teacher = student + 0.03 * torch.randn_like(student) + 1000
    target = labels(2, 32_000)
    assert_close(
        kernel(name, student, teacher, target),
        reference_in(torch.float64, name, student, teacher, target),
        loss_error,
        1e-4,
    )


def test_log_odds_of_a_confident_label_near_equality(monkeypatch):
    """Their difference is not that of two rounded numbers near 15; the label has no other gradient."""
    loss, options, labelled = LOSSES["dkd"]
    monkeypatch.setitem(LOSSES, "dkd", (loss, (1.0, *options[1:]), labelled))
    target = torch.arange(100, device=DEVICE) % 10
    student = logits(100, 10).scatter_(1, target[:, None], 16.0)
    teacher = student + 1e-4 * torch.randn_like(student)
    found, true = (
        gradient.gather(1, target[:, None])
        for _, gradient in (
            kernel("dkd", student, teacher, target),
            reference_in(torch.float64, "dkd", student, teacher, target),
        )
    )
    assert (found - true).norm() <= 5e-4 * true.norm()


def test_tvd_of_classes_whose_probabilities_are_equal():
    """They have no slope, others have."""
    student = torch.tensor([[0.0, 0.0, -1.0, -2.0]], device=DEVICE)
    teacher = student[:, [0, 1, 3, 2]]
    found = kernel("tvd", student, teacher, None)
    assert_close(found, reference_in(torch.float64, "tvd", student, teacher, None))


@pytest.mark.parametrize("name", ["lskd", "ls-dkd", "ce-lskd"])
@pytest.mark.parametrize(("rows", "classes"), [(6, 10), (2, 9000)])
def test_a_constant_row_has_no_deviation(name, rows, classes):
    """In the student, the teacher or both."""
    target = labels(rows, classes)
    constant = torch.full((rows, classes), 7.3, device=DEVICE)
    student = logits(rows, classes)
    found = kernel(name, student, constant, target)
    assert_close(found, reference_in(torch.float64, name, student, constant, target))
    rows_of_both, gradient = kernel(name, constant, constant, target)
    if name != "ce-lskd":
        assert (rows_of_both == 0).all()
        assert (gradient == 0).all()
    assert rows_of_both.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize(("rows", "classes"), [(6, 10), (2, 9000)])
@pytest.mark.parametrize("name", ["lskd", "ls-dkd"])
def test_a_deviation_of_the_size_of_epsilon(name, rows, classes):
    """The epsilon added to it is 1e-7."""
    student, teacher = logits(rows, classes, spread=1e-7), logits(rows, classes)
    target = labels(rows, classes)
    found = kernel(name, student, teacher, target)
    assert_close(found, reference_in(torch.float64, name, student, teacher, target))


def test_a_constant_student_of_lskd_at_temperature_4():
    rows = torch.empty(1, device=DEVICE)
    student, teacher = torch.full((1, 10), 7.3, device=DEVICE), logits(1, 10)
    options = (4.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
    run([student], [teacher], None, None, 1.0, "softmax", options, rows, None)
    true, _ = reference.softmax_rows(student.double(), teacher.double(), None, *options)
    torch.testing.assert_close(rows.double(), true, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["lskd", "ls-dkd"])
@pytest.mark.parametrize("temperature", [1e-2, 1e-6])
def test_constant_rows_at_a_small_temperature_are_finite(name, temperature, monkeypatch):
    loss, options, labelled = LOSSES[name]
    monkeypatch.setitem(LOSSES, name, (loss, (temperature, *options[1:]), labelled))
    constant = torch.full((2, 10), 7.3, device=DEVICE)
    for student, teacher in ((constant, logits(2, 10)), (logits(2, 10), constant), (constant, constant)):
        rows, gradient = kernel(name, student, teacher, labels(2, 10))
        assert rows.isfinite().all()
        assert gradient.isfinite().all()


@each_kernel
@pytest.mark.parametrize(("rows", "classes"), PATHS)
def test_equal_logits_have_no_gradient(name, rows, classes):
    if not CASES[name][1].vanishes:
        pytest.skip("has a gradient at equal logits")
    student = logits(rows, classes)
    values, gradient = kernel(name, student, student.clone(), labels(rows, classes))
    assert (gradient == 0).all()
    assert (values == 0).all()


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
