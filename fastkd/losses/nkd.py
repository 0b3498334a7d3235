"""Normalised knowledge distillation (NKD)."""

from dataclasses import dataclass

from torch import Tensor

from fastkd.ops.spec import NKDOptions

from .arguments import check_options
from .dispatch import Logits, reduced_loss
from .module import LabelledLoss


def nkd_loss(
    student_logits: Logits,
    teacher_logits: Logits,
    target: Tensor,
    *,
    gamma: float = 1.5,
    temperature: float = 1.0,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    reduction: str = "batchmean",
) -> Tensor:
    """-p_y log q_y - gamma T^2 sum over i != y of p-hat_i log q-hat_i: normalised KD (Yang et al. 2023).

    The target term is at T = 1, the non-target distributions at T. It is used beside a cross-entropy.
    Published: gamma 1.5 and T 1 for ImageNet.
    """
    check_options(gamma=gamma, temperature=temperature)
    return reduced_loss(
        "nkd", NKDOptions(temperature, gamma), student_logits, teacher_logits, target,
        uses_label=True, ignore_index=ignore_index, weight=weight, reduction=reduction,
    )[0]  # fmt: skip


@dataclass(eq=False, repr=False, kw_only=True)
class NKDLoss(LabelledLoss):
    """Module of ``fastkd.nkd_loss``: a target and a non-target cross-entropy."""

    gamma: float = 1.5
    temperature: float = 1.0
    ignore_index: int = -100
    reduction: str = "batchmean"

    function = staticmethod(nkd_loss)
