"""The interpreter that the tests speed up computes what Triton's own does."""

import pytest
import torch

import fastkd
from tests import triton_interpreter
from tests.cases import BY_NAME, loss_and_gradient, make_logits


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_bit_is_that_of_tritons_own(interpreter, dtype):
    for name in ("ce-dkd", "lskd", "jsd", "binary-kl-norm"):  # each kernel
        arguments = BY_NAME[name], *make_logits(2, 300, dtype), torch.randn(2)
        with fastkd.use_backend("triton"):
            faster = loss_and_gradient(*arguments, reduction="none")
            interpreter.undo()
            try:
                own = loss_and_gradient(*arguments, reduction="none")
            finally:
                triton_interpreter.speed_up(interpreter)
        assert torch.equal(faster[0], own[0]), name
        assert torch.equal(faster[1], own[1]), name
