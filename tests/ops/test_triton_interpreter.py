"""The interpreter that the tests speed up computes what Triton's own does."""

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder

import fastkd
from tests import triton_interpreter
from tests.cases import BY_NAME, loss_and_gradient, make_logits

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled")


@pytest.mark.parametrize(
    ("dtype", "classes"), [(torch.float32, 300), (torch.bfloat16, 300), (torch.float32, 9001)], ids=str
)
def test_every_bit_is_that_of_tritons_own(interpreter, dtype, classes):
    for name in ("ce-dkd", "lskd", "jsd", "binary-kl-norm"):  # each kernel
        arguments = BY_NAME[name], *make_logits(2, classes, dtype), torch.randn(2)
        with fastkd.use_backend("triton"):
            faster = loss_and_gradient(*arguments, reduction="none")
            interpreter.undo()
            try:
                own = loss_and_gradient(*arguments, reduction="none")
            finally:
                triton_interpreter.speed_up(interpreter)
        assert torch.equal(faster[0], own[0]), name
        assert torch.equal(faster[1], own[1]), name


@triton.jit
def add_and_multiply(pointer):
    value = tl.load(pointer + tl.arange(0, 2))
    tl.store(pointer + tl.arange(0, 2), (value + value) * 3)


def test_an_overflow_of_integers_is_an_error():
    """Triton's own interpreter computes whether there is one, and says so only where kernels are debugged."""
    values = torch.tensor([2, -5], dtype=torch.int32)
    add_and_multiply[(1,)](values)
    assert values.tolist() == [12, -30]
    for value, operation in ((2**30, "add"), (-(2**29), "mul")):
        with pytest.raises(Exception, match=f"int32 overflow detected for operation {operation}"):
            add_and_multiply[(1,)](torch.tensor([0, value], dtype=torch.int32))


def test_an_interrupted_launch_leaves_the_next_one_right(monkeypatch):
    """Rows are summed by the last program, which a counter of programs finds."""
    arguments = BY_NAME["kd"], *make_logits(40, 30)
    with fastkd.use_backend("triton"):
        expected = loss_and_gradient(*arguments)
        take, left = InterpreterBuilder.create_atomic_rmw, iter(range(3))

        def stopped(self, *given):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return take(self, *given)

        with monkeypatch.context() as patch:
            patch.setattr(InterpreterBuilder, "create_atomic_rmw", stopped)
            with pytest.raises(KeyboardInterrupt):
                loss_and_gradient(*arguments)
        again = loss_and_gradient(*arguments)
    assert torch.equal(again[0], expected[0])
