"""Bernoulli divergences, each class on its own: BinaryKL and BinaryKL-Norm."""

from dataclasses import dataclass

from torch import Tensor

from fastkd.ops.spec import TemperatureOptions

from .arguments import check_options
from .dispatch import Logits, reduced_loss
from .module import UnlabelledLoss


def binary_kl_loss(
    student_logits: Logits,
    teacher_logits: Logits,
    *,
    temperature: float = 2.0,
    center_teacher: bool = False,
    weight: Tensor | None = None,
    reduction: str = "batchmean",
) -> Tensor:
    """T^2 sum_i KL(Bern(sigmoid(z_t,i / T)) || Bern(sigmoid(z_s,i / T))) (Yang et al. 2024, DHKD).

    Each class is an independent yes-or-no question, without a softmax over the classes. Summed over the
    classes; ``"batchmean"`` divides by the rows alone. Published with T 2.

    A constant added to all of a teacher's logits, which softmax does not see, changes this loss, and a
    teacher trained with AdamW may carry a large one. ``center_teacher`` takes the mean of each row's teacher
    logits out first, in a copy (float32 for half types); the logits must then be finite.
    """
    return _binary_loss(
        "binary_kl", student_logits, teacher_logits, temperature, center_teacher, weight, reduction
    )


@dataclass(eq=False, repr=False, kw_only=True)
class BinaryKLLoss(UnlabelledLoss):
    """Module of ``fastkd.binary_kl_loss``: a Bernoulli KL for every class."""

    temperature: float = 2.0
    center_teacher: bool = False
    reduction: str = "batchmean"

    function = staticmethod(binary_kl_loss)


def binary_kl_norm_loss(
    student_logits: Logits,
    teacher_logits: Logits,
    *,
    temperature: float = 2.0,
    center_teacher: bool = False,
    weight: Tensor | None = None,
    reduction: str = "batchmean",
) -> Tensor:
    """T^2 sum_i KL(Bern(1/2) || Bern(sigmoid((z_s,i - z_t,i) / T))) (Yang et al. 2024, DHKD).

    Equal to T^2 sum_i log cosh((z_s,i - z_t,i) / 2T), with the gradient (T / 2) tanh of the same, so it stays
    finite for any logits, where the released formula overflows from (z_s - z_t) / T of about 17. "Norm" is
    the difference to the teacher, not a z-score. Summed over the classes. Published with T 2.
    ``center_teacher``: see ``binary_kl_loss``.
    """
    return _binary_loss(
        "binary_kl_norm", student_logits, teacher_logits, temperature, center_teacher, weight, reduction
    )


@dataclass(eq=False, repr=False, kw_only=True)
class BinaryKLNormLoss(UnlabelledLoss):
    """Module of ``fastkd.binary_kl_norm_loss``: T^2 sum_i log cosh((z_s,i - z_t,i) / 2T)."""

    temperature: float = 2.0
    center_teacher: bool = False
    reduction: str = "batchmean"

    function = staticmethod(binary_kl_norm_loss)


def _binary_loss(
    loss: str,
    student_logits: Logits,
    teacher_logits: Logits,
    temperature: float,
    center_teacher: bool,
    weight: Tensor | None,
    reduction: str,
) -> Tensor:
    check_options(temperature=temperature, center_teacher=center_teacher)
    return reduced_loss(
        loss, TemperatureOptions(temperature), student_logits, teacher_logits,
        center_teacher=center_teacher, weight=weight, reduction=reduction,
    )[0]  # fmt: skip
