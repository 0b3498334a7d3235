"""The CUDA kernels without a GPU: the same headers, compiled for the host by tests/cuda_emulation, which runs
every thread as a fiber.

Every loss, layout and launch plan is compared with the reference in float64, with the tolerances of the other
backends. Not covered: the instructions of csrc/cuda/device.h, and speed.
"""

import ctypes
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastkd
from fastkd.ops import backend, team_plan
from fastkd.ops.call import Call, Outputs
from fastkd.ops.spec import SoftmaxOptions
from fastkd.ops.team_plan import TeamPlan, plan_team
from tests.cases import (
    BY_NAME,
    CASES,
    Case,
    assert_matches,
    assert_near_equal_gradient_is_no_worse_than_eager,
    assert_saturated_logits_stay_finite,
    each_case,
    error,
    exact,
    loss_and_gradient,
    make_logits,
)
from tests.cuda_emulation import CODES, Plan
from tests.losses.test_numerics import AT_TEMPERATURE, assert_as_exact, confident

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def forced(emulated, *plan):
    emulated.plan = lambda *_: TeamPlan(*plan)


@each_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [2, 3, 10, 100, 1000, 1025])
def test_matches_reference(emulated, case, classes, dtype):
    student, teacher, target = make_logits(4, classes, dtype)
    target[1] = -100
    floor = 1.0 if classes == 2 else 1e-2
    assert_matches(case, student, teacher, target, torch.randn(4), floor, reduction="none")


# Threads per row, rows per block, blocks per row, slots: rows cached entirely, in part and not at all.
TEAMS = {
    "a thread": (1, 32, 1, 160),
    "half a warp, two rows": (16, 2, 1, 12),
    "a warp": (32, 1, 1, 9),
    "a warp, eight rows": (32, 8, 1, 4),
    "a block": (128, 1, 1, 3),
    "a block, partly cached": (64, 1, 1, 5),
    "the largest block": (512, 1, 1, 1),
    "a cluster of two": (64, 1, 2, 3),
    "a cluster of three, partly cached": (32, 1, 3, 5),
    "a cluster of four, not cached": (32, 1, 4, 4),
    "a cluster of eight": (32, 1, 8, 2),
    "a cluster of sixteen": (32, 1, 16, 1),
}


@each_case
@pytest.mark.parametrize("team", TEAMS.values(), ids=TEAMS)
def test_every_team(emulated, case, team):
    classes = 1203
    forced(emulated, *team)
    if team == TEAMS["a cluster of four, not cached"]:
        classes = 5003
    student, teacher, target = make_logits(3, classes)
    target[1] = classes - 1
    assert_matches(case, student, teacher, target, torch.randn(3), reduction="none")


@each_case
@pytest.mark.parametrize("classes", [8193, 40_000])
def test_long_rows_as_planned(emulated, case, classes):
    """The plan for many rows, which has the longest shares per thread; two rows are run."""
    emulated.plan = lambda rows, classes, element_bytes: plan_team(4096, classes, element_bytes, (9, 0), 132)
    student, teacher, target = make_logits(2, classes)
    target[1] = classes - 1
    assert_matches(case, student, teacher, target, torch.randn(2), reduction="none")


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0)], ids=str)
@pytest.mark.parametrize("name", ["kd", "ls-dkd", "jsd"])
def test_rows_longer_than_shared_memory(emulated, name, capability):
    classes = 300_001
    emulated.plan = lambda rows, classes, element_bytes: plan_team(
        4096, classes, element_bytes, capability, 132
    )
    student, teacher, target = make_logits(1, classes)
    assert emulated.plan(1, classes, 8).cached(classes) < 1
    assert_matches(BY_NAME[name], student, teacher, target, reduction="none")


def test_a_row_is_cached_where_it_fits_and_takes_a_cluster_where_each_thread_has_many_vectors():
    assert plan_team(4096, 18_000, 4, (9, 0), 132).cached(18_000) == 1
    for classes, blocks in ((32_768, 1), (131_072, 4), (1_000_000, 8)):
        assert plan_team(4096, classes, 4, (9, 0), 132).blocks_per_row == blocks
        assert plan_team(4096, classes, 4, (8, 0), 108).blocks_per_row == 1


@each_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["strided rows", "offset", "shared row", "guarded", "teacher elsewhere"])
def test_layouts(emulated, case, layout, dtype):
    """Rows with any alignment, the same for both models or not. The gaps between guarded rows are NaN, so
    that reading them shows."""

    def view(logits, shift=3):
        rows, classes = logits.shape
        match layout:
            case "strided rows":
                return torch.cat([logits, logits + 1], 1)[:, :classes]
            case "offset" | "teacher elsewhere":
                return torch.cat([logits.new_zeros(shift), logits.flatten()])[shift:].view_as(logits)
            case "shared row":
                return logits[:1].expand_as(logits)
            case "guarded":
                around = logits.new_full((rows, classes + 21), torch.nan)
                around[:, 10 : 10 + classes] = logits
                return around[:, 10 : 10 + classes]

    student, teacher, target = make_logits(6, 45, dtype)
    student, teacher = view(student), view(teacher, 6 if layout == "teacher elsewhere" else 3)
    assert_matches(case, student, teacher, target, torch.randn(6), reduction="none")


@each_case
def test_mixed_dtypes(emulated, case):
    student, teacher, target = make_logits(3, 300)
    assert_matches(case, student, teacher.bfloat16(), target, reduction="sum")
    assert_matches(case, student.half(), teacher, target, reduction="sum")


@pytest.mark.parametrize("case", [case for case in CASES if case.vanishes], ids=lambda case: case.name)
@pytest.mark.parametrize("team", [(32, 1, 1, 6), (128, 1, 1, 2), (32, 1, 4, 2)], ids=str)
def test_equal_logits_give_an_exactly_zero_gradient(emulated, case, team):
    forced(emulated, *team)
    for dtype in DTYPES:
        student, _, target = make_logits(4, 1500, dtype)
        loss, gradient = loss_and_gradient(case, student, student.clone(), target, reduction="none")
        assert gradient.count_nonzero() == 0
        assert loss.count_nonzero() == 0


@each_case
def test_near_equal_gradient_is_no_worse_than_eager(emulated, case):
    """Within a factor of 2: the emulated power of two has the device's maximum error."""
    assert_near_equal_gradient_is_no_worse_than_eager(case, 32, 2)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.family == "softmax"], ids=lambda case: case.name
)
@pytest.mark.parametrize("classes", [10, 1000])
def test_confident_rows_are_as_exact_as_eager(emulated, case, classes):
    student, teacher = (confident(torch.randn(24, classes)) for _ in range(2))
    assert_as_exact(case, student, teacher, torch.zeros(24, dtype=torch.int64))


@pytest.mark.parametrize("name", ["kd", "dkd", "dckd", "reverse-kl"])
@pytest.mark.parametrize("temperature", [1e-6, 1e6])
def test_extreme_temperatures(emulated, name, temperature):
    """At 1e-6 the student has one probability, and the gradient of reverse KL is exactly 0 whichever thread
    has that class."""
    case = Case(name, partial(AT_TEMPERATURE[name], temperature=temperature))
    assert_as_exact(case, *make_logits(24, 30))


@pytest.mark.parametrize(
    "case", [case for case in CASES if not case.averages_classes], ids=lambda case: case.name
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_that_rise_along_the_row(emulated, case, dtype):
    """Every vector has a logit far above all before it, so that the sums are rebased at each."""
    forced(emulated, 8, 4, 1, 4)
    student, teacher, target = make_logits(4, 600, dtype)
    rise = torch.linspace(-300, 300, 600)
    assert_matches(case, (student + rise).to(dtype), (teacher + rise).to(dtype), target, reduction="none")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_model_without_unmasked_classes_is_uniform(emulated, dtype):
    student, teacher, _ = make_logits(2, 96, dtype)
    uniform, loss = torch.full((96,), 1 / 96), partial(fastkd.kd_loss, temperature=2.0)
    for masked in (student, teacher):
        logits = [student.clone(), teacher.clone()]
        logits[masked is teacher][0] = -torch.inf
        student_row = logits[0].requires_grad_()
        loss(student_row, logits[1], reduction="none").sum().backward()
        q, p = ((row[0].float() / 2).softmax(-1).nan_to_num(1 / 96) for row in (student_row, logits[1]))
        assert torch.equal((p if masked is teacher else q).detach(), uniform)
        torch.testing.assert_close(student_row.grad[0].float(), 2 * (q - p).detach(), rtol=1e-2, atol=1e-5)


@each_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_saturated_logits_stay_finite(emulated, case, dtype):
    assert_saturated_logits_stay_finite(case, dtype)


@pytest.mark.parametrize(
    "case",
    # Standardised rows and label smoothing average over all classes: undefined with masked ones.
    [case for case in CASES if not case.averages_classes],
    ids=lambda case: case.name,
)
def test_classes_masked_in_both_models_add_nothing(emulated, case):
    student, teacher, target = make_logits(4, 600)
    target %= 300
    masked_student, masked_teacher = student.clone(), teacher.clone()
    masked_student[:, 300:] = masked_teacher[:, 300:] = -torch.inf
    loss, gradient = loss_and_gradient(case, masked_student, masked_teacher, target, reduction="none")
    fewer = (student[:, :300], teacher[:, :300], target)
    true_loss, true_gradient = exact(case, *fewer, reduction="none")
    assert error(loss, true_loss) < 1e-5
    assert error(gradient[:, :300], true_gradient) < 1e-5
    assert gradient[:, 300:].count_nonzero() == 0


@each_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nonfinite_logits_are_not_hidden(emulated, case, dtype):
    for value in (torch.nan, torch.inf):
        student, teacher, target = make_logits(3, 700, dtype)
        student[1, 607] = value
        if value == torch.inf and case.family == "pointwise":
            continue  # a Bernoulli probability of 1: the loss is infinite, not NaN
        loss = case.loss(student, teacher, target, reduction="none")
        assert torch.isnan(loss[1])
        assert torch.isfinite(loss[[0, 2]]).all()


@pytest.mark.parametrize("case", [case for case in CASES if case.ignores_rows], ids=lambda case: case.name)
@pytest.mark.parametrize("team", [(8, 8, 1, 12), (64, 1, 1, 4), (32, 1, 2, 4)], ids=str)
def test_ignored_rows_are_not_read(emulated, case, team):
    forced(emulated, *team)
    student, teacher, target = make_logits(5, 600)
    target[2] = -7
    student[2], teacher[2] = torch.nan, torch.inf
    options = {"reduction": "none", "ignore_index": -7}
    loss, gradient = loss_and_gradient(case, student, teacher, target, **options)
    others = torch.tensor([0, 1, 3, 4])
    true_loss, true_gradient = exact(case, student[others], teacher[others], target[others], **options)
    assert error(loss[others], true_loss) < 1e-5
    assert error(gradient[others], true_gradient) < 1e-5
    assert loss[2] == 0
    assert gradient[2].count_nonzero() == 0


def outputs(rows, classes, dtype=torch.float32):
    """Losses, terms and gradient as an operator allocates them, filled with a value that no kernel writes."""
    return (
        torch.full((rows,), 77.0),
        torch.full((4, rows), 77.0),
        torch.full((rows, classes), 77.0, dtype=dtype),
    )


KD = SoftmaxOptions(4.0, kd_weight=1.0)
EVERYTHING = SoftmaxOptions(4.0, 0.5, 0.9, 1.1, 2.0, 0.1, fix_acquired=True)


def call_of(options, target=None, weight=None, divisor=1):
    return Call(target, weight, divisor, "softmax", options, None, "native", False, True, True)


@pytest.mark.parametrize("team", [(16, 4, 1, 4), (64, 1, 1, 4), (32, 1, 2, 4)], ids=str)
def test_a_label_out_of_range_poisons_its_row(emulated, team):
    forced(emulated, *team)
    student, teacher, target = make_logits(3, 300)
    target[1] = 300
    out = outputs(3, 300)
    emulated.row_loss([student], [teacher], call_of(EVERYTHING, target), Outputs(*out))
    for values in (out[0], out[1].t(), out[2]):
        assert torch.isnan(values[1]).all()
        assert torch.isfinite(values[[0, 2]]).all()


def test_weights_and_terms(emulated):
    student, teacher, target = make_logits(5, 200)
    weight = torch.tensor([0.5, 2.0, 0.0, -1.0, 1.0])
    plain, weighted = outputs(5, 200), outputs(5, 200)
    emulated.row_loss([student], [teacher], call_of(EVERYTHING, target), Outputs(*plain))
    emulated.row_loss([student], [teacher], call_of(EVERYTHING, target, weight, 4), Outputs(*weighted))
    for once, scaled in zip(
        (plain[0], plain[1].t(), plain[2]), (weighted[0], weighted[1].t(), weighted[2]), strict=True
    ):
        factor = 0.25 * weight.view(-1, *[1] * (once.dim() - 1))
        torch.testing.assert_close(scaled, factor * once)
    torch.testing.assert_close(plain[0], torch.tensor([0.5, 0.9, 1.1, 2.0]) @ plain[1])


@pytest.mark.parametrize("team", [(8, 16, 1, 12), (64, 1, 1, 3), (32, 1, 4, 4)], ids=str)
def test_several_pairs_in_one_launch_give_the_same_bits(emulated, team):
    heads = [make_logits(5, 700, torch.bfloat16) for _ in range(8)]
    alone, together, pairs = [], [], []
    forced(emulated, *team)
    for student, teacher, target in heads:
        alone.append(outputs(5, 700, torch.bfloat16))
        emulated.row_loss([student], [teacher], call_of(EVERYTHING, target), Outputs(*alone[-1]))
        together.append(outputs(5, 700, torch.bfloat16))
        pairs.append(emulated.rows(student, teacher, target, None, 1.0, *together[-1]))
    emulated.launch(pairs, call_of(EVERYTHING, target), team)
    for one, other in zip(alone, together, strict=True):
        assert all(map(torch.equal, one, other))
    with pytest.raises(RuntimeError, match="1 to 8 pairs"):
        emulated.launch([*pairs, pairs[0]], call_of(EVERYTHING, target), team)


@each_case
def test_same_result_every_time(emulated, case):
    forced(emulated, 64, 1, 2, 4)
    student, teacher, target = make_logits(2, 3000)
    first = loss_and_gradient(case, student, teacher, target)
    assert all(map(torch.equal, first, loss_and_gradient(case, student, teacher, target)))


def test_only_the_rows_are_written(emulated):
    for classes in (5, 45, 1000):
        around = torch.full((4, classes + 17), 5.0)
        out = [torch.empty(4), torch.empty(0, 4), around[:, 3 : 3 + classes]]
        student, teacher, _ = make_logits(4, classes)
        emulated.row_loss([student], [teacher], call_of(KD), Outputs(*out))
        assert (around[:, :3] == 5).all()
        assert (around[:, 3 + classes :] == 5).all()
        assert (out[2] != 5).all()


def test_without_a_gradient_only_the_loss_is_written(emulated):
    student, teacher, _ = make_logits(3, 900)
    forced(emulated, 64, 1, 1, 2)  # as many slots as vectors
    loss = fastkd.kd_loss(student, teacher)
    torch.testing.assert_close(loss, fastkd.kd_loss(student.requires_grad_(), teacher).detach())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_conversions_are_torchs(emulated, dtype):
    values = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    values = values[~values.isnan()].view(1, -1)
    for factor in (-1.0, 0.3, 1e-3, 1.5):  # of the last, half the products are ties
        scaled = values.clone()
        emulated.scale_rows_(scaled, torch.tensor([factor]))
        assert torch.equal(scaled, (values.float() * factor).to(dtype))


def test_scaled_rows(emulated):
    factors = torch.tensor([2.0, 1.0, 0.0, -0.5])
    for classes in (7, 100, 5000):
        gradient = torch.randn(4, classes)
        scaled = gradient.clone()
        emulated.scale_rows_(scaled, factors)
        assert torch.equal(scaled, gradient * factors[:, None])
        emulated.scale_rows_(scaled, torch.tensor(3.0).expand(4))
        assert torch.equal(scaled, gradient * factors[:, None] * 3.0)


@pytest.mark.parametrize(
    ("plan", "why"),
    [
        ((48, 1, 1, 4), "power of two"),
        ((16, 1, 1, 4), "whole warps"),
        ((64, 4, 1, 4), "several rows"),
        ((32, 1, 17, 4), "1 to 16"),
        ((32, 1, 1, 3), "slots"),
        ((1024, 1, 1, 4), "512 threads"),
    ],
)
def test_invalid_plans_are_rejected(emulated, plan, why):
    student, teacher, _ = make_logits(2, 2000)
    rows = emulated.rows(student, teacher, None, None, 1.0, *outputs(2, 2000))
    with pytest.raises(RuntimeError, match=why):
        emulated.launch([rows], call_of(KD), plan)


def test_rows_whose_columns_overflow_32_bits_are_rejected(emulated):
    student, teacher, _ = make_logits(2, 2000)
    rows = emulated.rows(student, teacher, None, None, 1.0, *outputs(2, 2000))
    rows.classes = 2**31 - 2**20
    with pytest.raises(RuntimeError, match=r"at most 2\^31 - 2\^20 classes"):
        emulated.launch([rows], call_of(KD), (32, 1, 1, 4))


@given(
    st.integers(1, 100_000), st.integers(1, 3_000_000), st.sampled_from([4, 6, 8]),
    st.sampled_from([(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]), st.integers(20, 160), st.booleans(),
)  # fmt: skip
def test_plans_fit_the_machine(rows, classes, element_bytes, capability, multiprocessors, rereads):
    plan = plan_team(rows, classes, element_bytes, capability, multiprocessors, rereads)
    whole = team_plan.KIB_PER_MULTIPROCESSOR.get(capability, 100) * 1024
    assert plan.shared_bytes(element_bytes) <= whole - team_plan.RESERVED_BYTES
    assert plan.threads_per_row & (plan.threads_per_row - 1) == 0
    assert plan.threads_per_row * plan.rows_per_block % 32 == 0
    assert plan.threads_per_row * plan.rows_per_block <= team_plan.MAX_THREADS
    assert plan.rows_per_block == 1 or (plan.threads_per_row <= 32 and plan.blocks_per_row == 1)
    assert plan.blocks_per_row == 1 or capability >= (9, 0)
    needed = -(-team_plan.vectors_of(classes) // (plan.threads_per_row * plan.blocks_per_row))
    assert plan.slots >= min(needed, team_plan.STAGES)
    assert 0 <= plan.cached(classes) <= 1
    assert str(plan.threads_per_row) in plan.describe(classes)


def test_planner_and_launch_agree_on_shared_memory(emulated):
    for plan in TEAMS.values():
        for student, teacher in ((torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16)):
            launched = emulated.library.shared_bytes(
                ctypes.byref(Plan(*plan)), CODES[student], CODES[teacher]
            )
            assert launched == TeamPlan(*plan).shared_bytes(student.itemsize + teacher.itemsize)


def test_the_automatic_choice_on_a_gpu(monkeypatch):
    def choose(**reasons):
        for name in ("triton", "native"):
            monkeypatch.setitem(backend._PROBES, name, partial(lambda reason, _: reason, reasons.get(name)))
        backend._automatic.cache_clear()
        return backend.resolve("auto", "cuda", torch.bfloat16)

    def by_shape(labelled=False, rows=4096, classes=32768, family="softmax", dtype=torch.bfloat16):
        return backend.faster_for(choose(), torch.device("cuda"), family, labelled, rows, classes, dtype)

    try:
        assert choose() == "triton"
        monkeypatch.setattr(backend, "native_may_be_faster", lambda device: True)
        assert by_shape() == by_shape(labelled=True) == "native"
        for other in ({"rows": 100}, {"classes": 1000}, {"family": "pointwise"}, {"dtype": torch.float32}):
            assert by_shape(**other) == "triton"
        with fastkd.use_backend("triton"):
            assert by_shape() == "triton"
        monkeypatch.setattr(backend, "native_may_be_faster", lambda device: False)
        assert by_shape() == "triton"
        assert choose(native="no nvcc") == "triton"
        assert choose(triton="not installed") == "native"
        both = "triton is not available: gone; and native is not available: no nvcc"
        with pytest.warns(RuntimeWarning, match=both):
            assert choose(triton="gone", native="no nvcc") == "eager"
    finally:
        backend._automatic.cache_clear()
