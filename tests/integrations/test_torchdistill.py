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


@pytest.mark.parametrize("name", fastkd.losses.__all__)
def test_every_loss_by_name(name):
    options = {"ce_weight": 1.0, "kd_weight": 1.0} if name == "DistillLoss" else {}
    options |= {"gamma": 0.5} if name == "TTMLoss" else {}
    criterion = get_mid_level_loss({"key": "fastkd.LogitsLoss", "kwargs": {**PATHS, "loss": name, **options}})
    student, teacher = torch.randn(2, 4, 9)
    target = torch.randint(0, 9, (4,))
    io_dicts = [{"2": {"output": logits}} for logits in (student, teacher)]
    module = getattr(fastkd, name)(**options)
    direct = module(student, teacher, *([target] if criterion.uses_labels else []))
    direct = direct[0] if isinstance(direct, tuple) else direct
    torch.testing.assert_close(criterion(*io_dicts, target), direct)


def test_bad_input():
    with pytest.raises(ValueError, match="reduction is 'mean'"):
        ours.KDLoss(*PATHS.values(), temperature=1.0, alpha=0.5, reduction="mean")
    with pytest.raises(ValueError, match="alpha and beta"):
        ours.KDLoss(*PATHS.values(), temperature=1.0)
    with pytest.raises(ValueError, match="eps is"):
        ours.LogitStdKDLoss(*PATHS.values(), temperature=1.0, alpha=0.5, eps=1e-3)
    with pytest.raises(ValueError, match="loss is 'KL'"):
        ours.LogitsLoss("KL", *PATHS.values())
