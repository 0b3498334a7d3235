"""The losses as modules: options at construction, tensors at the call."""

from typing import Any

from torch import Tensor, nn

from fastkd import checks, functional

__all__ = [
    "BinaryKLLoss",
    "BinaryKLNormLoss",
    "DCKDLoss",
    "DKDLoss",
    "DistillLoss",
    "JSDLoss",
    "KDLoss",
    "NKDLoss",
    "ReverseKLLoss",
    "TTMLoss",
]


class _Loss(nn.Module):
    """Holds the keyword options of a function of ``fastkd.functional`` and checks them at once.

    Each is an attribute of the module, which a schedule may set between steps; the call checks it again.
    """

    def __init__(self, **options: Any):
        super().__init__()
        checks.check_options(**options)
        self._names = tuple(options)
        for name, value in options.items():
            setattr(self, name, value)

    @property
    def options(self) -> dict[str, Any]:
        """The options in force, by name."""
        return {name: getattr(self, name) for name in self._names}

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

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        target: Tensor | None = None,
        *,
        weight: Tensor | None = None,
    ) -> Tensor:
        return functional.kd_loss(
            student_logits, teacher_logits, target=target, weight=weight, **self.options
        )


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

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor, *, weight: Tensor | None = None
    ) -> Tensor:
        return functional.dkd_loss(student_logits, teacher_logits, target, weight=weight, **self.options)


class DCKDLoss(_Loss):
    """Module of ``fastkd.dckd_loss``: T^2 (alpha g TCKD + beta NCKD), g = teacher is surer."""

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        fix_acquired: bool = True,
        standardize: bool = False,
        ignore_index: int = -100,
        reduction: str = "batchmean",
    ):
        super().__init__(
            alpha=alpha,
            beta=beta,
            temperature=temperature,
            fix_acquired=fix_acquired,
            standardize=standardize,
            ignore_index=ignore_index,
            reduction=reduction,
        )

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor, *, weight: Tensor | None = None
    ) -> Tensor:
        return functional.dckd_loss(student_logits, teacher_logits, target, weight=weight, **self.options)


class NKDLoss(_Loss):
    """Module of ``fastkd.nkd_loss``: normalised KD, a target and a non-target cross-entropy."""

    def __init__(
        self,
        *,
        gamma: float = 1.5,
        temperature: float = 1.0,
        ignore_index: int = -100,
        reduction: str = "batchmean",
    ):
        super().__init__(gamma=gamma, temperature=temperature, ignore_index=ignore_index, reduction=reduction)

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor, *, weight: Tensor | None = None
    ) -> Tensor:
        return functional.nkd_loss(student_logits, teacher_logits, target, weight=weight, **self.options)


class TTMLoss(_Loss):
    """Module of ``fastkd.ttm_loss``: KL(softmax(gamma z_t) || softmax(z_s))."""

    def __init__(
        self,
        *,
        gamma: float,
        weighted: bool = False,
        reduction: str = "batchmean",
    ):
        checks.check_temperature(gamma, "gamma")
        super().__init__(gamma=gamma, weighted=weighted, reduction=reduction)

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, *, weight: Tensor | None = None
    ) -> Tensor:
        return functional.ttm_loss(student_logits, teacher_logits, weight=weight, **self.options)


class ReverseKLLoss(_Loss):
    """Module of ``fastkd.reverse_kl_loss``: KL(softmax(z_s / T) || softmax(z_t / T))."""

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        reduction: str = "batchmean",
    ):
        super().__init__(temperature=temperature, reduction=reduction)

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, *, weight: Tensor | None = None
    ) -> Tensor:
        return functional.reverse_kl_loss(student_logits, teacher_logits, weight=weight, **self.options)


class JSDLoss(_Loss):
    """Module of ``fastkd.jsd_loss``: beta KL(p || m) + (1 - beta) KL(q || m)."""

    def __init__(
        self,
        *,
        beta: float = 0.5,
        temperature: float = 1.0,
        reduction: str = "batchmean",
    ):
        checks.check_beta_of_jsd(beta)
        super().__init__(beta=beta, temperature=temperature, reduction=reduction)

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, *, weight: Tensor | None = None
    ) -> Tensor:
        return functional.jsd_loss(student_logits, teacher_logits, weight=weight, **self.options)


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
        fix_acquired: bool = False,
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
            fix_acquired=fix_acquired,
            ignore_index=ignore_index,
            reduction=reduction,
        )

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor, *, weight: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return functional.distill_loss(student_logits, teacher_logits, target, weight=weight, **self.options)


class BinaryKLLoss(_Loss):
    """Module of ``fastkd.binary_kl_loss``: a Bernoulli KL for every class."""

    def __init__(
        self,
        *,
        temperature: float = 2.0,
        reduction: str = "batchmean",
    ):
        super().__init__(temperature=temperature, reduction=reduction)

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, *, weight: Tensor | None = None
    ) -> Tensor:
        return functional.binary_kl_loss(student_logits, teacher_logits, weight=weight, **self.options)


class BinaryKLNormLoss(_Loss):
    """Module of ``fastkd.binary_kl_norm_loss``: T^2 sum_i log cosh((z_s,i - z_t,i) / 2T)."""

    def __init__(
        self,
        *,
        temperature: float = 2.0,
        reduction: str = "batchmean",
    ):
        super().__init__(temperature=temperature, reduction=reduction)

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, *, weight: Tensor | None = None
    ) -> Tensor:
        return functional.binary_kl_norm_loss(student_logits, teacher_logits, weight=weight, **self.options)
