"""Divergences of the two softmax distributions that use no label."""

from dataclasses import dataclass

from torch import Tensor

from fastkd.ops.spec import JSDOptions, SkewOptions, SoftmaxOptions, TemperatureOptions

from .arguments import check_flag, check_fraction, check_temperature, plain
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
    loss: tuple[str, tuple[float, ...]] = "jsd", JSDOptions.of(temperature, plain(beta))
    if beta == 0.0:
        loss = "softmax", SoftmaxOptions(temperature, kd_weight=1.0 / plain(temperature) ** 2)
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


def tvd_loss(
    student_logits: Logits,
    teacher_logits: Logits,
    *,
    temperature: float = 1.0,
    weight: Tensor | None = None,
    reduction: str = "batchmean",
) -> Tensor:
    """1/2 sum_i |p_i - q_i|, from 0 to 1: the total variation distance, as in DistiLLM. No T^2.

    Its gradient jumps at classes where p_i = q_i; there the derivative of |p_i - q_i| is taken as 0.
    """
    check_temperature(temperature)
    options = TemperatureOptions(temperature)
    return reduced_loss("tvd", options, student_logits, teacher_logits, weight=weight, reduction=reduction)[0]


@dataclass(eq=False, repr=False, kw_only=True)
class TVDLoss(UnlabelledLoss):
    """Module of ``fastkd.tvd_loss``: 1/2 sum_i |p_i - q_i|."""

    temperature: float = 1.0
    reduction: str = "batchmean"

    function = staticmethod(tvd_loss)


def skew_kl_loss(
    student_logits: Logits,
    teacher_logits: Logits,
    *,
    skew: float = 0.1,
    reverse: bool = False,
    temperature: float = 1.0,
    weight: Tensor | None = None,
    reduction: str = "batchmean",
) -> Tensor:
    """KL(p || skew p + (1 - skew) q), or with ``reverse`` KL(q || (1 - skew) p + skew q) (Ko et al. 2024).

    The KL is bounded by -log skew, however small the other distribution. ``skew`` is from 0, the plain KL, to
    1, where the loss is 0; DistiLLM uses 0.1. No T^2.
    """
    check_fraction("skew", skew)
    check_flag("reverse", reverse)
    check_temperature(temperature)
    name = "skew_reverse_kl" if reverse else "skew_kl"
    loss: tuple[str, tuple[float, ...]] = name, SkewOptions.of(temperature, plain(skew))
    if skew == 0.0 and reverse:
        loss = "reverse_kl", TemperatureOptions(temperature)
    elif skew == 0.0:
        loss = "softmax", SoftmaxOptions(temperature, kd_weight=1.0 / plain(temperature) ** 2)
    return reduced_loss(*loss, student_logits, teacher_logits, weight=weight, reduction=reduction)[0]


@dataclass(eq=False, repr=False, kw_only=True)
class SkewKLLoss(UnlabelledLoss):
    """Module of ``fastkd.skew_kl_loss``: KL(p || skew p + (1 - skew) q), or its reverse."""

    skew: float = 0.1
    reverse: bool = False
    temperature: float = 1.0
    reduction: str = "batchmean"

    function = staticmethod(skew_kl_loss)
