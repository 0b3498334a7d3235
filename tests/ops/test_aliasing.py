"""Losses whose ``spec.Loss.may_alias`` allows the gradient to be written over the student's logits."""

import pytest
import torch

import fastkd
from fastkd.ops.call import Call, Outputs
from fastkd.ops.operators import launcher_of
from fastkd.ops.spec import LOSSES
from fastkd.ops.team_plan import TeamPlan
from tests.cases import make_logits
from tests.cuda_emulation import Emulation

ALIASING = [name for name, loss in LOSSES.items() if loss.may_alias]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Many short rows, a ragged row, and few rows that are so long that threads or programs share each.
SHAPES = [(40, 33), (3, 5001), (1, 200_003)]


def test_which_losses_may_alias():
    assert {LOSSES[name].family for name in ALIASING} == {"pointwise"}


def results(name, shape, dtype, device, launch, backend, *, in_place):
    torch.manual_seed(0)
    student, teacher, _ = make_logits(*shape, dtype, device)
    weight = torch.rand(shape[0], device=device) + 0.5
    gradient = student if in_place else torch.empty_like(student)
    rows = torch.empty(shape[0], device=device)
    call = Call(None, weight, 3, name, (2.0,), None, backend, False, False, True)
    launch([student], [teacher], call, Outputs(rows, None, gradient))
    return rows, gradient


@pytest.mark.parametrize("name", ALIASING)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_place_is_the_same(fused, shape, dtype, name):
    backend = fastkd.get_backend()
    launch = launcher_of(backend).row_loss
    apart = results(name, shape, dtype, fused, launch, backend, in_place=False)
    within = results(name, shape, dtype, fused, launch, backend, in_place=True)
    assert all(torch.equal(a, b) for a, b in zip(apart, within, strict=True))


@pytest.mark.parametrize("name", ALIASING)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("team", [(16, 2, 1, 12), (64, 1, 1, 5), (32, 1, 3, 5), (32, 1, 8, 2)], ids=str)
def test_in_place_in_the_emulated_cuda_kernels(emulated_library, team, dtype, name):
    emulation = Emulation(emulated_library)
    emulation.plan = lambda *_: TeamPlan(*team)
    apart = results(name, (3, 1203), dtype, "cpu", emulation.row_loss, "native", in_place=False)
    within = results(name, (3, 1203), dtype, "cpu", emulation.row_loss, "native", in_place=True)
    assert all(torch.equal(a, b) for a, b in zip(apart, within, strict=True))
