"""The losses as modules: options at construction, tensors at the call."""

from typing import Any

from torch import Tensor, nn

from fastkd import checks, functional

__all__ = ["BinaryKLLoss", "BinaryKLNormLoss", "DKDLoss", "DistillLoss", "KDLoss"]


class _Loss(nn.Module):
    """Holds the keyword options of a function of ``fastkd.functional`` and checks them at once."""

    def __init__(self, **options: Any):
        super().__init__()
        checks.check_temperature(options["temperature"])
        checks.check_reduction(options["reduction"])
        for name, value in options.items():
            if name in ("alpha", "beta") or name.endswith("_weight"):
                checks.check_number(name, value)
        if "label_smoothing" in options:
            checks.check_label_smoothing(options["label_smoothing"])
        self.options = options

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class KDLoss(_Loss):
    """Module of ``fastkd.kd_loss``: T^2 KL(softmax(z_t / T) || softmax(z_s / T))."""

    def __init__(
        self,
        *,
        temperature: float = 4.0,
        standardize: bool = False,
        ignore_index: int = -100,
        reduction: str = "batchmean",
    ):
        super().__init__(
            temperature=temperature, standardize=standardize, ignore_index=ignore_index, reduction=reduction
        )

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        return functional.kd_loss(student_logits, teacher_logits, target=target, **self.options)


class DKDLoss(_Loss):
    """Module of ``fastkd.dkd_loss``: T^2 (alpha TCKD + beta NCKD)."""

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        standardize: bool = False,
        ignore_index: int = -100,
        reduction: str = "batchmean",
    ):
        super().__init__(
            alpha=alpha,
            beta=beta,
            temperature=temperature,
            standardize=standardize,
            ignore_index=ignore_index,
            reduction=reduction,
        )

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
        return functional.dkd_loss(student_logits, teacher_logits, target, **self.options)


class DistillLoss(_Loss):
    """Module of ``fastkd.distill_loss``: cross-entropy and distillation terms; returns ``(loss, terms)``."""

    def __init__(
        self,
        *,
        ce_weight: float,
        kd_weight: float = 0.0,
        tckd_weight: float = 0.0,
        nckd_weight: float = 0.0,
        temperature: float = 4.0,
        label_smoothing: float = 0.0,
        standardize: bool = False,
        ignore_index: int = -100,
        reduction: str = "batchmean",
    ):
        super().__init__(
            ce_weight=ce_weight,
            kd_weight=kd_weight,
            tckd_weight=tckd_weight,
            nckd_weight=nckd_weight,
            temperature=temperature,
            label_smoothing=label_smoothing,
            standardize=standardize,
            ignore_index=ignore_index,
            reduction=reduction,
        )

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return functional.distill_loss(student_logits, teacher_logits, target, **self.options)


class BinaryKLLoss(_Loss):
    """Module of ``fastkd.binary_kl_loss``: a Bernoulli KL for every class."""

    def __init__(self, *, temperature: float = 2.0, reduction: str = "batchmean"):
        super().__init__(temperature=temperature, reduction=reduction)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        return functional.binary_kl_loss(student_logits, teacher_logits, **self.options)


class BinaryKLNormLoss(_Loss):
    """Module of ``fastkd.binary_kl_norm_loss``: T^2 sum_i log cosh((z_s,i - z_t,i) / 2T)."""

    def __init__(self, *, temperature: float = 2.0, reduction: str = "batchmean"):
        super().__init__(temperature=temperature, reduction=reduction)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        return functional.binary_kl_norm_loss(student_logits, teacher_logits, **self.options)
