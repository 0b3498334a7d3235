"""The native launcher: strides, weights, dynamic options, and the inputs that it rejects.

Each launcher test runs the CPU kernels and the emulated CUDA kernels.
"""

import math
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from fastkd.ops import native, spec
from fastkd.ops.call import Call, Outputs
from fastkd.ops.spec import Needs
from tests.cuda_emulation import Emulation
from tests.ops.test_native_build import ROOT

ALL = (4.0, 0.5, 0.9, 1.1, 2.0, 0.1, 0.0, 0.0)
# Loss, options, and the indices of those that stay static when the others are in a tensor.
LOSSES = {
    "everything": ("softmax", ALL, ()),
    "standardized": ("softmax", (2.0, 0.1, 9.0, 0.0, 0.0, 0.0, 1.0, 0.0), (3, 4, 5)),
    "temperature-1": ("softmax", (1.0, 0.5, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0), ()),
    "weight-0": ("softmax", (4.0, 0.0, 0.9, 0.0, 0.0, 0.0, 0.0, 0.0), ()),
    "nkd": ("nkd", (3.0, 3.5), ()),
    "nkd-temperature-1": ("nkd", (1.0, 3.5), ()),
    "wttm": ("ttm", (0.25, 1.0), (1,)),
    "reverse-kl": ("reverse_kl", (2.0,), ()),
    "jsd": ("jsd", (2.0, 0.3, 0.7), ()),
    "binary-kl": ("binary_kl", (2.0,), ()),
    "binary-kl-norm": ("binary_kl_norm", (2.0,), ()),
}


@pytest.fixture(params=["cpu", "cuda emulation"])
def launch(request):
    if request.param == "cpu":
        return native.row_loss
    return Emulation(request.getfixturevalue("emulated_library")).row_loss


def outputs(
    launch, students, teachers, target=None, weight=None, *, loss=("softmax", ALL), dynamic=None, sums=None
):
    """Rows, terms and gradient from a launcher; prefilled with a value that no kernel writes."""
    classes = students[0].shape[-1]
    rows = torch.full((sum(one.numel() for one in students) // classes,), 77.0)
    terms = torch.full((4, len(rows)), 77.0)
    gradient = torch.full((len(rows), classes), 77.0, dtype=students[0].dtype)
    call = Call(target, weight, 1, *loss, dynamic, "native", False, True, True)
    launch(students, teachers, call, Outputs(rows, terms, gradient, sums))
    return rows, terms, gradient


def assert_same(left, right):
    """Up to the order of sums: the CUDA kernels split a row into vectors by its alignment."""
    for one, other in zip(left, right, strict=True):
        tolerance = 1e-2 if one.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance / 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_leading_strides_need_no_copy(launch, dtype):
    """Views of a larger tensor: shifted, transposed, broadcast, one position per sequence."""
    large, other = (torch.full((4, 6, 150), torch.nan, dtype=dtype) for _ in range(2))
    for logits in (large, other):
        logits[:3, 1:6, 7:140] = torch.randn(3, 5, 133).to(dtype)
    student, teacher = large[:3, 1:6, 7:140], other[:3, 1:6, 7:140]
    for take in (
        lambda logits: logits[:, :-1],
        lambda logits: logits.transpose(0, 1),
        lambda logits: logits[:, ::2],
        lambda logits: logits[:1].expand(3, 5, 133),
        lambda logits: logits[:, :1],
    ):
        s, t = take(student), take(teacher.clone())
        target = torch.randint(0, 133, (s.shape[0] * s.shape[1],))
        assert_same(
            outputs(launch, [s], [t], target),
            outputs(launch, [s.reshape(-1, 133)], [t.reshape(-1, 133)], target),
        )


def test_each_pair_has_its_own_weights(launch):
    students, teachers = ([torch.randn(7, 45) for _ in range(3)] for _ in range(2))
    target = torch.randint(0, 45, (7,))
    weights = torch.rand(3, 7)
    weights[1, 2] = 0
    students[1][2] = torch.nan
    together = outputs(launch, students, teachers, target, weights)
    for pair in range(3):
        rows = slice(7 * pair, 7 * pair + 7)
        alone = outputs(launch, [students[pair]], [teachers[pair]], target, weights[pair].clone())
        assert_same((together[0][rows], together[1][:, rows], together[2][rows]), alone)
    assert together[0][9] == 0
    assert together[2][9].count_nonzero() == 0


def test_strided_weights_and_labels_are_read_with_their_stride(launch):
    students, teachers = ([torch.randn(6, 45) for _ in range(2)] for _ in range(2))
    wide = torch.randint(0, 45, (12,))
    for weight in (
        torch.rand(12)[::2],
        torch.rand(1).expand(6),
        torch.rand(6, 3)[:, 1],
        torch.rand(6, 2).t(),
    ):
        assert_same(
            outputs(launch, students, teachers, wide[::2], weight),
            outputs(launch, students, teachers, wide[::2].clone(), weight.contiguous()),
        )


@pytest.mark.parametrize("name", LOSSES)
def test_options_in_a_tensor_give_the_same_results(launch, name):
    loss, values, known = LOSSES[name]
    student, teacher, target = torch.randn(3, 1100), torch.randn(3, 1100), torch.tensor([5, 0, 1099])
    # Static values 0 and 1 may select code; the values themselves come from the tensor only.
    for hide in (lambda value: math.nan, lambda value: value if value in (0.0, 1.0) else math.nan):
        choosing = tuple(
            value if index in known or index > 5 else hide(value) for index, value in enumerate(values)
        )
        numbers = outputs(launch, [student], [teacher], target, loss=(loss, values))
        tensor = outputs(
            launch, [student], [teacher], target, loss=(loss, choosing), dynamic=torch.tensor(values)
        )
        for one, other in zip(tensor, numbers, strict=True):
            torch.testing.assert_close(one, other, rtol=3e-6, atol=1e-7)


def freed(tensor: Tensor) -> Tensor:
    tensor.untyped_storage().resize_(0)
    return tensor


def cut_short(tensor: Tensor) -> Tensor:
    tensor.untyped_storage().resize_(tensor.untyped_storage().nbytes() - 1)
    return tensor


@pytest.mark.parametrize("spoil", [freed, cut_short])
@pytest.mark.parametrize(
    "name",
    [
        "student_logits",
        "teacher_logits",
        "target",
        "row_weight",
        "rows",
        "terms",
        "gradient",
        "sums",
        "dynamic",
    ],
)
def test_a_tensor_with_too_small_a_storage_is_rejected_by_name(name, spoil):
    arguments = {
        "student_logits": torch.randn(6, 45),
        "teacher_logits": torch.randn(6, 45),
        "target": torch.zeros(6, dtype=torch.int64),
        "row_weight": torch.rand(6),
        "rows": torch.empty(6),
        "terms": torch.empty(4, 6),
        "gradient": torch.empty(6, 45),
        "sums": torch.empty(1),
        "dynamic": torch.tensor(ALL),
    }
    spoil(arguments[name])
    student, teacher, target, weight, rows, terms, gradient, sums, dynamic = arguments.values()
    call = Call(target, weight, 1, "softmax", ALL, dynamic, "native", True, True, True)
    with pytest.raises(RuntimeError, match=f"{name} has elements, but its storage does not hold them"):
        native.row_loss([student], [teacher], call, Outputs(rows, terms, gradient, sums))


def test_an_error_names_the_pair():
    students, teachers = ([torch.randn(3, 45) for _ in range(2)] for _ in range(2))
    freed(teachers[1])
    with pytest.raises(RuntimeError, match=r"teacher_logits\[1\] has elements"):
        outputs(native.row_loss, students, teachers)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"target": torch.zeros(5, dtype=torch.int64)}, "target must have one label per row"),
        ({"target": torch.zeros(6)}, "target must be int64"),
        ({"weight": torch.ones(5)}, "row_weight must have one value per row"),
        ({"weight": torch.ones(2, 6)}, "row_weight must have one value per row"),
        ({"weight": torch.ones(6, dtype=torch.float64)}, "row_weight must be float32"),
        ({"dynamic": torch.ones(9)}, "dynamic has more values than"),
        ({"dynamic": torch.ones(8, dtype=torch.float64)}, "dynamic must be float32"),
        ({"dynamic": torch.ones(16)[::2]}, "dynamic must be contiguous"),
        (
            {"students": [torch.randn(6, 46)[:, ::2]], "teachers": [torch.randn(6, 23)]},
            "must have dense rows",
        ),
        ({"teachers": [torch.randn(6, 45).double()]}, "teacher_logits must be float32"),
        ({"teachers": [torch.randn(6, 44)]}, "teacher_logits must have the rows of the first student_logits"),
        ({"teachers": [torch.randn(1, 2, 3, 45)]}, "teacher_logits must have two or three dimensions"),
    ],
)
def test_unreadable_inputs_are_rejected(change, why):
    arguments = {"students": [torch.randn(6, 45)], "teachers": [torch.randn(6, 45)], **change}
    with pytest.raises(RuntimeError, match=why):
        outputs(native.row_loss, **arguments)


class Unsupported(Call):
    """A call with a combination of needs that no kernel is compiled for."""

    needs = int(Needs.DISTILLS | Needs.LOG_RATIO | Needs.CROSS_TERM)


def test_a_loss_without_a_kernel_is_rejected(launch, monkeypatch):
    logits = [torch.randn(2, 45)]
    call = Call(None, None, 1, "softmax", ALL, None, "native", False, False, True)
    outputs = Outputs(torch.empty(2), None, torch.empty(2, 45))
    with pytest.raises(RuntimeError, match="unknown loss, or no kernel compiled for its needs"):
        launch(logits, logits, Unsupported(*call), outputs)
    for index in (-1, len(spec.LOSSES)):
        monkeypatch.setitem(native._LOSS_INDEX, "softmax", index)
        with pytest.raises(RuntimeError, match="unknown loss"):
            launch(logits, logits, call, outputs)


def test_a_library_with_other_losses_is_rejected(monkeypatch):
    assert native._spec_mismatch(native._library()) is None
    with monkeypatch.context() as patch:
        patch.setattr(native, "LOSSES", dict(reversed(spec.LOSSES.items())))
        assert "it has 'softmax: temperature, ce_weight" in native._spec_mismatch(native._library())
    with monkeypatch.context() as patch:
        patch.setattr(native, "Needs", list(spec.Needs)[1:])
        assert "it has 'needs Distills" in native._spec_mismatch(native._library())
    monkeypatch.setattr(native, "LOSSES", {**spec.LOSSES, "new": spec.LOSSES["tvd"]})
    assert "where this version has 'new: temperature'" in native._spec_mismatch(native._library())
    # Not through the cache: the operators cannot be registered a second time.
    assert "is from another version of fastkd" in native._load.__wrapped__()


def test_torchs_defaults_do_not_matter():
    """In a new process, under other defaults at the first calls: values cached then are used from then on."""
    code = """
import torch, fastkd
fastkd.set_backend("native")
s, t = torch.randn(2, 10), torch.randn(2, 10)
torch.set_default_dtype(torch.float64)
with torch.device("meta"):
    one, several = fastkd.kd_loss(s, t), fastkd.kd_loss([s, s], [t, t])
torch.set_default_device("meta")
second = fastkd.kd_loss(s, t)
assert one.dtype == second.dtype == torch.float32
assert one.item() == second.item() == several[1].item() > 0
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("first", ["export", "fake tensors", "functionalize", "inference mode"])
def test_the_first_loss_may_be_a_traced_one(first):
    """In a new process, as what is made at the first use stays: placeholders without memory gave garbage."""
    code = """
import sys, torch, fastkd
from torch._subclasses.fake_tensor import FakeTensorMode
s, t = torch.randn(2, 10, requires_grad=True), torch.randn(2, 10)
class Step(torch.nn.Module):
    def forward(self, s, t):
        return fastkd.kd_loss(s, t)
if sys.argv[1] == "export":
    torch.export.export(Step(), (s, t))
elif sys.argv[1] == "fake tensors":
    with FakeTensorMode():
        fastkd.kd_loss(torch.randn(2, 10), torch.randn(2, 10))
elif sys.argv[1] == "functionalize":
    torch.func.functionalize(fastkd.kd_loss)(s, t)
else:
    with torch.inference_mode():
        fastkd.kd_loss(s, t)
fastkd.set_backend("native")
loss = fastkd.kd_loss(s, t)
(gradient,) = torch.autograd.grad(loss, s)
with fastkd.use_backend("eager"):
    expected = fastkd.kd_loss(s, t)
torch.testing.assert_close(loss, expected)
torch.testing.assert_close(gradient, torch.autograd.grad(expected, s)[0])
"""
    done = subprocess.run([sys.executable, "-c", code, first], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_the_first_losses_may_be_of_several_threads():
    """In a new process: each thread registered the operators, and all but one were refused, for good."""
    code = """
import threading, torch
from fastkd import kd_loss, set_backend
set_backend("native")
s, t = torch.randn(4, 9), torch.randn(4, 9)
gate, values = threading.Barrier(8), []
def work():
    gate.wait()
    values.append(kd_loss(s, t).item())
threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert values == [kd_loss(s, t).item()] * 8, values
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


class Wrapped(Tensor):
    pass


def test_only_labels_of_plain_tensors_with_storage_are_read():
    labels = torch.tensor([1, 2])
    assert native.labels_all_valid(labels, 3, -100)
    assert native.labels_all_valid(torch.nn.Parameter(labels, requires_grad=False), 3, -100)
    assert not native.labels_all_valid(labels.as_subclass(Wrapped), 3, -100)
    assert not native.labels_all_valid(freed(labels.clone()), 3, -100)
    assert not native.labels_all_valid(cut_short(labels.clone()), 3, -100)
    assert not native.labels_all_valid(torch._to_functional_tensor(labels), 3, -100)
    assert not native.labels_all_valid(labels.to("meta"), 3, -100)
    seen = []

    def look(one):
        seen.append(native.labels_all_valid(one, 3, -100))
        return one

    torch.func.vmap(look)(labels)
    assert seen == [False]


@pytest.mark.parametrize("value", ["AVX2", "avx2 "])
def test_instruction_set_names_match_exactly(value):
    code = "import torch, fastkd; fastkd.kd_loss(torch.randn(2, 3), torch.randn(2, 3))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "FASTKD_ISA": value},
    )  # fmt: skip
    assert f"FASTKD_ISA is '{value}'; expected portable" in done.stderr
    assert done.returncode != 0


def test_an_empty_instruction_set_is_the_fastest():
    code = "from fastkd.ops import native; print(native.instruction_set())"
    found = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment
        ).stdout
        for environment in (
            {**os.environ, "FASTKD_ISA": ""},
            {name: value for name, value in os.environ.items() if name != "FASTKD_ISA"},
        )
    ]
    assert found[0] == found[1] != ""
