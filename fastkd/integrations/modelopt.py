"""ModelOpt's loss on logits with fastkd's kernels; needs no package.

from fastkd.integrations.modelopt import LogitsDistillationLoss
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.modules.loss import _Loss

import fastkd
from fastkd.integrations.arguments import check_tensors, named
from fastkd.losses import arguments

NAMES = {"student_logits": "logits_s", "teacher_logits": "logits_t"}
REDUCTIONS = ("mean", "batchmean", "sum", "none")


class LogitsDistillationLoss(_Loss):
    """``modelopt.torch.distill.LogitsDistillationLoss``: T^2 KL(softmax(z_t / T) || softmax(z_s / T)).

    Logits [..., C]. ``reduction`` is theirs: "mean", the default, divides by the number of all elements,
    including classes; "batchmean" by the size of the first dimension; "none" gives one value per row.
    """

    def __init__(self, temperature: float = 1.0, reduction: str = "mean") -> None:
        super().__init__()
        arguments.check_temperature(temperature)
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction is {reduction!r}; expected one of {', '.join(REDUCTIONS)}")
        self.temperature = float(temperature)
        self.reduction = reduction

    def forward(self, logits_s: Tensor, logits_t: Tensor) -> Tensor:
        check_tensors(logits_s=logits_s, logits_t=logits_t)
        reduction = "none" if self.reduction == "none" else "sum"
        options = {"temperature": self.temperature, "reduction": reduction}
        # As in ModelOpt, the teacher gets no gradient.
        loss = named(NAMES, fastkd.kd_loss, logits_s, logits_t.detach(), **options)
        if self.reduction == "mean":
            return loss / logits_s.numel()
        return loss / logits_s.shape[0] if self.reduction == "batchmean" else loss
