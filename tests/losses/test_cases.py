"""The cases of ops/spec.py agree with the public functions."""

import inspect

import pytest
import torch

import fastkd
from fastkd.losses import dispatch
from fastkd.losses.cases import call_of
from fastkd.ops.spec import CASES, LOSSES
from tests.cases import make_logits

each_case = pytest.mark.parametrize("name", CASES)


@each_case
@pytest.mark.parametrize(("backend", "function"), [("native", "numbers_of"), ("eager", "eager_rows")])
def test_the_public_call_has_exactly_these_options(name, backend, function, monkeypatch):
    """For the fused operator and for the eager backend."""
    loss, case = CASES[name]
    seen = []
    original = getattr(dispatch, function)

    def spy(loss_name, options, *rest):
        seen.append((loss_name, options))
        return original(loss_name, options, *rest)

    monkeypatch.setattr(dispatch, function, spy)
    with fastkd.use_backend(backend):
        value = call_of(case)(*make_logits(4, 7))
    assert value.isfinite()
    ((loss_name, options),) = seen
    assert loss_name == loss.name
    assert type(options) is loss.options
    assert options == case.options


@each_case
def test_a_label_is_taken_where_the_options_ask_for_one(name):
    loss, case = CASES[name]
    target = inspect.signature(getattr(fastkd, case.function)).parameters.get("target")
    assert case.labelled == (target is not None and target.default is target.empty)
    assert not case.labelled or loss.takes_label


def test_every_public_loss_has_a_case():
    functions = {name for name in fastkd.losses.__all__ if name.endswith("_loss")}
    assert {case.function for _, case in CASES.values()} == functions


def test_names_differ():
    assert sum(len(loss.cases) for loss in LOSSES.values()) == len(CASES)


def test_terms_are_dropped_and_rows_ignored():
    student, teacher, target = make_logits(4, 7)
    _, case = CASES["ce-kd"]
    loss, _ = fastkd.distill_loss(student, teacher, target, **case.arguments)
    assert torch.equal(call_of(case)(student, teacher, target), loss)
    target[1:] = -100
    _, kd = CASES["kd"]
    alone = fastkd.kd_loss(student[:1], teacher[:1])
    torch.testing.assert_close(call_of(kd, ignores_rows=True)(student, teacher, target), alone)
    assert torch.equal(call_of(kd)(student, teacher, target), fastkd.kd_loss(student, teacher))
