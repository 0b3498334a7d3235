"""Every loss on every fused backend against the reference in float64: value and gradient.

grad_output is random: a backward that ignores it, or scales all rows alike, fails.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastkd
from fastkd.bench.cases import memory_bound
from fastkd.ops.plan import Device
from tests.cases import (
    BY_NAME,
    CASES,
    Case,
    assert_matches,
    assert_near_equal_gradient_is_no_worse_than_eager,
    assert_saturated_logits_stay_finite,
    each_case,
    each_kernel,
    error,
    exact,
    loss_and_gradient,
    make_logits,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CLASSES = [2, 3, 10, 100, 1000, 1023, 1025, 5000]


@each_case
@pytest.mark.parametrize(
    ("dtype", "classes"),
    [
        *((torch.float32, classes) for classes in CLASSES),
        *((torch.bfloat16, classes) for classes in (3, 1000, 1023, 5000)),
        *((torch.float16, classes) for classes in (2, 100, 1025)),
    ],
    ids=str,
)
def test_matches_reference(fused, case, classes, dtype):
    student, teacher, target = make_logits(4, classes, dtype, fused)
    target[1] = -100
    # Two standardised classes are always +-0.7: the true gradient is 0, so rounding is relative to a floor.
    floor = 1.0 if classes == 2 else 1e-2
    assert_matches(case, student, teacher, target, torch.randn(4, device=fused), floor, reduction="none")


@each_kernel
@pytest.mark.parametrize("classes", [8193, 20902])
def test_rows_of_several_tiles(fused, case, classes):
    student, teacher, target = make_logits(2, classes, torch.float32, fused)
    target[1] = classes - 1
    assert_matches(case, student, teacher, target, torch.randn(2, device=fused), reduction="none")


@each_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_that_grow_along_the_row(fused, case, dtype):
    """The running maximum rises often, never, or once by a large step."""
    student, teacher, target = make_logits(3, 4500, torch.float32, fused)
    ramp = torch.linspace(0, 90, 4500, device=fused)
    student, teacher = (logits + torch.stack([ramp, -ramp, 0 * ramp]) for logits in (student, teacher))
    student[2, 3000] = teacher[2, 4000] = 80.0
    student, teacher = student.to(dtype), teacher.to(dtype)
    assert_matches(case, student, teacher, target, torch.randn(3, device=fused), reduction="none")


@each_kernel
@pytest.mark.parametrize(("rows", "classes"), [(1, 70_001), (2, 150_001), (3, 270_001)])
def test_long_rows_on_three_threads(case, rows, classes):
    """On the CPU: rows split over threads, and whole rows per thread."""
    threads = torch.get_num_threads()
    student, teacher, target = make_logits(rows, classes)
    student, teacher = student.half(), teacher.bfloat16()
    target[0], target[rows // 2] = 5, classes - 1  # in the first part of a row, and in the last
    try:
        torch.set_num_threads(3)
        with fastkd.use_backend("native"):
            assert_matches(case, student, teacher, target, torch.randn(rows), reduction="none")
            first, again = (loss_and_gradient(case, student, teacher, target) for _ in range(2))
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
            loss, _ = loss_and_gradient(case, student, teacher, target)
            torch.testing.assert_close(case.loss(student, teacher, target), loss)  # without a gradient
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("name", ["kd", "ce-kd", "lskd", "reverse-kl", "jsd"])
def test_rows_too_long_to_cache(name, rows):
    """On the CPU: exponentials that exceed 32 MiB are recomputed."""
    case, classes = BY_NAME[name], 4_200_001
    student, teacher, target = make_logits(rows, classes, torch.bfloat16)
    with fastkd.use_backend("native"):
        assert_matches(case, student, teacher, target, torch.randn(rows), reduction="none")


@each_kernel
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "none"])
def test_reductions(fused, case, reduction):
    student, teacher, target = make_logits(6, 17, torch.float32, fused)
    target[torch.tensor([0, 4])] = -100
    grad_output = torch.randn(6 if reduction == "none" else (), device=fused)
    assert_matches(case, student, teacher, target, grad_output, reduction=reduction)


@each_kernel
@pytest.mark.parametrize(
    "layout", ["transposed", "strided rows", "offset", "every second", "leading dimensions", "shared row"]
)
def test_layouts(fused, case, layout):
    def view(logits):
        match layout:
            case "transposed":
                return logits.t().contiguous().t()
            case "strided rows":
                return torch.cat([logits, logits + 1], 1)[:, : logits.shape[1]]
            case "offset":
                return torch.cat([logits.new_zeros(3), logits.flatten()])[3:].view_as(logits)
            case "every second":
                return torch.stack([logits, logits + 1], 2).flatten(1)[:, ::2]
            case "leading dimensions":
                return logits.view(2, 3, -1)
            case "shared row":
                return logits[:1].expand_as(logits)

    student, teacher, target = make_logits(6, 45, torch.float32, fused)
    student, teacher = view(student), view(teacher)
    target = target.view(2, 3) if layout == "leading dimensions" else torch.stack([target, target], 1)[:, 0]
    grad_output = torch.randn(student.shape[:-1], device=fused)
    assert_matches(case, student, teacher, target, grad_output, reduction="none")


@each_kernel
def test_more_rows_than_a_program_computes(fused, case):
    student, teacher, target = make_logits(70, 10, torch.float32, fused)
    target[3] = -100
    assert_matches(case, student, teacher, target, torch.randn(70, device=fused), reduction="none")


@each_kernel
def test_rows_in_flight_are_bounded(monkeypatch, case):
    """More long rows than programs: each program computes several, one after another."""
    launch = pytest.importorskip("fastkd.ops.triton.launch")
    monkeypatch.setattr(launch, "device_of", lambda device: Device(multiprocessors=2))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student, teacher, target = make_logits(5, 9000, torch.float32, device)
    with fastkd.use_backend("triton"):
        assert_matches(case, student, teacher, target, torch.randn(5, device=device), reduction="none")


@each_kernel
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_a_list_of_pairs_gives_one_loss_per_pair(fused, case, reduction):
    pairs = [make_logits(4, 33, torch.float32, fused)[:2] for _ in range(3)]
    target = torch.tensor([2, 30, -100, 7], device=fused)
    students = [student.requires_grad_() for student, _ in pairs]
    students[1] = students[1].t().contiguous().t()  # different strides
    grad_output = torch.randn((3, 4) if reduction == "none" else 3, device=fused)
    losses = case.loss(students, [teacher for _, teacher in pairs], target, reduction=reduction)
    gradients = torch.autograd.grad(losses, students, grad_output)
    for pair, (student, teacher) in enumerate(pairs):
        given = (student.detach(), teacher, target, grad_output[pair])
        loss, gradient = loss_and_gradient(case, *given, reduction=reduction)
        torch.testing.assert_close(losses[pair].detach(), loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradients[pair], gradient, rtol=1e-4, atol=1e-6)


def test_terms_of_a_list_of_pairs(fused):
    students, teachers = zip(*[make_logits(4, 33, torch.float32, fused)[:2] for _ in range(2)], strict=True)
    target = torch.tensor([2, 30, 1, 7], device=fused)
    for reduction in ("sum", "none"):
        options = {"ce_weight": 1.0, "kd_weight": 2.0, "reduction": reduction}
        loss, terms = fastkd.distill_loss(students, teachers, target, **options)
        for pair in range(2):
            alone, terms_alone = fastkd.distill_loss(students[pair], teachers[pair], target, **options)
            torch.testing.assert_close(loss[pair], alone)
            torch.testing.assert_close({name: term[pair] for name, term in terms.items()}, terms_alone)
    single = fastkd.kd_loss(students[:1], teachers[:1])
    torch.testing.assert_close(single, fastkd.kd_loss(students[0], teachers[0]).unsqueeze(0))


@each_kernel
@pytest.mark.parametrize(("rows", "row_stride"), [(2, 2**31 + 64), (3, 2**30)])  # its double has more
def test_row_offsets_beyond_32_bits(fused, case, rows, row_stride):
    """Offsets of at least 2^31 elements, in memory of which only the rows are accessed."""
    classes = 40
    student, teacher, target = make_logits(rows, classes, torch.bfloat16, fused)

    def far_apart(logits):
        memory = torch.empty((rows - 1) * row_stride + classes, dtype=logits.dtype, device=fused)
        return memory.as_strided((rows, classes), (row_stride, 1)).copy_(logits)

    assert_matches(case, far_apart(student), far_apart(teacher), target, reduction="sum")


def test_a_gradient_with_more_elements_than_32_bits(fused):
    """All rows are the same memory; only the last one, past 2^31 elements, has a grad_output."""
    rows, classes = 2049, 2**20
    if fastkd.get_backend() == "triton" and fused == "cpu":
        pytest.skip("Triton's interpreter takes minutes")
    if memory_bound(fused) < 5 * 2**30:
        pytest.skip("needs 5 GB")
    student, teacher, _ = make_logits(1, classes, torch.bfloat16, fused)
    student.requires_grad_()
    of_all = fastkd.kd_loss(student.expand(rows, -1), teacher.expand(rows, -1), reduction="none")
    last = torch.zeros(rows, device=fused)
    last[-1] = 1.0
    (gradient,) = torch.autograd.grad(of_all, student, last)
    alone = fastkd.kd_loss(student, teacher, reduction="sum")
    torch.testing.assert_close(of_all, alone.expand(rows))
    torch.testing.assert_close(gradient, torch.autograd.grad(alone, student)[0])


@each_kernel
def test_mixed_dtypes(fused, case):
    student, teacher, target = make_logits(3, 50, torch.float32, fused)
    assert_matches(case, student, teacher.bfloat16(), target, reduction="sum")
    assert_matches(case, student.half(), teacher, target, reduction="sum")


@pytest.mark.parametrize("case", [case for case in CASES if case.vanishes], ids=lambda case: case.name)
def test_equal_logits_give_an_exactly_zero_gradient(fused, case):
    for dtype in DTYPES:
        student, _, target = make_logits(4, 1500, dtype, fused)
        loss, gradient = loss_and_gradient(case, student, student.clone(), target, reduction="none")
        assert gradient.count_nonzero() == 0
        assert loss.count_nonzero() == 0


@each_case
def test_near_equal_gradient_is_no_worse_than_eager(fused, case):
    assert_near_equal_gradient_is_no_worse_than_eager(case, 8, 1.5, fused)


@each_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_saturated_logits_stay_finite(fused, case, dtype):
    assert_saturated_logits_stay_finite(case, dtype, fused)


@each_case
def test_confident_logits(fused, case):
    """A margin of 60 and more: probabilities underflow unless computed in log space."""
    student, teacher, target = make_logits(4, 100, torch.float32, fused)
    student.scatter_(1, target[:, None], 60.0)
    teacher.scatter_(1, (target[:, None] + torch.tensor([[0], [1], [0], [1]], device=fused)) % 100, 150.0)
    assert_matches(case, student, teacher, target, reduction="none")


@each_kernel
@pytest.mark.parametrize(("classes", "at"), [(20, 7), (3000, 2500), (3000, 2)])
def test_nonfinite_logits_are_not_hidden(fused, case, classes, at):
    for value in (torch.nan, torch.inf):
        student, teacher, target = make_logits(3, classes, torch.float32, fused)
        student[1, at] = value
        if value == torch.inf and case.family == "pointwise":
            continue  # a Bernoulli probability of 1: the loss is infinite, not NaN
        loss = case.loss(student, teacher, target, reduction="none")
        assert torch.isnan(loss[1])
        assert torch.isfinite(loss[[0, 2]]).all()


@pytest.mark.parametrize("case", [case for case in CASES if case.ignores_rows], ids=lambda case: case.name)
def test_ignored_rows_are_not_read(fused, case):
    student, teacher, target = make_logits(4, 30, torch.float32, fused)
    target[2] = -7
    student[2], teacher[2] = torch.nan, torch.inf
    for reduction in ("batchmean", "sum", "none"):
        options = {"reduction": reduction, "ignore_index": -7}
        loss, gradient = loss_and_gradient(case, student, teacher, target, **options)
        others = torch.tensor([0, 1, 3])
        true_loss, true_gradient = exact(case, student[others], teacher[others], target[others], **options)
        assert error(loss[others] if reduction == "none" else loss, true_loss) < 1e-5
        assert error(gradient[others], true_gradient) < 1e-5
        assert gradient[2].count_nonzero() == 0


@each_kernel
def test_all_rows_ignored(fused, case):
    for rows in (0, 3):
        if rows and not case.ignores_rows:
            continue
        student, teacher, target = make_logits(rows, 12, torch.float32, fused)
        target.fill_(-100)
        for reduction in ("batchmean", "sum"):
            loss, gradient = loss_and_gradient(case, student, teacher, target, reduction=reduction)
            assert loss == 0
            assert gradient.count_nonzero() == 0


@each_kernel
def test_row_weights(fused, case):
    student, teacher, target = make_logits(5, 40, torch.float32, fused)
    weight = torch.tensor([0.5, 2.0, 0.0, 1.0, -1.0], device=fused)
    if case.ignores_rows:
        target[0] = -100
    for reduction in ("batchmean", "sum", "none"):
        assert_matches(case, student, teacher, target, weight=weight, reduction=reduction)
    student[2] = torch.nan  # a row of weight 0 is not read
    assert torch.isfinite(case.loss(student, teacher, target, weight=weight))
    loss, _ = exact(case, student[3:4], teacher[3:4], target[3:4], weight=weight[3:4])
    assert error(case.loss(student, teacher, target, weight=weight, reduction="none")[3], loss) < 1e-5


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_jsd_at_its_ends_is_a_kl(fused, beta):
    student, teacher, _ = make_logits(4, 30, torch.float32, fused)
    loss = fastkd.jsd_loss(student, teacher, beta=beta, temperature=3.0)
    if beta:
        torch.testing.assert_close(loss, fastkd.reverse_kl_loss(student, teacher, temperature=3.0))
    else:
        torch.testing.assert_close(9.0 * loss, fastkd.kd_loss(student, teacher, temperature=3.0))


def test_dckd_without_fix_acquired_equals_dkd_bitwise(fused):
    student, teacher, target = make_logits(6, 50, torch.float32, fused)
    free = loss_and_gradient(
        Case("free", lambda s, t, y: fastkd.dckd_loss(s, t, y, fix_acquired=False)), student, teacher, target
    )
    assert all(map(torch.equal, free, loss_and_gradient(BY_NAME["dkd"], student, teacher, target)))


def test_dckd_leaves_acquired_knowledge_alone(fused):
    """Where the student is more confident, the target term is 0; with beta 0 the row has no gradient."""
    _, teacher, target = make_logits(6, 50, torch.float32, fused)
    student = teacher.scatter_add(1, target[:, None], torch.full((6, 1), 2.0, device=fused)).requires_grad_()
    fastkd.dckd_loss(student, teacher, target, beta=0.0).backward()
    assert student.grad.count_nonzero() == 0
    fastkd.dkd_loss(student, teacher, target, beta=0.0).backward()
    assert student.grad.count_nonzero() > 0


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "none"])
def test_distill_terms(fused, reduction):
    student, teacher, target = make_logits(5, 60, torch.float32, fused)
    target[3] = -100
    weights = {"ce": 0.3, "kd": 0.9, "tckd": 1.1, "nckd": 2.0}
    named = {f"{name}_weight": weight for name, weight in weights.items()}
    student.requires_grad_()
    loss, terms = fastkd.distill_loss(student, teacher, target, **named, reduction=reduction)
    assert not any(term.requires_grad for term in terms.values())
    torch.testing.assert_close(sum(weights[name] * terms[name] for name in weights), loss.detach())
    torch.testing.assert_close(
        terms["kd"], fastkd.kd_loss(student, teacher, target=target, reduction=reduction).detach()
    )
    torch.testing.assert_close(
        terms["ce"],
        torch.nn.functional.cross_entropy(
            student.detach(), target, reduction="mean" if reduction == "batchmean" else reduction
        ),
    )
    _, few = fastkd.distill_loss(student, teacher, target, ce_weight=1.0, kd_weight=1.0)
    assert list(few) == ["ce", "kd"]


def test_a_cross_entropy_alone_is_computed_at_temperature_1():
    """At another one the kernels would compute two exponentials of each class."""

    class Options(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            if operator is torch.ops.fastkd.row_loss.default:
                names = [argument.name for argument in operator._schema.arguments]
                given.append(args[names.index("options")][0])
            return operator(*args, **(kwargs or {}))

    given = []
    student, teacher, target = make_logits(5, 60)
    with Options():
        for weights in ({}, {"kd_weight": 0.5}):
            fastkd.distill_loss(student, teacher, target, ce_weight=0.7, temperature=4.0, **weights)
    assert given == [1.0, 4.0]


def test_binary_kl_norm_where_the_released_formula_overflows(fused):
    student = torch.tensor([[100.0, -100.0, 40.0, 1e-4]], device=fused)
    loss, gradient = loss_and_gradient(BY_NAME["binary-kl-norm"], student, torch.zeros_like(student), None)
    expected = torch.tensor([[1.0, -1.0, 1.0, 0.25e-4]], device=fused)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=0)
    assert torch.isfinite(loss)


def test_log_cosh_is_exact_where_its_series_ends(fused):
    """At 0.2, from which on it is a difference. All classes of a row are alike."""
    distance = 2 * torch.linspace(0.15, 0.1999, 64, device=fused)[:, None].expand(64, 2)
    loss = fastkd.binary_kl_norm_loss(distance, torch.zeros_like(distance), temperature=1.0, reduction="none")
    torch.testing.assert_close(loss.double(), (distance.double() / 2).cosh().log().sum(1), rtol=6e-7, atol=0)


def test_many_equal_rows_do_not_round_one_way():
    """As additions of one number to a sum in float32 would."""
    student, teacher, _ = make_logits(1, 3)
    with fastkd.use_backend("native"):
        row = fastkd.kd_loss(student, teacher, reduction="sum")
        loss = fastkd.kd_loss(student.expand(100_000, 3), teacher.expand(100_000, 3), reduction="sum")
    torch.testing.assert_close(loss, 100_000 * row, rtol=3e-7, atol=0)


def test_no_gradient_is_computed_for_a_student_that_needs_none(fused):
    student, teacher, _ = make_logits(3, 9, torch.float32, fused)
    assert not fastkd.kd_loss(student, teacher).requires_grad
    with torch.no_grad():
        loss = fastkd.kd_loss(student.requires_grad_(), teacher)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, fastkd.kd_loss(student, teacher).detach())


def test_inputs_are_not_modified(fused):
    student, teacher, target = make_logits(3, 2000, torch.float32, fused)
    before = student.clone(), teacher.clone(), target.clone()
    loss_and_gradient(BY_NAME["ce-dkd"], student, teacher, target)
    assert all(torch.equal(now, then) for now, then in zip((student, teacher, target), before, strict=True))


def test_same_result_every_time(fused):
    student, teacher, target = make_logits(5, 3000, torch.float32, fused)
    first = loss_and_gradient(BY_NAME["ce-dkd"], student, teacher, target)
    for _ in range(3):
        again = loss_and_gradient(BY_NAME["ce-dkd"], student, teacher, target)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
