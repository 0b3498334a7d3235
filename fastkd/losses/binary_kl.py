"""Bernoulli divergences, each class on its own: BinaryKL and BinaryKL-Norm."""

from dataclasses import dataclass

from torch import Tensor

from fastkd.ops.spec import TemperatureOptions

from .arguments import check_temperature
from .dispatch import Logits, reduced_loss
from .module import UnlabelledLoss


def binary_kl_loss(
    student_logits: Logits,
    teacher_logits: Logits,
    *,
    temperature: float = 2.0,
    weight: Tensor | None = None,
    reduction: str = "batchmean",
) -> Tensor:
    """T^2 sum_i KL(Bern(sigmoid(z_t,i / T)) || Bern(sigmoid(z_s,i / T))) (Yang et al. 2024, DHKD).

    Each class is an independent yes-or-no question, without a softmax over the classes. Summed over the
    classes; ``"batchmean"`` divides by the rows alone. Published with T 2.
    """
    check_temperature(temperature)
    options = TemperatureOptions(temperature)
    return reduced_loss(
        "binary_kl", options, student_logits, teacher_logits, weight=weight, reduction=reduction
    )[0]


@dataclass(eq=False, repr=False, kw_only=True)
class BinaryKLLoss(UnlabelledLoss):
    """Module of ``fastkd.binary_kl_loss``: a Bernoulli KL for every class."""

    temperature: float = 2.0
    reduction: str = "batchmean"

    function = staticmethod(binary_kl_loss)


def binary_kl_norm_loss(
    student_logits: Logits,
    teacher_logits: Logits,
    *,
    temperature: float = 2.0,
    weight: Tensor | None = None,
    reduction: str = "batchmean",
) -> Tensor:
    """T^2 sum_i KL(Bern(1/2) || Bern(sigmoid((z_s,i - z_t,i) / T))) (Yang et al. 2024, DHKD).

    Equal to T^2 sum_i log cosh((z_s,i - z_t,i) / 2T), with the gradient (T / 2) tanh of the same, so it stays
    finite for any logits, where the released formula overflows from (z_s - z_t) / T of about 17. "Norm" is
    the difference to the teacher, not a z-score. Summed over the classes. Published with T 2.
    """
    check_temperature(temperature)
    options = TemperatureOptions(temperature)
    return reduced_loss(
        "binary_kl_norm", options, student_logits, teacher_logits, weight=weight, reduction=reduction
    )[0]


@dataclass(eq=False, repr=False, kw_only=True)
class BinaryKLNormLoss(UnlabelledLoss):
    """Module of ``fastkd.binary_kl_norm_loss``: T^2 sum_i log cosh((z_s,i - z_t,i) / 2T)."""

    temperature: float = 2.0
    reduction: str = "batchmean"

    function = staticmethod(binary_kl_norm_loss)
