"""The terms of a batch: those of features beside others, and all of them in one compiled graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastkd.distill import Method, Seen, Terms, find_method, options_of
from fastkd.distill.terms import total_of

from .models import batch, pair


@pytest.mark.parametrize("name", ["kd", "lskd", "dkd", "dckd", "cross_entropy"])
def test_a_hint_alone(name: str) -> None:
    """The first stage of FitNets: every other weight is 0."""
    kind = find_method(name)
    weights = {
        option: 0.0 for option in ("ce_weight", "kd_weight", "alpha", "beta") if option in options_of(kind)
    }
    hint = {"hint_layer": "features.0", "hint_weight": 2.0}
    method = kind(*pair(), example=batch(2)[0], **weights, **hint)
    terms = method(batch())
    assert sum(terms.values()).item() == pytest.approx(terms["hint"].item()) != 0
    method.backward(terms)
    assert method.student.features[0][0].weight.grad.norm() > 0
    assert not method.student.fc.weight.grad.any()


def test_a_hint_beside_a_whole_loss_of_ones_own() -> None:
    class Own(Method):
        def terms(self, seen: Seen) -> Terms:
            value = seen.student_logits.square().mean()
            return {"loss": value, "square": value.detach()}

    method = Own(*pair(), example=batch(2)[0], hint_layer="features.0", hint_weight=2.0).eval()
    terms = method(batch())
    trained = method.backward(terms)
    assert trained.item() == pytest.approx((terms["square"] + terms["hint"]).item())
    with torch.no_grad():
        assert total_of(method(batch())).item() == pytest.approx(trained.item())


@pytest.mark.parametrize("name", ["kd", "lskd", "dkd", "dckd", "nkd", "cross_entropy"])
def test_compiled_in_one_graph(name: str) -> None:
    student, teacher = pair()
    method = find_method(name)(student, teacher)

    def step(images: Tensor, target: Tensor) -> Tensor:
        return sum(method((images, target)).values())

    torch.compiler.reset()
    expected = torch.autograd.grad(step(*batch()), [*student.parameters()])
    found = torch.autograd.grad(
        torch.compile(step, fullgraph=True, backend="aot_eager")(*batch()), [*student.parameters()]
    )
    torch.testing.assert_close(found, expected)
