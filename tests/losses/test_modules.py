"""The loss modules: options as keyword arguments and attributes; copies, pickles, repr, subclasses."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

import fastkd
from fastkd.losses.module import LossModule

MODULES = [
    module
    for module in vars(fastkd.losses).values()
    if inspect.isclass(module) and issubclass(module, LossModule)
]
REQUIRED = {fastkd.DistillLoss: {"ce_weight": 0.5}, fastkd.TTMLoss: {"gamma": 0.5}}


def made(module):
    return module(**REQUIRED.get(module, {}))


@pytest.mark.parametrize("module", MODULES)
def test_options_are_those_of_the_function_with_its_defaults(module):
    functions = {name.replace("_", ""): getattr(fastkd, name) for name in fastkd.losses.__all__}
    parameters = inspect.signature(functions[module.__name__.lower()]).parameters
    expected = {name: parameter for name, parameter in parameters.items() if name not in ("target", "weight")}
    options = inspect.signature(module).parameters
    assert set(options) == {name for name, one in expected.items() if one.kind is one.KEYWORD_ONLY}
    for name, option in options.items():
        assert option.kind is option.KEYWORD_ONLY
        assert option.default == expected[name].default


@pytest.mark.parametrize("module", MODULES)
def test_copies_and_pickles_have_the_current_options(module):
    loss = made(module)
    loss.reduction = "sum"
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert type(other) is module
        assert other.options == loss.options
        assert repr(other) == repr(loss)
    assert "reduction='sum'" in repr(loss)
    assert not loss.state_dict()


def test_repr_names_every_option():
    assert repr(fastkd.NKDLoss(gamma=3.5)) == (
        "NKDLoss(gamma=3.5, temperature=1.0, ignore_index=-100, reduction='batchmean')"
    )


@pytest.mark.parametrize(
    "value", [torch.tensor(4.0), nn.Parameter(torch.tensor(4.0))], ids=["tensor", "parameter"]
)
def test_a_tensor_is_no_option(value):
    with pytest.raises(TypeError, match="temperature is a tensor"):
        fastkd.KDLoss(temperature=value)
    loss = fastkd.KDLoss()
    loss.temperature = value
    with pytest.raises(TypeError, match="temperature is a tensor"):
        loss(torch.randn(2, 3), torch.randn(2, 3))
    loss.temperature = 4.0
    assert not list(loss.parameters())


def test_a_subclass_may_have_layers_of_its_own():
    class Projected(fastkd.KDLoss):
        def __init__(self):
            super().__init__(temperature=2.0)
            self.project = nn.Linear(3, 3)

        def forward(self, student_logits, teacher_logits):
            return super().forward(self.project(student_logits), teacher_logits)

    loss = Projected()
    loss(torch.randn(2, 3), torch.randn(2, 3)).backward()
    assert loss.project.weight.grad is not None
    assert loss.options["temperature"] == 2.0


def test_a_whole_number_is_not_compiled_in():
    loss = fastkd.KDLoss(temperature=3)
    assert (loss.temperature, type(loss.temperature)) == (3.0, float)
    step = torch.compile(loss, fullgraph=True, backend="aot_eager")
    student, teacher = torch.randn(4, 9), torch.randn(4, 9)
    for temperature in range(2, 12):
        loss.temperature = temperature
        torch.testing.assert_close(
            step(student, teacher), fastkd.kd_loss(student, teacher, temperature=temperature)
        )
