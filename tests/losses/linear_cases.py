"""Linear layers of random numbers, and the losses of their output with and without storing it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastkd
from fastkd import LinearLogits
from tests.cases import Case

NUMBERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 0.7},
    "softcap": {"scale": 1.3, "softcap": 5.0},
    "padded": {"num_classes": 29},
}


@dataclass
class Layers:
    """A student and a teacher of other widths, [N, H], and what a loss takes beside them."""

    student: list[Tensor]  # hidden, weight, bias
    teacher: list[Tensor]
    target: Tensor
    numbers: dict[str, Any]

    @staticmethod
    def random(
        rows: int = 11,
        classes: int = 33,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        **numbers: Any,
    ) -> Layers:
        def layer(width: int) -> list[Tensor]:
            made = torch.randn(rows, width), torch.randn(classes, width) / 2, torch.randn(classes)
            return [tensor.to(dtype).to(device) for tensor in made]

        scored = numbers.get("num_classes", classes)
        return Layers(layer(12), layer(20), torch.randint(0, scored, (rows,), device=device), numbers)

    def loss_and_gradients(
        self,
        case: Case | Callable[..., Tensor],
        *,
        stored: bool = False,
        dtype: torch.dtype | None = None,
        chunk_rows: int | None = 4,
        grad_output: float = 0.37,
        **options: Any,
    ) -> list[Tensor]:
        """The loss and the gradients of hidden, weight and bias; of ``stored`` logits if asked for."""
        loss = case.loss if isinstance(case, Case) else case
        leaves = [tensor.detach().to(dtype or tensor.dtype).requires_grad_() for tensor in self.student]
        student = LinearLogits(*leaves, **self.numbers, chunk_rows=chunk_rows)
        constants = [tensor.to(dtype or tensor.dtype) for tensor in self.teacher]
        teacher = LinearLogits(*constants, **self.numbers)
        logits = (student.dense(), teacher.dense()) if stored else (student, teacher)
        value = loss(*logits, self.target, **options)
        value.backward(torch.full_like(value, grad_output))
        gradients = [leaf.grad for leaf in leaves]
        for leaf, gradient in zip(leaves, gradients, strict=True):
            assert gradient is not None
            assert (gradient.dtype, gradient.shape) == (leaf.dtype, leaf.shape)
        return [value.detach(), *gradients]

    def exact(self, case: Case | Callable[..., Tensor], **options: Any) -> list[Tensor]:
        """Of logits that are stored in float64."""
        with fastkd.use_backend("eager"):
            return self.loss_and_gradients(case, stored=True, dtype=torch.float64, **options)


def errors(results: Sequence[Tensor], truth: Sequence[Tensor], floor: float = 1e-3) -> list[float]:
    """Of each result, relative to its norm, or to ``floor`` if that is larger."""
    found = []
    for result, true in zip(results, truth, strict=True):
        assert torch.isfinite(result).all()
        found.append((result.double() - true).norm().item() / max(true.norm().item(), floor))
    return found
