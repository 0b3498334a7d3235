"""Options, forms, layouts, dtypes, masks, weights and reductions drawn together, beside float64.

Other tests vary one or two of them at a time.
"""

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd import LinearLogits, TopKLogits
from fastkd.losses.cases import takes_target
from fastkd.ops import spec
from fastkd.ops.spec import Needs
from tests.choices import Choices
from tests.losses.test_top_k import interpreted

# Relative to the norm, or to FLOOR times a number's usual size if that is larger. A product of a hidden
# vector and a weight in bfloat16 is rounded by each side in its own order.
STORED_ERROR = {torch.float32: 1e-3, torch.bfloat16: 2**-6, torch.float16: 4e-3}
LINEAR_ERROR = {torch.float32: 3e-3, torch.bfloat16: 0.1, torch.float16: 3e-2}
LOSS_FLOOR, GRADIENT_FLOOR = 0.1, 1e-2
WEIGHTS = {"alpha", "beta", "gamma", "ce_weight", "kd_weight", "tckd_weight", "nckd_weight"}
# May have any value near the case's: other arguments choose code, or are probabilities.
FREE = {"temperature", *WEIGHTS} - {"beta"}
SMOOTH = [(loss, case) for loss, case in spec.CASES.values() if case.function != "tvd_loss"]  # it has signs


class Draw(Choices):
    """Choices and tensors."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator)

    def laid_out(self, values: Tensor) -> Tensor:
        """The same values in memory that also holds others: with gaps, or with the classes not last."""
        layout = self.of("contiguous", "classes first", "padded", "every second", "behind others")
        other = math.nan if values.is_floating_point() else -(2**40)
        if layout == "padded":
            whole = values.new_full((*values.shape[:-1], values.shape[-1] + self.of(1, 3, 8)), other)
            view = whole[..., : values.shape[-1]]
        elif layout == "every second":
            view = values.new_full((2 * values.shape[0] + 1, *values.shape[1:]), other)[1::2]
        elif layout == "behind others":
            offset = self.of(1, 2, 5)
            view = values.new_full((values.numel() + offset,), other)[offset:].view(values.shape)
        elif layout == "classes first" and values.dim() > 1:
            first = 1 if values.dim() > 2 else 0
            return values.movedim(-1, first).contiguous().movedim(first, -1)
        else:
            return values
        return view.copy_(values)


def _defaults(function: str) -> dict[str, Any]:
    """The numbers among the defaults of a function of the package."""
    parameters = inspect.signature(getattr(fastkd, function)).parameters.values()
    return {each.name: each.default for each in parameters if isinstance(each.default, float)}


class Call:
    """One call: its tensors, and the form and options that go round them."""

    def __init__(self, draw: Draw, slow: bool):
        self.loss, self.case = draw.of(*SMOOTH)
        self.needs = self.loss.needs(self.case.options)
        # Of two standardised logits nothing is left but rounding.
        few = 3 if self.needs & Needs.STANDARDIZED else 2
        self.classes = draw.of(few, 3, 5, 10, 33, 100, 257, 1025, *(() if slow else (1000, 2100, 9001)))
        self.lead = draw.of((1,), (3,), (7,), (2, 3), (2, 1, 2), (0,))
        self.dtype = draw.of(torch.float32, torch.float32, torch.bfloat16, torch.float16)
        self.spread = draw.of(0.1, 1.0, 3.0, 10.0)
        self.forms = (
            draw.of("stored", "stored", "stored", "linear"),
            draw.of("stored", "stored", "linear", "k"),
        )
        if self.forms[1] == "k" and not self._defined_at_k():
            self.forms = self.forms[0], "stored"
        self.arguments = {**_defaults(self.case.function), **self.case.arguments}
        # What is known of a teacher at K classes is at the case's own temperature.
        free = FREE - {"temperature", "gamma"} if self.forms[1] == "k" else FREE
        for name in free & self.arguments.keys():
            self.arguments[name] *= draw.of(1.0, 0.7, 1.3)
        self.student = self._logits(draw, self.forms[0])
        self.teacher = self._logits(draw, self.forms[1])
        self.options: dict[str, Any] = {"reduction": draw.of("batchmean", "sum", "none")}
        if self.forms[0] == "linear" and self.options["reduction"] == "none":
            self.options["reduction"] = "sum"  # a loss of each row has no gradient there
        usable = self.classes - self._mask(draw)
        if self.case.labelled or (takes_target(self.case) and draw.often(0.4)):
            self._label(draw, usable)
        if draw.often(0.4):
            kept = draw.uniform(*self.lead) > 0.3
            self.options["weight"] = (draw.uniform(*self.lead) * kept).to(draw.of(torch.float32, self.dtype))
        if self.forms[1] == "k":
            temperature = self.loss.temperatures(self.case.options)[1]
            known = fastkd.top_k(
                self.teacher[0].float(), draw.of(1, min(5, self.classes - 1)), self.options.get("target"),
                temperature=temperature,
            )  # fmt: skip
            self.teacher = [*known.tensors.values()]
            self.known = {"num_classes": self.classes, "temperature": temperature}

    def _defined_at_k(self) -> bool:
        return self.classes > 2 and self.loss.undefined_at_k(self.case.options) is None

    def _logits(self, draw: Draw, form: str) -> list[Tensor]:
        if form != "linear":
            offset = draw.of(0.0, 0.0, 5.0, -50.0)
            return [
                draw.laid_out((self.spread * draw.normal(*self.lead, self.classes) + offset).to(self.dtype))
            ]
        hidden, weight = draw.normal(*self.lead, 16), draw.normal(self.classes, 16) * self.spread / 4
        return [draw.laid_out(tensor.to(self.dtype)) for tensor in (hidden, weight)]

    def _mask(self, draw: Draw) -> int:
        """Take classes away from both models; return how many."""
        averages = self.needs & (Needs.STANDARDIZED | Needs.LABEL_SMOOTHING)
        if self.forms != ("stored", "stored") or averages or not draw.often(0.3):
            return 0
        masked = draw.of(1, self.classes // 2) if self.classes > 3 else 0
        for model in (self.student, self.teacher):
            model[0][..., self.classes - masked :] = -math.inf
        return masked

    def _label(self, draw: Draw, usable: int) -> None:
        target = torch.randint(0, usable, self.lead, generator=draw.generator)
        ignored = draw.of(-100, -1, 0, self.classes + 5)
        if ignored != -100:
            self.options["ignore_index"] = ignored
        if draw.often(0.5):
            target[draw.uniform(*self.lead) < 0.3] = ignored
        self.options["target"] = draw.laid_out(target)

    def run(self, dtype: torch.dtype | None, device: str = "cpu") -> tuple[list[Tensor], Tensor]:
        """The student's tensors and the loss; with all in ``dtype`` if one is given."""

        def moved(tensor: Tensor) -> Tensor:
            plain = not tensor.is_floating_point() or dtype is None
            return tensor if plain and device == "cpu" else tensor.to(device, None if plain else dtype)

        leaves = [moved(tensor.detach()).requires_grad_() for tensor in self.student]
        teacher = [moved(tensor) for tensor in self.teacher]
        options = {
            name: moved(value) if isinstance(value, Tensor) else value for name, value in self.options.items()
        }
        student: Any = LinearLogits(*leaves, chunk_rows=2) if self.forms[0] == "linear" else leaves[0]
        known: Any = teacher[0]
        if self.forms[1] == "linear":
            known = LinearLogits(*teacher)
        elif self.forms[1] == "k":
            known = TopKLogits(*teacher, **self.known)
        loss = getattr(fastkd, self.case.function)(student, known, **self.arguments, **options)
        return leaves, loss[0] if isinstance(loss, tuple) else loss

    @property
    def size(self) -> float:
        """About what a row's loss is: its rounding errors are relative to that, not to what cancels."""
        factors = sum(self.arguments[name] for name in WEIGHTS & self.arguments.keys())
        return self.spread * max(factors, 1.0) * max(self.arguments.get("temperature", 1.0), 1.0) ** 2


def close(ours: Tensor, exact: Tensor, tolerance: float, floor: float) -> bool:
    scale = max(exact.norm().item(), floor * math.sqrt(max(exact.numel(), 1)))
    return bool(ours.isfinite().all()) and (ours.double().cpu() - exact).norm().item() <= tolerance * scale


@pytest.mark.filterwarnings("ignore:std")  # eager, of no rows
@pytest.mark.parametrize("seed", range(40))
def test_options_and_forms_together(fused, seed):
    slow = interpreted(fused)
    for repeat in range(1 if slow else 8):
        draw = Draw(1000 * seed + repeat)
        call = Call(draw, slow)
        leaves, loss = call.run(None, fused)
        with fastkd.use_backend("eager"):
            exact_leaves, exact = call.run(torch.float64)
        grad_output = draw.normal(*loss.shape)
        loss.backward(grad_output.to(fused))
        exact.backward(grad_output.double())
        linear = "linear" in call.forms
        tolerance = (LINEAR_ERROR if linear else STORED_ERROR)[call.dtype]
        shown = (draw.seed, call.case.name, call.forms, call.classes, call.dtype, call.arguments)
        assert loss.dtype == torch.float32, shown
        assert loss.shape == exact.shape, shown
        assert close(loss.detach(), exact.detach(), tolerance if linear else 1e-4, LOSS_FLOOR * call.size), (
            shown
        )
        for ours, true in zip(leaves, exact_leaves, strict=True):
            assert ours.grad.dtype == ours.dtype, shown
            assert close(ours.grad, true.grad, tolerance, GRADIENT_FLOOR), shown
