"""Cross-entropy and softmax distillation in one pass: KD, DKD, DCKD and any weighted sum of their terms."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastkd.ops.spec import SoftmaxOptions, without_unread_temperature

from .arguments import check_options, check_pairs, check_reduction
from .dispatch import Logits, reduced_loss
from .module import LabelledLoss, LossModule
from .soft_labels import check_soft, is_soft, soft_cross_entropy


def kd_loss(
    student_logits: Logits,
    teacher_logits: Logits,
    *,
    temperature: float = 4.0,
    standardize: bool = False,
    target: Tensor | None = None,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    reduction: str = "batchmean",
) -> Tensor:
    """T^2 KL(softmax(z_t / T) || softmax(z_s / T)): knowledge distillation (Hinton et al. 2015).

    With ``standardize`` the logits of each row are first brought to (z - mean) / (std + 1e-7) (logit
    standardisation, Sun et al. 2024; published with T 2). ``target`` [...] int64 only marks the rows to
    ignore (``ignore_index``); the loss itself uses no labels.
    """
    check_options(temperature=temperature, standardize=standardize)
    options = SoftmaxOptions(temperature, kd_weight=1.0, standardize=standardize)
    return reduced_loss(
        "softmax", options, student_logits, teacher_logits, target,
        ignore_index=ignore_index, weight=weight, reduction=reduction,
    )[0]  # fmt: skip


@dataclass(eq=False, repr=False, kw_only=True)
class KDLoss(LossModule):
    """Module of ``fastkd.kd_loss``: T^2 KL(softmax(z_t / T) || softmax(z_s / T))."""

    temperature: float = 4.0
    standardize: bool = False
    ignore_index: int = -100
    reduction: str = "batchmean"

    def forward(
        self,
        student_logits: Logits,
        teacher_logits: Logits,
        target: Tensor | None = None,
        *,
        weight: Tensor | None = None,
    ) -> Tensor:
        return kd_loss(student_logits, teacher_logits, target=target, weight=weight, **self.options)


def dkd_loss(
    student_logits: Logits,
    teacher_logits: Logits,
    target: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    standardize: bool = False,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    reduction: str = "batchmean",
) -> Tensor:
    """T^2 (alpha TCKD + beta NCKD): decoupled knowledge distillation (Zhao et al. 2022).

    TCKD is the KL between the two models' (p_y, 1 - p_y); NCKD the KL between their distributions over the
    classes that are not the label, which is 0 by definition where there are only two classes. ``target``
    [...] int64. Published, with a cross-entropy of weight 1 beside it: alpha 1, beta 8 (2 to 8 by pair), T 4
    and a linear warm-up over 20 epochs for CIFAR-100; beta 0.5 or 2, T 1 and 1 epoch of it for ImageNet.
    """
    return dckd_loss(
        student_logits, teacher_logits, target,
        alpha=alpha, beta=beta, temperature=temperature, fix_acquired=False, standardize=standardize,
        ignore_index=ignore_index, weight=weight, reduction=reduction,
    )  # fmt: skip


@dataclass(eq=False, repr=False, kw_only=True)
class DKDLoss(LabelledLoss):
    """Module of ``fastkd.dkd_loss``: T^2 (alpha TCKD + beta NCKD)."""

    alpha: float = 1.0
    beta: float = 8.0
    temperature: float = 4.0
    standardize: bool = False
    ignore_index: int = -100
    reduction: str = "batchmean"

    function = staticmethod(dkd_loss)


def dckd_loss(
    student_logits: Logits,
    teacher_logits: Logits,
    target: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    fix_acquired: bool = True,
    standardize: bool = False,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    reduction: str = "batchmean",
) -> Tensor:
    """T^2 (alpha g TCKD + beta NCKD), g = 1 where the teacher is more confident in the target class, else 0.

    A reading of DCKD (doi 10.1371/journal.pone.0314267), of which only the abstract was available: what the
    student has acquired is fixed, so the target term never pulls its confidence in the target class back
    towards the teacher's. ``fix_acquired=False`` is ``dkd_loss``.
    """
    check_options(
        alpha=alpha, beta=beta, temperature=temperature, fix_acquired=fix_acquired, standardize=standardize
    )
    options = SoftmaxOptions(
        temperature, tckd_weight=alpha, nckd_weight=beta, standardize=standardize, fix_acquired=fix_acquired
    )
    return reduced_loss(
        "softmax", options, student_logits, teacher_logits, target,
        uses_label=True, ignore_index=ignore_index, weight=weight, reduction=reduction,
    )[0]  # fmt: skip


@dataclass(eq=False, repr=False, kw_only=True)
class DCKDLoss(LabelledLoss):
    """Module of ``fastkd.dckd_loss``: T^2 (alpha g TCKD + beta NCKD)."""

    alpha: float = 1.0
    beta: float = 8.0
    temperature: float = 4.0
    fix_acquired: bool = True
    standardize: bool = False
    ignore_index: int = -100
    reduction: str = "batchmean"

    function = staticmethod(dckd_loss)


def distill_loss(
    student_logits: Logits,
    teacher_logits: Logits,
    target: Tensor,
    *,
    ce_weight: float,
    kd_weight: float = 0.0,
    tckd_weight: float = 0.0,
    nckd_weight: float = 0.0,
    temperature: float = 4.0,
    label_smoothing: float = 0.0,
    standardize: bool = False,
    fix_acquired: bool = False,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    reduction: str = "batchmean",
) -> tuple[Tensor, dict[str, Tensor]]:
    """w_ce CE + T^2 (w_kd KD + w_t TCKD + w_n NCKD), in one pass over the same logits.

    CE is the cross-entropy of the raw student logits at T = 1, with torch's ``label_smoothing``; the
    distillation terms are those of ``kd_loss`` and ``dkd_loss``, or ``dckd_loss`` with ``fix_acquired``.
    Published: KD with w_ce 0.1 and w_kd 0.9 at T 4 (CIFAR-100), 0.5 and 0.5 at T 1 (ImageNet).

    ``target`` [...] int64; for CE and KD also probabilities [..., C] (MixUp, CutMix), with which CE is
    -sum p_i log q_i, computed in plain torch beside the pass of KD. TCKD, NCKD, ``ignore_index`` and a
    student's ``LinearLogits`` are refused with them. Negative probabilities and rows that do not sum to 1,
    to within 0.02, raise ``ValueError`` on a CPU; elsewhere the loss is NaN.

    Returns ``(loss, terms)``; ``terms`` holds, detached and for logging, the unweighted value of each term of
    non-zero weight ("ce", "kd", "tckd", "nckd"; T^2 included) under the same reduction as the loss.
    """
    options = SoftmaxOptions(
        temperature,
        ce_weight,
        kd_weight,
        tckd_weight,
        nckd_weight,
        label_smoothing,
        standardize,
        fix_acquired,
    )
    check_options(**options._asdict())
    options = without_unread_temperature(options)
    shared: dict[str, Any] = {"ignore_index": ignore_index, "weight": weight, "reduction": reduction}
    if is_soft(target):
        loss, terms = _with_probabilities(options, student_logits, teacher_logits, target, **shared)
    else:
        loss, terms = reduced_loss(
            "softmax", options, student_logits, teacher_logits, target,
            uses_label=True, with_terms=True, **shared,
        )  # fmt: skip
    weights = {"ce": ce_weight, "kd": kd_weight, "tckd": tckd_weight, "nckd": nckd_weight}
    named = zip(weights.items(), terms, strict=True)
    return loss, {name: term for (name, value), term in named if value}


def _with_probabilities(
    options: SoftmaxOptions,
    student_logits: Logits,
    teacher_logits: Logits,
    target: Tensor,
    *,
    ignore_index: int,
    weight: Tensor | None,
    reduction: str,
) -> tuple[Tensor, Iterable[Tensor]]:
    check_reduction(reduction)
    students, _ = check_pairs(student_logits, teacher_logits)
    for student in students:
        check_soft(options, target, student, ignore_index)
    loss, terms = reduced_loss(
        "softmax", options._replace(ce_weight=0.0, label_smoothing=0.0), student_logits, teacher_logits,
        weight=weight, reduction=reduction, with_terms=True,
    )  # fmt: skip
    ce_loss, ce = soft_cross_entropy(options, students, target, weight=weight, reduction=reduction)
    return loss + ce_loss.view(loss.shape), [ce.view(loss.shape), *list(terms)[1:]]


@dataclass(eq=False, repr=False, kw_only=True)
class DistillLoss(LossModule):
    """Module of ``fastkd.distill_loss``: cross-entropy and distillation terms; returns ``(loss, terms)``."""

    ce_weight: float
    kd_weight: float = 0.0
    tckd_weight: float = 0.0
    nckd_weight: float = 0.0
    temperature: float = 4.0
    label_smoothing: float = 0.0
    standardize: bool = False
    fix_acquired: bool = False
    ignore_index: int = -100
    reduction: str = "batchmean"

    def forward(
        self, student_logits: Logits, teacher_logits: Logits, target: Tensor, *, weight: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return distill_loss(student_logits, teacher_logits, target, weight=weight, **self.options)
