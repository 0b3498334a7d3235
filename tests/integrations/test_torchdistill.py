"""fastkd's losses in torchdistill's registry and training box, beside torchdistill's own."""

import pytest
import torch

pytest.importorskip("torchdistill", reason="extra [integrations]")


import yaml
from torch import nn
from torchdistill.common import yaml_util
from torchdistill.core.forward_hook import ForwardHookManager
from torchdistill.losses import high_level, mid_level  # noqa: F401, they register themselves
from torchdistill.losses.registry import get_high_level_loss, get_mid_level_loss

import fastkd
import fastkd.integrations.torchdistill as ours
from fastkd.ops.spec import CASES

PATHS = {
    "student_module_path": "2",
    "student_module_io": "output",
    "teacher_module_path": "2",
    "teacher_module_io": "output",
}


def step(criterion_config):
    """A training step through torchdistill's hooks and high-level loss; the loss and all gradients."""
    torch.manual_seed(1)
    student, teacher = (
        nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, 9)) for width in (6, 12)
    )
    images, target = torch.randn(8, 5), torch.randint(0, 9, (8,))
    criterion = get_high_level_loss(
        {
            "key": "WeightedSumLoss",
            "kwargs": {"sub_terms": {"kd": {"criterion": criterion_config, "weight": 0.7}}},
        }
    )
    hooks = [ForwardHookManager(torch.device("cpu")) for _ in range(2)]
    for manager, network in zip(hooks, (student, teacher), strict=True):
        manager.add_hook(network, "2", requires_output=True)
    student(images)
    with torch.no_grad():
        teacher(images)
    io_dicts = [manager.pop_io_dict() for manager in hooks]
    loss = criterion({"student": io_dicts[0], "teacher": io_dicts[1]}, {}, target)
    loss.backward()
    return loss.detach(), torch.cat([parameter.grad.flatten() for parameter in student.parameters()])


def assert_same(theirs, ours):
    (their_loss, their_gradient), (loss, gradient) = theirs, ours
    torch.testing.assert_close(loss, their_loss, rtol=1e-5, atol=1e-6)
    assert (gradient - their_gradient).norm() < 1e-5 * their_gradient.norm()


@pytest.mark.parametrize("reduction", ["batchmean", "sum"])
@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 0.1},
        {"alpha": 0.5, "beta": 9.0},
        {"alpha": 0.3, "label_smoothing": 0.1},
        {"alpha": 0.0},  # KL alone, and theirs has neither beta nor T^2 then
        {"alpha": None, "beta": 2.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["KDLoss", "LogitStdKDLoss"])
def test_step_is_that_of_torchdistill(name, options, reduction):
    kwargs = {**PATHS, "temperature": 3.0, "reduction": reduction, **options}
    theirs = step({"key": name, "kwargs": kwargs})
    assert_same(theirs, step({"key": f"fastkd.{name}", "kwargs": kwargs}))


def test_by_import_path_from_yaml(tmp_path):
    path = tmp_path / "config.yaml"
    kwargs = {**PATHS, "temperature": 4.0, "alpha": 0.5}
    path.write_text(
        "criterion: !import_call\n"
        "  key: 'fastkd.integrations.torchdistill.KDLoss'\n"
        f"  init:\n    kwargs: {yaml.safe_dump(kwargs, default_flow_style=True)}"
    )
    criterion = yaml_util.load_yaml_file(str(path))["criterion"]
    assert isinstance(criterion, ours.KDLoss)
    assert_same(step({"key": "KDLoss", "kwargs": kwargs}), step(criterion))


def pair(shape):
    return torch.randn(shape, requires_grad=True), 2 * torch.randn(shape)


def io_dicts(student, teacher):
    return {"2": {"output": student}}, {"2": {"output": teacher}}


SHAPES = [(4, 9), (3, 5, 7), (2, 3, 4, 5), (2, 3, 4, 5, 2)]


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("reduction", ["batchmean", "sum"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", [{"alpha": 0.3}, {"alpha": 0.5, "beta": 2.0}, {"alpha": 0.0}], ids=str)
def test_kd_loss_of_each_shape_is_that_of_torchdistill(options, shape, reduction, ignored):
    """Classes are in dimension 1; CE leaves ignored targets out of its mean, KL keeps them."""
    student, teacher = pair(shape)
    targets = torch.randint(0, shape[1], (shape[0], *shape[2:]))
    if ignored:
        targets.view(-1)[::3] = 255
    kwargs = {**PATHS, "temperature": 3.0, "reduction": reduction, "ignore_index": 255, **options}
    results = []
    for loss_class in (mid_level.KDLoss, ours.KDLoss):
        loss = loss_class(**kwargs)(*io_dicts(student, teacher), targets)
        results.append((loss.detach(), torch.autograd.grad(loss, student)[0]))
    assert_same(*results)


def test_standardised_logits_are_rows():
    """Of more dimensions torchdistill standardises the last and takes the softmax of dimension 1."""
    loss = ours.LogitStdKDLoss(**PATHS, temperature=2.0, alpha=0.5)
    with pytest.raises(ValueError, match=r"shape \[2, 3, 4, 5\]; expected \[N, C\]"):
        loss(*io_dicts(*pair((2, 3, 4, 5))), torch.zeros(2, 4, 5, dtype=torch.int64))


def test_positional_arguments_are_in_torchdistills_order():
    """In torchdistill ``eps`` comes before ``alpha``."""
    student, teacher = pair((4, 9))
    targets = torch.tensor([0, 1, 2, 3])
    values = [
        loss_class(*PATHS.values(), 2.0, 1e-7, 0.5, 9.0)(*io_dicts(student, teacher), targets)
        for loss_class in (mid_level.LogitStdKDLoss, ours.LogitStdKDLoss)
    ]
    torch.testing.assert_close(*values)


@pytest.mark.parametrize("class_dim", [1, -1])
def test_logits_loss_takes_the_dimension_of_the_classes(class_dim):
    student, teacher = pair((2, 6, 5))
    loss = ours.LogitsLoss("KDLoss", *PATHS.values(), class_dim=class_dim)
    rows = [z.movedim(class_dim, -1) for z in (student, teacher)]
    torch.testing.assert_close(loss(*io_dicts(student, teacher)), fastkd.kd_loss(*rows))
    with pytest.raises(ValueError, match=r"shape \[2, 6, 5\].*class_dim"):
        ours.LogitsLoss("KDLoss", *PATHS.values())(*io_dicts(student, teacher))


def test_a_loss_that_owns_a_head_is_refused():
    with pytest.raises(ValueError, match="loss is 'LinearDistillLoss'; expected one of BinaryKLLoss"):
        ours.LogitsLoss("LinearDistillLoss", *PATHS.values(), head=nn.Linear(4, 9))


@pytest.mark.parametrize("name", ours.MODULES)
def test_every_loss_by_name(name):
    _, case = next(one for one in CASES.values() if one[1].function.replace("_", "") == name.lower())
    options = case.arguments
    criterion = get_mid_level_loss({"key": "fastkd.LogitsLoss", "kwargs": {**PATHS, "loss": name, **options}})
    student, teacher = torch.randn(2, 4, 9)
    target = torch.randint(0, 9, (4,))
    module = getattr(fastkd, name)(**options)
    direct = module(student, teacher, *([target] if criterion.uses_labels else []))
    direct = direct[0] if isinstance(direct, tuple) else direct
    torch.testing.assert_close(criterion(*io_dicts(student, teacher), target), direct)


def test_bad_input():
    with pytest.raises(ValueError, match="reduction is 'mean'"):
        ours.KDLoss(*PATHS.values(), temperature=1.0, alpha=0.5, reduction="mean")
    with pytest.raises(ValueError, match="alpha and beta"):
        ours.KDLoss(*PATHS.values(), temperature=1.0)
    with pytest.raises(ValueError, match="eps is"):
        ours.LogitStdKDLoss(*PATHS.values(), temperature=1.0, alpha=0.5, eps=1e-3)
    with pytest.raises(ValueError, match="loss is 'KL'"):
        ours.LogitsLoss("KL", **PATHS)
    with pytest.raises(TypeError, match="temprature"):
        ours.LogitsLoss("KDLoss", **PATHS, temprature=2.0)
    with pytest.raises(TypeError, match=r"alpha is '0\.5'"):
        ours.KDLoss(**PATHS, temperature=1.0, alpha="0.5")
    with pytest.raises(TypeError, match=r"temperature is '4\.0'"):
        ours.KDLoss(**PATHS, temperature="4.0", alpha=0.5)


@pytest.mark.parametrize(
    ("student", "teacher", "targets", "kind", "message"),
    [
        (torch.randn(9), torch.randn(9), torch.tensor(1), ValueError, r"shape \[9\]; expected \[N, C\]"),
        (torch.randn(2, 9), torch.randn(3, 9), torch.tensor([1, 2]), ValueError, r"teacher's \[3, 9\]"),
        (torch.randn(2, 9), torch.randn(2, 9), torch.tensor([1]), ValueError, r"targets has shape \[1\]"),
        (
            torch.randn(2, 9, 4),
            torch.randn(2, 9, 4),
            torch.ones(2, 9).long(),
            ValueError,
            r"expected \[2, 4\]",
        ),
        (
            torch.randn(2, 9),
            torch.randn(2, 9),
            torch.full((2, 9), -1.0),
            ValueError,
            "row 0 of targets has -1",
        ),
        (torch.randn(2, 9), torch.randn(2, 9), torch.ones(2).bool(), TypeError, "targets has dtype"),
        (torch.randn(2, 9), torch.randn(2, 9), torch.tensor([1, 9]), ValueError, "targets has the label 9"),
        (torch.randn(2, 9), torch.randn(2, 9), [1, 2], TypeError, "targets is a list"),
        (
            [1.0],
            torch.randn(2, 9),
            torch.tensor([1, 2]),
            TypeError,
            "output of the student's module '2' is a list",
        ),
        (
            torch.randn(2, 9),
            torch.ones(2, 9).long(),
            torch.tensor([1, 2]),
            TypeError,
            "the teacher's logits has",
        ),
    ],
)
def test_errors_speak_of_what_torchdistill_gave(student, teacher, targets, kind, message):
    with pytest.raises(kind, match=message):
        ours.KDLoss(**PATHS, temperature=1.0, alpha=0.5)(*io_dicts(student, teacher), targets)


def test_a_module_without_a_hook_is_named():
    student, teacher = io_dicts(*pair((2, 9)))
    loss = ours.KDLoss("fc", "output", "2", "output", temperature=1.0, alpha=0.5)
    with pytest.raises(ValueError, match="student_module_path is 'fc'; hooks are on '2'"):
        loss(student, teacher)
    loss = ours.KDLoss("2", "output", "2", "logits", temperature=1.0, alpha=0.5)
    with pytest.raises(ValueError, match="teacher_module_io is 'logits'; of '2' there is output"):
        loss(student, teacher)
