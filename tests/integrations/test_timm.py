"""fastkd's task beside timm's own, on a real timm model."""

import pytest
import torch

timm = pytest.importorskip("timm", reason="extra [integrations]")

# ruff: noqa: E402

import timm.task as timm_task
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from fastkd.integrations.timm import LogitDistillationTask

CRITERIA = {
    "plain": nn.CrossEntropyLoss(),
    "smoothed": nn.CrossEntropyLoss(label_smoothing=0.1),
    "timm-smoothed": LabelSmoothingCrossEntropy(0.1),
    "class-weights": nn.CrossEntropyLoss(weight=torch.linspace(0.5, 1.5, 11)),
    "soft-targets": SoftTargetCrossEntropy(),
}
WEIGHTS = [{}, {"task_loss_weight": 0.3}, {"distill_loss_weight": 0.7}, {"task_loss_weight": 0.0}]


def network(seed):
    torch.manual_seed(seed)
    return timm.create_model("resnet10t", num_classes=11)


def step(task_class, criterion, target, **options):
    """A training step: the result and the gradient of every parameter."""
    student, teacher = network(1), network(2)
    task = task_class(
        student_model=student, teacher_model=teacher, criterion=criterion, verbose=False, **options
    )
    task.train()
    torch.manual_seed(3)
    result = task(torch.randn(6, 3, 64, 64), target)
    result["loss"].backward()
    return result, torch.cat([parameter.grad.flatten() for parameter in student.parameters()])


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_step_is_that_of_timm(criterion, weights):
    target = torch.randint(0, 11, (6,))
    if criterion == "soft-targets":
        target = torch.rand(6, 11).softmax(-1)
    options = {"temperature": 3.0, **weights}
    theirs, their_gradient = step(timm_task.LogitDistillationTask, CRITERIA[criterion], target, **options)
    ours, gradient = step(LogitDistillationTask, CRITERIA[criterion], target, **options)
    assert (gradient - their_gradient).norm() < 1e-5 * their_gradient.norm()
    assert theirs.keys() == ours.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name].detach(), theirs[name].detach(), rtol=1e-5, atol=1e-6)


def test_an_ignored_target_is_left_out_of_the_cross_entropy_alone():
    target = torch.tensor([3, -100, 5, 1, -100, 2])
    theirs, their_gradient = step(timm_task.LogitDistillationTask, CRITERIA["smoothed"], target)
    ours, gradient = step(LogitDistillationTask, CRITERIA["smoothed"], target)
    assert (gradient - their_gradient).norm() < 1e-5 * their_gradient.norm()
    for name in theirs:
        torch.testing.assert_close(ours[name].detach(), theirs[name].detach(), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="target has the label -100"):  # timm's criterion knows none
        step(LogitDistillationTask, CRITERIA["timm-smoothed"], target)


def test_other_shapes_are_refused():
    task = LogitDistillationTask(network(1), network(2), nn.CrossEntropyLoss(), verbose=False)
    task.trainable_module = task.teacher.model = nn.Unflatten(0, (2, 5))
    with pytest.raises(ValueError, match=r"student's output has shape \[2, 5, 11\]; expected \[batch, C\]"):
        task(torch.randn(10, 11), torch.randint(0, 11, (2,)))


def test_it_is_a_task_of_timm():
    assert issubclass(LogitDistillationTask, timm_task.LogitDistillationTask)
    with pytest.raises(ValueError, match="loss_type"):
        LogitDistillationTask(network(0), network(0), nn.CrossEntropyLoss(), loss_type="mse")
