"""The CUDA kernels for a teacher known at K classes, without a GPU: see test_cuda_kernels.py."""

import math

import pytest
import torch

import fastkd
from fastkd.losses.cases import call_of
from fastkd.ops import native
from fastkd.ops.call import Call, Outputs
from fastkd.ops.plan import Device
from fastkd.ops.spec import LOSSES, SoftmaxOptions
from fastkd.ops.team_plan import TeamPlan, plan_team
from tests.cases import error
from tests.cuda_emulation import Emulation
from tests.losses import test_top_k as matrix
from tests.losses.test_top_k import (  # noqa: F401
    test_all_known_is_the_dense_loss,
    test_masked_classes,
    test_matches_the_definition,
    test_nan_stays_in_its_row,
    test_rows_longer_than_a_tile,
    test_rows_that_are_not_read_may_hold_anything,
    test_the_cross_entropy_needs_no_known_label,
)
from tests.losses.test_top_k_forms import (  # noqa: F401
    test_a_student_that_is_never_stored,
    test_float16_gradients_wait_for_the_loss_scale,
    test_leading_dimensions_and_strides,
    test_lists_of_pairs,
)
from tests.ops.test_cuda_kernels import TEAMS, forced, outputs


@pytest.fixture
def fused(emulated):
    """The tests of the other backends, on the emulated kernels."""
    return "cpu"


@pytest.mark.parametrize("team", TEAMS.values(), ids=TEAMS)
@pytest.mark.parametrize("name", ["ce-kd-smoothed", "dkd", "jsd"])
def test_every_team(emulated, name, team):
    """The same plan for the row of all classes and for that of K + 1."""
    forced(emulated, *team)
    student, teacher, target = matrix.logits(classes=1203, rows=3)
    target[1] = 1202
    for k in (1, 200, 1202):
        label = None if name == "ce-kd-smoothed" else target
        matrix.compare(name, student, matrix.made(name, teacher, k, label), target)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=str)
def test_long_rows_as_planned(emulated, capability):
    """As `native` plans the rows of all classes: in one pass."""
    emulated.plan = lambda rows, classes, size: plan_team(4096, classes, size, capability, 132, classes < 100)
    student, teacher, target = matrix.logits(classes=40_000, rows=2)
    for name in ("kd", "ce-dkd"):
        matrix.compare(name, student, matrix.made(name, teacher, 64, target), target)


@pytest.mark.parametrize("dtype", matrix.ERROR, ids=str)
@pytest.mark.parametrize("layout", ["strided rows", "offset", "guarded"])
@pytest.mark.parametrize("name", ["kd", "ce-kd", "dkd"])
def test_layouts(emulated, name, layout, dtype):
    """The gaps between guarded rows are NaN, so that reading them shows."""
    student, teacher, target = matrix.logits(classes=45, rows=6, dtype=dtype)
    form = matrix.made(name, teacher, 5, target)
    match layout:
        case "strided rows":
            student = torch.cat([student, student + 1], 1)[:, :45]
        case "offset":
            student = torch.cat([student.new_zeros(3), student.flatten()])[3:].view(6, 45)
        case "guarded":
            around = student.new_full((6, 66), torch.nan)
            around[:, 10:55] = student
            student = around[:, 10:55]
    matrix.compare(name, student, form, target, dtype=dtype)


def test_rows_in_groups(emulated):
    """[M, K, C] with a gap between the groups, as of ``logits[:, :-1]``."""
    student, teacher, target = matrix.logits(rows=8)
    student.requires_grad_()
    grouped = student.view(2, 4, -1)[:, :3]
    form = matrix.made("dkd", teacher.view(2, 4, -1)[:, :3], 5, target.view(2, 4)[:, :3])
    target = target.view(2, 4)[:, :3]
    ours = matrix.gradient_of(fastkd.dkd_loss(grouped, form, target), student, torch.ones(()))
    rows = form.of([tensor.flatten(0, 1) for tensor in form.tensors.values()])
    value = fastkd.dkd_loss(grouped.reshape(6, -1), rows, target.flatten())
    torch.testing.assert_close(ours, matrix.gradient_of(value, student, torch.ones(())))


CE_DKD = SoftmaxOptions(4.0, 0.5, 0.9, 1.1, 2.0, 0.1)


def called(emulated, options, form, student, target, *, weight=None, dynamic=None, gradient=True):
    """Rows, terms and gradient, prefilled with a value that no kernel writes."""
    out = outputs(len(student), student.shape[1], student.dtype)
    logits = form.temperature * torch.cat([form.log_probs, form.log_rest[:, None]], 1)
    call = Call(target, weight, 1, "softmax", options, dynamic, "native", False, True, gradient, form.indices)
    emulated.row_loss([student], [logits], call, Outputs(*out[:2], out[2] if gradient else None))
    return out


@pytest.mark.parametrize(
    "options", [CE_DKD, CE_DKD._replace(tckd_weight=0.0, nckd_weight=0.0, temperature=1.0)], ids=["dkd", "kd"]
)
def test_dynamic_options_give_the_same_bits(emulated, options):
    """``options`` then only select code."""
    student, teacher, target = matrix.logits()
    form = fastkd.top_k(teacher, 5, target, temperature=options.temperature)
    spec = LOSSES["softmax"]
    dynamic = torch.tensor(options[: spec.dynamic])
    values = zip(dynamic.tolist(), spec.code_values, strict=True)
    unknown = SoftmaxOptions(*(value if value == code else math.nan for value, code in values))
    fixed = called(emulated, options, form, student, target)
    read = called(emulated, unknown, form, student, target, dynamic=dynamic)
    assert all(map(torch.equal, fixed, read))
    assert torch.isfinite(fixed[2]).all()


@pytest.mark.parametrize("team", [(16, 4, 1, 4), (64, 1, 1, 4), (32, 1, 2, 4)], ids=str)
@pytest.mark.parametrize("options", [CE_DKD, SoftmaxOptions(4.0, 0.5, 0.9)], ids=["dkd", "ce-kd"])
def test_a_label_out_of_range_poisons_its_row(emulated, options, team):
    forced(emulated, *team)
    student, teacher, target = matrix.logits()
    form = fastkd.top_k(teacher, 5, target, temperature=4.0)
    target[1], target[3] = matrix.CLASSES, -1
    for gradient in (True, False):
        out = called(emulated, options, form, student, target, gradient=gradient)
        for values in (out[0], out[1].t(), *out[2:][:gradient]):
            assert torch.isnan(values[[1, 3]]).all()
            assert torch.isfinite(values[[0, 2, 4, 5]]).all()


def test_weights_and_terms(emulated):
    student, teacher, target = matrix.logits()
    weight = torch.tensor([0.5, 2.0, 0.0, -1.0, 1.0, 3.0])
    form = fastkd.top_k(teacher, 5, target, temperature=4.0)
    plain = called(emulated, CE_DKD, form, student, target)
    student[2], form.indices[2] = torch.nan, 10**9
    weighted = called(emulated, CE_DKD, form, student, target, weight=weight)
    for once, scaled in zip(
        (plain[0], plain[1].t(), plain[2]), (weighted[0], weighted[1].t(), weighted[2]), strict=True
    ):
        torch.testing.assert_close(scaled, weight.view(-1, *[1] * (once.dim() - 1)) * once)
    torch.testing.assert_close(plain[0], torch.tensor(CE_DKD[1:5]) @ plain[1])


def test_only_what_is_asked_for_is_written(emulated):
    student, teacher, target = matrix.logits()
    form = fastkd.top_k(teacher, 5, target, temperature=4.0)
    both = called(emulated, CE_DKD, form, student, target)
    rows, terms, gradient = called(emulated, CE_DKD, form, student, target, gradient=False)
    assert torch.equal(rows, both[0])
    assert torch.equal(terms, both[1])
    assert (gradient == 77).all()


@pytest.mark.parametrize("name", ["kd", "kd-t1", "dkd", "jsd", "tvd", "reverse-kl"])
def test_near_equal_logits_are_no_worse_than_eager(emulated, name):
    """Within a factor of 2: the emulated power of two has the device's maximum error."""
    loss, case = matrix.DEFINED[name]
    student = 3 * torch.randn(32, 1000)
    teacher = student + 1e-3 * torch.randn_like(student)
    target = torch.randint(0, 1000, (32,))
    form = matrix.made(name, teacher.double(), 64, target)
    single = form.of([one.float() if one.is_floating_point() else one for one in form.tensors.values()])

    def gradient(student, form):
        student = student.clone().requires_grad_()
        return torch.autograd.grad(call_of(case)(student, form, target), student)[0]

    with fastkd.use_backend("eager"):
        exact, eager = gradient(student.double(), form), gradient(student, single)
    ours = gradient(student, single)
    assert error(ours, exact) <= 2 * error(eager, exact) + 1e-7


@pytest.mark.parametrize("name", ["kd-t1", "ce-kd", "jsd", "reverse-kl"])
@pytest.mark.parametrize("far", [-50.0, 50.0])
def test_a_rest_far_from_the_known_classes(emulated, name, far):
    """The rest has nearly no probability, or nearly all."""
    student, teacher, target = matrix.logits()
    teacher[:, :3] += 20
    form = fastkd.top_k(teacher, 3, temperature=matrix.made(name, teacher, 3, None).temperature)
    student.scatter_(1, form.indices, far / 2 + student.gather(1, form.indices))
    matrix.compare(name, student, form, target, floor=0.0)


def test_same_result_every_time(emulated):
    forced(emulated, 64, 1, 2, 4)
    student, teacher, target = matrix.logits(classes=3000, rows=2)
    form = fastkd.top_k(teacher, 50, target, temperature=4.0)
    first, second = (called(emulated, CE_DKD, form, student, target) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize(
    ("plan", "plan_at_k", "why"),
    [
        ((48, 1, 1, 4), (32, 1, 1, 4), "power of two"),
        ((32, 1, 1, 4), (48, 1, 1, 4), "power of two"),
        ((32, 1, 1, 3), (32, 1, 1, 4), "slots"),
    ],
)
def test_invalid_plans_are_rejected(emulated, plan, plan_at_k, why):
    student, teacher, _ = matrix.logits(classes=2000)
    form = fastkd.top_k(teacher, 5, temperature=4.0)
    emulated.plan = lambda rows, classes, size: TeamPlan(*(plan if classes == 2000 else plan_at_k))
    with pytest.raises(RuntimeError, match=why):
        called(emulated, SoftmaxOptions(4.0, kd_weight=1.0), form, student, None)


class OnCuda(torch.Tensor):
    """Says that it is on a GPU."""

    is_cuda = True


def test_what_native_passes_to_the_operator(emulated_library, monkeypatch):
    """The arguments by their names in the schema, which the kernels' host code unpacks in this order."""
    device = Device(multiprocessors=132, capability=(9, 0))
    passed, operator = [], native._operator
    monkeypatch.setattr(native, "device_of", lambda _: device)
    monkeypatch.setattr(native, "_operator", lambda name: lambda *values: passed.append((name, values)))
    student, teacher, target = matrix.logits(classes=5000)
    form = fastkd.top_k(teacher, 64, target, temperature=4.0)
    logits = torch.cat([form.log_probs, form.log_rest[:, None]], 1)
    call = Call(target, None, 1, "softmax", CE_DKD, None, "native", False, False, True, form.indices)
    on_cuda = [tensor.as_subclass(OnCuda) for tensor in (student, logits)]
    native.row_loss(on_cuda[:1], on_cuda[1:], call, Outputs(*outputs(len(student), 5000)))
    ((name, values),) = passed
    names = [argument.name for argument in operator(name)._schema.arguments]
    given = dict(zip(names, values, strict=True))
    assert given["needs_at_k"] == call.at_k.needs
    words = Emulation(emulated_library).library.words_of_workspace(len(student), 64)
    assert given["workspace"].dtype == torch.int64
    assert given["workspace"].shape == (words,)
    at_k = [given[f"{field}_at_k"] for field in ("threads", "rows_per_block", "blocks", "slots")]
    assert at_k == list(plan_team(len(student), 65, 8, (9, 0), 132))
    assert [given[field] for field in TeamPlan._fields] == list(
        plan_team(len(student), 5000, 4, (9, 0), 132, False)
    )
