"""Divergences of the two softmax distributions that use no label: reverse KL and JSD."""

from dataclasses import dataclass

from torch import Tensor

from fastkd.ops.spec import JSDOptions, SoftmaxOptions, TemperatureOptions

from .arguments import check_fraction, check_temperature
from .dispatch import Logits, reduced_loss
from .module import UnlabelledLoss


def reverse_kl_loss(
    student_logits: Logits,
    teacher_logits: Logits,
    *,
    temperature: float = 1.0,
    weight: Tensor | None = None,
    reduction: str = "batchmean",
) -> Tensor:
    """KL(softmax(z_s / T) || softmax(z_t / T)): the mode-seeking direction, for language models. No T^2."""
    check_temperature(temperature)
    options = TemperatureOptions(temperature)
    return reduced_loss(
        "reverse_kl", options, student_logits, teacher_logits, weight=weight, reduction=reduction
    )[0]


@dataclass(eq=False, repr=False, kw_only=True)
class ReverseKLLoss(UnlabelledLoss):
    """Module of ``fastkd.reverse_kl_loss``: KL(softmax(z_s / T) || softmax(z_t / T))."""

    temperature: float = 1.0
    reduction: str = "batchmean"

    function = staticmethod(reverse_kl_loss)


def jsd_loss(
    student_logits: Logits,
    teacher_logits: Logits,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    weight: Tensor | None = None,
    reduction: str = "batchmean",
) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q: generalised JSD, as in GKD. No T^2.

    ``beta`` is from 0 to 1; by convention 0 is KL(p || q) and 1 is KL(q || p).
    """
    check_fraction("beta", beta)
    check_temperature(temperature)
    loss: tuple[str, tuple[float, ...]] = "jsd", JSDOptions(temperature, beta)
    if beta == 0.0:
        loss = "softmax", SoftmaxOptions(temperature, kd_weight=1.0 / temperature**2)
    elif beta == 1.0:
        loss = "reverse_kl", TemperatureOptions(temperature)
    return reduced_loss(*loss, student_logits, teacher_logits, weight=weight, reduction=reduction)[0]


@dataclass(eq=False, repr=False, kw_only=True)
class JSDLoss(UnlabelledLoss):
    """Module of ``fastkd.jsd_loss``: beta KL(p || m) + (1 - beta) KL(q || m)."""

    beta: float = 0.5
    temperature: float = 1.0
    reduction: str = "batchmean"

    def __post_init__(self) -> None:
        check_fraction("beta", self.beta)
        super().__post_init__()

    function = staticmethod(jsd_loss)
