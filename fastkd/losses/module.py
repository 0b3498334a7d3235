"""The bases of the loss modules: options at construction, tensors at the call."""

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from .arguments import check_options
from .dispatch import Logits


class LossModule(nn.Module):
    """A loss function with its options. Subclasses are keyword-only dataclasses whose fields are the options.

    Options are checked at construction. Each is an attribute, which a schedule may set between steps; the
    function checks it again at every call.
    """

    function: ClassVar[Callable[..., Tensor]]
    __dataclass_fields__: ClassVar[dict[str, Any]]

    def __setattr__(self, name: str, value: Any) -> None:
        # nn.Module would register a tensor; as a plain attribute it is refused by name.
        field = self.__dataclass_fields__.get(name)
        if field is not None:
            # torch.compile compiles a whole number in, and not a float.
            number = field.type in (float, "float") and type(value) is int
            object.__setattr__(self, name, float(value) if number else value)
        else:
            super().__setattr__(name, value)

    def __post_init__(self) -> None:
        super().__init__()
        check_options(**self.options)

    @property
    def options(self) -> dict[str, Any]:
        """The current options, by name."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class UnlabelledLoss(LossModule):
    """The module of a function of the two models' logits."""

    def forward(
        self, student_logits: Logits, teacher_logits: Logits, *, weight: Tensor | None = None
    ) -> Tensor:
        return self.function(student_logits, teacher_logits, weight=weight, **self.options)


class LabelledLoss(LossModule):
    """The module of a function that takes labels."""

    def forward(
        self, student_logits: Logits, teacher_logits: Logits, target: Tensor, *, weight: Tensor | None = None
    ) -> Tensor:
        return self.function(student_logits, teacher_logits, target, weight=weight, **self.options)
