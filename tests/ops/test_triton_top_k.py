"""The Triton launcher for a teacher known at K classes: tiles, parts, steps, masked classes, labels.

Results are compared with ``losses.rows.known_rows`` in float64, on the same inputs.
"""

import math

import pytest
import torch

from fastkd.losses.rows import known_rows
from fastkd.ops import plan
from fastkd.ops.call import Call, Outputs
from fastkd.ops.spec import CASES, LOSSES, Needs
from tests.cases import KERNELS

launch = pytest.importorskip("fastkd.ops.triton.launch")
top_k = pytest.importorskip("fastkd.ops.triton.top_k")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DEFINED = [
    name
    for name, (loss, case) in CASES.items()
    if loss.needs(case.options) & Needs.DISTILLS and loss.undefined_at_k(case.options) is None
]
each_kernel = pytest.mark.parametrize("name", [name for name in DEFINED if name in KERNELS])
# The student's cross-entropy with sums of its own, and with those at the temperature, which is 1.
CE_KD = ("ce-kd-smoothed", "ce-kd-t1-smoothed")


@pytest.fixture
def small_tiles(monkeypatch):
    """Rows of several tiles and parts, and several steps over the known classes, in few classes."""
    monkeypatch.setattr(plan, "KNOWN_TILE", 64)
    monkeypatch.setattr(top_k, "MAX_KNOWN", 16)


def split(monkeypatch, parts):
    planned = plan.plan_known
    monkeypatch.setattr(top_k, "plan_known", lambda *sizes: planned(*sizes)._replace(parts=parts))


class Problem:
    """Student [N, C], a teacher's logits [N, K + 1], its classes and labels."""

    def __init__(self, name, rows, classes, known, *, dtype=torch.float32, label_known=None):
        self.loss, case = CASES[name]
        self.options = tuple(map(float, case.options))
        self.labelled = case.labelled
        self.student = (3 * torch.randn(rows, classes, device=DEVICE)).to(dtype)
        order = torch.rand(rows, classes, device=DEVICE).argsort(-1)
        # Whether the labels are among the classes matters only to a cross-entropy; others read them there.
        outside = label_known is False and not self.loss.labelled_at_k(case.options)
        self.target = order[:, -1 if outside else 0].clone()
        self.indices = order[:, :known].sort(-1).values
        whole = 3 * torch.randn(rows, classes, device=DEVICE)
        self.teacher = torch.cat([whole.gather(1, self.indices), 1 + torch.rand(rows, 1, device=DEVICE)], 1)
        if known == classes:
            self.teacher[:, -1] = -torch.inf

    def run(self, weight=None, gradient=True, dynamic=False, divisor=1):
        """Losses [N], terms [K, N] and gradient [N, C] from the kernels."""
        classes = self.student.shape[-1]
        rows = self.student.numel() // classes
        options, values = self.options, None
        if dynamic:
            values = torch.tensor(options, device=DEVICE)
            options = tuple(value if value in (0.0, 1.0) else math.nan for value in options)
        target = self.target if self.labelled else None
        call = Call(
            target, weight, divisor, self.loss.name, options, values, "triton", False, True, gradient,
            self.indices,
        )  # fmt: skip
        losses = torch.full((rows,), math.nan, device=DEVICE)
        terms = torch.full((len(self.loss.terms), rows), math.nan, device=DEVICE)
        to_gradient = torch.full((rows, classes), math.nan, device=DEVICE, dtype=self.student.dtype)
        outputs = Outputs(losses, terms if len(terms) else None, to_gradient if gradient else None)
        launch.row_loss([self.student], [self.teacher], call, outputs)
        return losses, self._weighted(terms), to_gradient

    def reference(self, dtype=torch.float64):
        student = self.student.reshape(-1, self.student.shape[-1]).to(dtype).requires_grad_()
        label = self.target if self.labelled else None
        losses, terms = known_rows(
            LOSSES[self.loss.name], self.indices, student, self.teacher.to(dtype), label, *self.options
        )
        (gradient,) = torch.autograd.grad(losses.sum(), student)
        return losses.detach().double(), self._weighted(terms).detach().double(), gradient.double()

    def _weighted(self, terms):
        """Terms of weight 0 are not defined."""
        options = self.loss.options(*self.options)
        return terms[[getattr(options, f"{name}_weight") != 0 for name in self.loss.terms]]


def assert_matches(problem, error=1e-5, gradient_error=1e-5, found=None):
    found = problem.run() if found is None else found
    true = problem.reference()
    for value, exact, bound in zip(found, true, (error, error, gradient_error), strict=True):
        # A gradient far below 1 is a difference of probabilities.
        assert (value - exact).norm() <= bound * exact.norm().clamp_min(0.1)


# ---- tiles, parts and steps ----------------------------------------------------------------------------


@each_kernel
@pytest.mark.parametrize(("classes", "known"), [(33, 1), (48, 47), (48, 48)])
def test_rows_of_one_tile(name, classes, known):
    assert_matches(Problem(name, 3, classes, known))


@each_kernel
@pytest.mark.parametrize("classes", [304, 301])  # with wide loads, and without
def test_rows_of_several_tiles_parts_and_steps(name, classes, small_tiles):
    problem = Problem(name, 3, classes, 20)
    assert plan.plan_known(3, classes, plan.device_of(torch.device(DEVICE))).parts == 5
    assert_matches(problem)


@pytest.mark.parametrize("parts", [1, 2, 4, 7])  # of 5 tiles: with parts of 4 and 7 some are empty
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-6.5)])
@pytest.mark.parametrize("label_known", [True, False])
def test_any_number_of_parts(parts, dtype, error, label_known, small_tiles, monkeypatch):
    split(monkeypatch, parts)
    for name, classes in zip(CE_KD, (304, 301), strict=True):
        problem = Problem(name, 2, classes, 20, dtype=dtype, label_known=label_known)
        assert_matches(problem, gradient_error=error)


@pytest.mark.parametrize("first", [0, 63, 100, 264])
@pytest.mark.parametrize("parts", [1, 5])
def test_known_classes_side_by_side(first, parts, small_tiles, monkeypatch):
    """All in one tile or over its boundary, up to the row's last class."""
    split(monkeypatch, parts)
    problem = Problem("ce-kd", 3, 304, 40)
    problem.indices = (first + torch.arange(40, device=DEVICE)).repeat(3, 1)
    problem.target = torch.tensor([first, first + 39, (first + 100) % 304], device=DEVICE)
    assert_matches(problem)


def test_a_label_that_starts_a_part(small_tiles):
    """And is not known: its gradient is written by that part alone."""
    problem = Problem("ce-kd", 3, 304, 20)
    problem.indices = (1 + torch.arange(20, device=DEVICE)).repeat(3, 1)
    problem.target = torch.tensor([0, 64, 128], device=DEVICE)
    assert_matches(problem)


def test_tiles_of_the_real_size():
    assert_matches(Problem("ce-kd-smoothed", 2, 5000, 50, label_known=False))


# ---- values --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ce-kd", "ce-kd-t1"])
@pytest.mark.parametrize("label_known", [True, False])
@pytest.mark.parametrize("above", [100.0, 1e4, -1e4])
def test_a_label_far_from_the_others(name, label_known, above, small_tiles):
    problem = Problem(name, 3, 304, 20, label_known=label_known)
    problem.student.scatter_(1, problem.target[:, None], above)
    assert_matches(problem)


@pytest.mark.parametrize("name", ["kd", "dkd", "reverse-kl", "jsd"])
@pytest.mark.parametrize("above", [100.0, 1e4])
def test_known_classes_far_above_the_rest(name, above, small_tiles):
    """The rest is summed by itself: as a difference of sums it would be lost."""
    problem = Problem(name, 3, 304, 20)
    problem.student.scatter_add_(1, problem.indices, torch.full((3, 20), above, device=DEVICE))
    problem.teacher[:, :-1] += above
    assert_matches(problem)


@each_kernel
@pytest.mark.parametrize("masked", [-torch.inf, torch.finfo(torch.float32).min])
def test_masked_classes(name, masked, small_tiles):
    """Of student and teacher: some of the rest, the whole rest, some known classes."""
    if "smoothed" in name or name == "ce-dkd":
        pytest.skip("the mean of masked logits is not defined")
    problem = Problem(name, 3, 304, 20)
    is_known = torch.zeros(3, 304, dtype=torch.bool, device=DEVICE).scatter_(1, problem.indices, True)
    columns = torch.arange(304, device=DEVICE)
    problem.student[0, ~is_known[0] & (columns > 60)] = masked
    problem.student[1, ~is_known[1]] = masked
    problem.teacher[1, -1] = -torch.inf
    others = (problem.indices != problem.target[:, None]).nonzero()
    row, position = others[others[:, 0] == 2][:5].T
    problem.student[row, problem.indices[row, position]] = masked
    problem.teacher[row, position] = masked
    assert_matches(problem)


@pytest.mark.parametrize("name", DEFINED)
def test_no_worse_than_eager(name):
    """Near equality, and far from 0."""
    for offset in (0.0, 1e4, -1e4):
        problem = Problem(name, 8, 100, 10)
        known = problem.student.gather(1, problem.indices)
        rest = problem.student.scatter(1, problem.indices, -torch.inf).logsumexp(-1, keepdim=True)
        teacher = torch.cat([known, rest], 1)
        problem.teacher = teacher + 1e-2 * torch.randn_like(teacher)
        problem.student += offset
        problem.teacher -= problem.teacher.logsumexp(-1, keepdim=True)
        found, true, eager = problem.run(), problem.reference(), problem.reference(torch.float32)
        for which, unit in ((0, 2e-6), (2, 1e-8)):
            error = (found[which] - true[which]).norm()
            assert error <= 3 * (eager[which] - true[which]).norm() + 1e-5 * true[which].norm() + unit


# ---- rows that are not read, and bad ones --------------------------------------------------------------


@each_kernel
def test_a_row_of_weight_0_may_hold_anything(name, small_tiles):
    problem = Problem(name, 3, 304, 20)
    expected = problem.run(divisor=2)
    problem.student[1] = math.nan
    problem.teacher[1] = math.inf
    problem.target[1] = -100
    found = problem.run(torch.tensor([1.0, 0.0, 1.0], device=DEVICE), divisor=2)
    for value, true in zip(found, expected, strict=True):
        value, true = (one.mT if one.dim() == 2 and one.shape[1] == 3 else one for one in (value, true))
        assert (value[1] == 0).all()
        assert torch.equal(value[::2], true[::2])


@pytest.mark.parametrize("name", ["kd", "ce-kd", "ce-kd-t1", "dkd", "jsd"])
def test_a_nan_is_a_nan_in_the_whole_row(name, small_tiles):
    """In the rest, in a known class, in the label, in the teacher."""
    problem = Problem(name, 5, 304, 20, label_known=False)
    clean = problem.run()
    is_known = torch.zeros(5, 304, dtype=torch.bool, device=DEVICE).scatter_(1, problem.indices, True)
    is_known.scatter_(1, problem.target[:, None], True)
    problem.student[0, (~is_known[0]).nonzero()[-1]] = math.nan
    problem.student[1, problem.indices[1, 3]] = math.nan
    problem.student[2, problem.target[2]] = math.nan
    problem.teacher[3, -1] = math.nan
    losses, _, gradient = problem.run()
    assert losses[:4].isnan().all()
    assert gradient[:4].isnan().all()
    assert torch.equal(losses[4], clean[0][4])
    assert torch.equal(gradient[4], clean[2][4])


@pytest.mark.parametrize("name", [name for name in DEFINED if CASES[name][1].labelled])
@pytest.mark.parametrize("label", [-100, 304])
def test_a_label_out_of_range_is_a_nan(name, label, small_tiles):
    problem = Problem(name, 2, 304, 20)
    clean = problem.run()
    problem.target[0] = label
    losses, _, gradient = problem.run()
    assert losses[0].isnan()
    assert gradient[0].isnan().all()
    assert torch.equal(losses[1], clean[0][1])
    assert torch.equal(gradient[1], clean[2][1])


# ---- arguments -----------------------------------------------------------------------------------------


@each_kernel
def test_options_that_are_read_from_memory(name):
    problem = Problem(name, 3, 48, 5)
    for found, true in zip(problem.run(dynamic=True), problem.run(), strict=True):
        torch.testing.assert_close(found, true, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_losses_without_a_gradient():
    problem = Problem("ce-kd", 3, 48, 5)
    assert torch.equal(problem.run(gradient=False)[0], problem.run()[0])


@pytest.mark.parametrize("classes", [304, 301])
def test_strided_logits_and_indices(classes, small_tiles):
    problem = Problem("ce-kd", 4, classes, 20, label_known=False)
    expected = problem.run()
    student, indices = problem.student.view(2, 2, classes), problem.indices
    problem.student = torch.full((2, 3, classes), math.nan, device=DEVICE)[:, :2]
    problem.student.copy_(student)
    problem.indices = torch.full((20, 8), 1 << 40, device=DEVICE)[:, :4].T
    problem.indices.copy_(indices)
    for found, true in zip(problem.run(), expected, strict=True):
        assert torch.equal(found, true)


def test_row_offsets_beyond_32_bits():
    """Of rows whose stride has 32 bits, in memory of which only the rows are accessed."""
    problem = Problem("ce-kd-t1-smoothed", 3, 40, 5, dtype=torch.bfloat16)
    expected, row_stride = problem.run(), 2**30
    memory = torch.empty(2 * row_stride + 40, dtype=torch.bfloat16, device=DEVICE)
    problem.student = memory.as_strided((3, 40), (row_stride, 1)).copy_(problem.student)
    for found, true in zip(problem.run(), expected, strict=True):
        assert torch.equal(found, true)
