"""Transformed teacher matching (TTM and WTTM)."""

from dataclasses import dataclass

from torch import Tensor

from fastkd.ops.spec import TTMOptions

from .arguments import check_flag, check_temperature
from .dispatch import Logits, reduced_loss
from .module import UnlabelledLoss


def ttm_loss(
    student_logits: Logits,
    teacher_logits: Logits,
    *,
    gamma: float,
    weighted: bool = False,
    weight: Tensor | None = None,
    reduction: str = "batchmean",
) -> Tensor:
    """KL(softmax(gamma z_t) || softmax(z_s)): transformed teacher matching (Zheng and Yang 2024).

    The student is matched at T = 1. ``weighted`` (WTTM) multiplies each row by sum_i softmax(z_t)_i^gamma,
    which is large where the teacher is unsure. ``gamma`` is above 0, the inverse of the teacher's
    temperature.
    """
    check_temperature(gamma, "gamma")
    check_flag("weighted", weighted)
    options = TTMOptions(gamma, weighted)
    return reduced_loss("ttm", options, student_logits, teacher_logits, weight=weight, reduction=reduction)[0]


@dataclass(eq=False, repr=False, kw_only=True)
class TTMLoss(UnlabelledLoss):
    """Module of ``fastkd.ttm_loss``: KL(softmax(gamma z_t) || softmax(z_s))."""

    gamma: float
    weighted: bool = False
    reduction: str = "batchmean"

    def __post_init__(self) -> None:
        check_temperature(self.gamma, "gamma")
        super().__post_init__()

    function = staticmethod(ttm_loss)
