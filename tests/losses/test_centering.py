"""``center_teacher`` of the BinaryKL losses: the mean of each row's teacher logits is taken out."""

import pytest
import torch

import fastkd
from tests.cases import GRADIENT_ERROR, LOSS_ERROR, Case, error, exact, loss_and_gradient, make_logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["binary_kl_loss", "binary_kl_norm_loss"])
def test_a_centered_teacher(fused, name, dtype):
    function = getattr(fastkd, name)
    student, teacher, _ = make_logits(5, 1000, dtype, fused)
    teacher = teacher - 16  # what AdamW leaves in a teacher
    grad_output = torch.randn(5, device=fused)
    centered = Case(name, lambda s, t, y, **more: function(s, t, center_teacher=True, **more))
    loss, gradient = loss_and_gradient(centered, student, teacher, None, grad_output, reduction="none")
    by_hand = teacher.double() - teacher.double().mean(-1, keepdim=True)
    plain = Case(name, lambda s, t, y, **more: function(s, t, **more))
    true_loss, true_gradient = exact(plain, student, by_hand, None, grad_output, reduction="none")
    assert error(loss, true_loss) < LOSS_ERROR
    assert error(gradient, true_gradient) < GRADIENT_ERROR[dtype]
    assert gradient.dtype == dtype
    pairs = function([student, student], [teacher, teacher - 3], center_teacher=True)
    torch.testing.assert_close(pairs[0], function(student, teacher, center_teacher=True))
    # Rounding of the logits minus 3 in half types; the offset itself is gone.
    torch.testing.assert_close(pairs[1], pairs[0], rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=0)
    assert not torch.allclose(function(student, teacher), pairs[0])
