"""A second reading of DCKD's "fix the correct knowledge that the student has already acquired".

    fastkd train glyphs/dckd method=dckd_by_argmax:ByArgmax      # in this folder

``fastkd.distill.DCKD`` drops the target term where the student is as confident in the label as the teacher;
here it is dropped where the student's largest logit is the label's, whatever the teacher says.
"""

from typing import Any

from fastkd import losses
from fastkd.distill import DKD, Seen, Terms


class ByArgmax(DKD, name="dckd_by_argmax"):
    """CE + T^2 (alpha g TCKD + beta NCKD), g = 0 where the student's largest logit is the label's, else 1."""

    def __init__(self, student: Any, teacher: Any, *, beta: float = 2.0, **shared: Any) -> None:
        super().__init__(student, teacher, beta=beta, **shared)

    def terms(self, seen: Seen) -> Terms:
        terms = self.distil(seen, self.ce_weight, {"nckd": self.beta}, **self.options)
        wrong = (seen.student_logits.detach().argmax(1) != seen.target).float()
        tckd = losses.dkd_loss(
            seen.student_logits,
            seen.teacher_logits,
            seen.target,
            alpha=self.alpha * self.warmup(),
            beta=0.0,
            weight=wrong,
            **self.options,
        )
        return {**terms, "tckd": tckd}
