"""Methods on the logits of one head, each a few lines around a fused loss; FitNets and RKD."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from fastkd import losses
from fastkd.losses.arguments import check_target
from fastkd.ops.spec import NKDOptions, SoftmaxOptions, TemperatureOptions
from fastkd.reference import at_least_float32

from .centering import describe_offset
from .given import temperature_at_k
from .method import Method, Seen
from .options import Epochs, Fraction, Positive, Weight
from .terms import Terms, fused_terms

IGNORED = -100  # the label of a row without one, as in torch and in the fused losses


def cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean over the rows of logits ``[N, C]`` that have a label; 0 if none has, in a batch or on a rank.

    ``target`` is int64 labels ``[N]`` or probabilities ``[N, C]``. Raises ``TypeError`` and ``ValueError``.
    """
    logits = at_least_float32(logits)
    if target.is_floating_point():
        return F.cross_entropy(logits, target, label_smoothing=label_smoothing)
    check_target(target, logits)
    total = F.cross_entropy(logits, target, label_smoothing=label_smoothing, reduction="sum")
    # torch's own mean is 0 / 0 without a label.
    return total / (target != IGNORED).sum().clamp_min(1)


class CrossEntropy(Method, name="cross_entropy"):
    """ce_weight CE(z_s, y): only the labels, optionally with a hint or relation term.

    Args:
        ce_weight: weight of the cross-entropy with the labels.
        label_smoothing: share of each label that is spread over all classes.
    """

    uses_teacher = False
    takes_forms = True  # it reads none

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None = None,
        *,
        ce_weight: Weight = 1.0,
        label_smoothing: Fraction = 0.0,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, **shared)
        self.ce_weight, self.label_smoothing = ce_weight, label_smoothing

    def terms(self, seen: Seen) -> Terms:
        return {"ce": self.ce_weight * cross_entropy(seen.student_logits, seen.target, self.label_smoothing)}


class FitNets(CrossEntropy):
    """CE + hint_weight MSE(projection of the student's feature, the teacher's) (Romero et al. 2015).

    The hint is trained together with the labels, as in CRD's benchmark, not in a separate stage; its weight
    and its projection (``hint_projection``) are that benchmark's too.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, *, hint_weight: Positive = 100.0, **shared: Any
    ) -> None:
        super().__init__(student, teacher, hint_weight=hint_weight, **shared)


class RKD(CrossEntropy):
    """CE + distance_weight RKD-D + angle_weight RKD-A on pooled features (Park et al. 2019)."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        distance_weight: Weight = 25.0,
        angle_weight: Weight = 50.0,
        **shared: Any,
    ) -> None:
        super().__init__(
            student, teacher, distance_weight=distance_weight, angle_weight=angle_weight, **shared
        )


class _Softmax(Method, abstract=True):
    """CE and softmax distillation in one fused pass: the base of KD, LSKD, DKD and DCKD.

    Args:
        ce_weight: weight of the cross-entropy with the labels.
        temperature: T, by which both models' logits are divided.
        standardize: distil logits standardised to (z - mean) / std per row, as in LSKD.
        label_smoothing: share of each label that is spread over all classes, in the cross-entropy.
        warmup_epochs: epochs in which the distillation's weights grow linearly from 0.
    """

    takes_forms = True

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        label_smoothing: Fraction = 0.0,
        warmup_epochs: Epochs = 0,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, **shared)
        self.label_smoothing, self.warmup_epochs = label_smoothing, warmup_epochs

    @classmethod
    def top_k_temperature(cls, options: Mapping[str, Any]) -> float:
        softmax = SoftmaxOptions(options["temperature"], kd_weight=1.0, standardize=options["standardize"])
        return temperature_at_k("softmax", *softmax)

    def warmup(self) -> float:
        """min(epoch / warmup_epochs, 1), epochs from 1."""
        return min((self.epoch + 1) / self.warmup_epochs, 1.0) if self.warmup_epochs else 1.0

    def distil(self, seen: Seen, ce_weight: float, distillation: dict[str, float], **options: Any) -> Terms:
        weights = {name: weight * self.warmup() for name, weight in distillation.items()}
        options |= {f"{name}_weight": weight for name, weight in weights.items()}
        loss, terms = losses.distill_loss(
            seen.student_logits,
            seen.teacher_logits,
            seen.target,
            ce_weight=ce_weight,
            label_smoothing=self.label_smoothing,
            **options,
        )
        weights["ce"] = ce_weight
        if not terms:  # all weights are 0: a hint or a relation alone
            return {"ce": loss}
        return fused_terms(loss, {name: weights[name] * value for name, value in terms.items()})


class KD(_Softmax):
    """ce_weight CE + kd_weight T^2 KL(softmax(z_t/T) || softmax(z_s/T)) (Hinton et al. 2015).

    Published: 0.1, 0.9 and T 4 for CIFAR-100 (mdistiller); 0.5, 0.5 and T 1 for ImageNet. ``standardize``:
    LSKD.

    Args:
        kd_weight: weight of the distillation.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        ce_weight: Weight = 0.1,
        kd_weight: Weight = 0.9,
        temperature: Positive = 4.0,
        standardize: bool = False,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, **shared)
        self.ce_weight, self.kd_weight = ce_weight, kd_weight
        self.options = {"temperature": temperature, "standardize": standardize}

    def terms(self, seen: Seen) -> Terms:
        return self.distil(seen, self.ce_weight, {"kd": self.kd_weight}, **self.options)


class LSKD(KD):
    """KD on logits standardised to (z - mean) / std (Sun et al. 2024): 0.1 CE + 9 KD at T 2, as published."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        kd_weight: Weight = 9.0,
        temperature: Positive = 2.0,
        standardize: bool = True,
        **shared: Any,
    ) -> None:
        super().__init__(
            student, teacher, kd_weight=kd_weight, temperature=temperature, standardize=standardize, **shared
        )


class DKD(_Softmax):
    """ce_weight CE + T^2 (alpha TCKD + beta NCKD): decoupled distillation (Zhao et al. 2022).

    Published for CIFAR-100: alpha 1, beta 8, T 4, ``warmup_epochs`` 20 (beta 6 and 2 for some pairs); for
    ImageNet T 1, beta 0.5 (R34 to R18) or 2 (R50 to MobileNetV1), ``warmup_epochs`` 1. With ``standardize``
    (LSKD): alpha and beta times 9 at T 2.

    Args:
        alpha: weight of TCKD, the distillation of the target class against all others.
        beta: weight of NCKD, the distillation among the other classes.
    """

    needs_one_label = "it treats the target class separately, so an image must have one label"

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        ce_weight: Weight = 1.0,
        alpha: Weight = 1.0,
        beta: Weight = 8.0,
        temperature: Positive = 4.0,
        standardize: bool = False,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, **shared)
        self.ce_weight, self.alpha, self.beta = ce_weight, alpha, beta
        self.options: dict[str, Any] = {"temperature": temperature, "standardize": standardize}

    def terms(self, seen: Seen) -> Terms:
        return self.distil(seen, self.ce_weight, {"tckd": self.alpha, "nckd": self.beta}, **self.options)


class DCKD(DKD):
    """DKD whose target term spares what the student has acquired: T^2 (alpha g TCKD + beta NCKD).

    An interpretation of Decoupled Classifier Knowledge Distillation (doi 10.1371/journal.pone.0314267), of
    which only the abstract was available, without equations. It says to decouple the classifier's output into
    "non-target classes learned by the student, and target classes obtained by both the teacher and the
    student", and to "fix the correct knowledge that the student has already acquired", so that the loss can
    be merged with feature- and relation-based methods. Here this means: the target term never reduces the
    student's confidence in the target class, NCKD uses the student's own non-target distribution, and hint
    and relation terms are options.

    Args:
        fix_acquired: where the target term acts. "teacher" or True: g is 1 where the teacher is more
            confident in the label, p_y > q_y, else 0. "argmax": where the student's largest logit is not the
            label's, a second reading of the same words. False: everywhere, which is DKD.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        fix_acquired: bool | Literal["teacher", "argmax"] = "teacher",
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, **shared)
        self.by_argmax = fix_acquired == "argmax"
        self.options["fix_acquired"] = not self.by_argmax and bool(fix_acquired)

    def terms(self, seen: Seen) -> Terms:
        if not self.by_argmax:
            return super().terms(seen)
        # A weight per row is not one of the fused loss's terms, but of a second call.
        rest = self.distil(seen, self.ce_weight, {"nckd": self.beta}, **self.options)
        wrong = seen.student_logits.argmax(1) != seen.target
        tckd = losses.dckd_loss(
            seen.student_logits,
            seen.teacher_logits,
            seen.target,
            alpha=self.alpha * self.warmup(),
            beta=0.0,
            weight=wrong.float(),
            **self.options,
        )
        return {**rest, "tckd": tckd}


class NKD(Method):
    """ce_weight CE + nkd_weight (-p_y log q_y - gamma T^2 sum_{i!=y} p-hat_i log q-hat_i) (Yang et al. 2023).

    Published: gamma 1.5 and T 1 for ImageNet, 3.5 and 3 for CIFAR-100.

    Args:
        ce_weight: weight of the cross-entropy with the labels.
        nkd_weight: weight of the distillation.
        gamma: weight of the non-target classes within it.
        temperature: T, by which both models' logits are divided.
    """

    needs_one_label = DKD.needs_one_label
    takes_forms = True

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        ce_weight: Weight = 1.0,
        nkd_weight: Weight = 1.0,
        gamma: Weight = 1.5,
        temperature: Positive = 1.0,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, **shared)
        self.ce_weight, self.nkd_weight = ce_weight, nkd_weight
        self.options: dict[str, Any] = {"gamma": gamma, "temperature": temperature}

    @classmethod
    def top_k_temperature(cls, options: Mapping[str, Any]) -> float:
        return temperature_at_k("nkd", *NKDOptions(options["temperature"], options["gamma"]))

    def terms(self, seen: Seen) -> Terms:
        distillation = losses.nkd_loss(seen.student_logits, seen.teacher_logits, seen.target, **self.options)
        ce = cross_entropy(seen.student_logits, seen.target)
        return {"ce": self.ce_weight * ce, "nkd": self.nkd_weight * distillation}


class BinaryKL(Method, name="binary_kl"):
    """ce_weight CE + weight BinaryKL on a single head, to compare with DHKD's auxiliary head.

    Args:
        ce_weight: weight of the cross-entropy with the labels.
        weight: weight of the distillation, which sums over classes: more classes need a smaller weight.
        temperature: T, by which both models' logits are divided.
        center_teacher: take the mean of each row's teacher logits out, which softmax does not see and this
            loss does (``fastkd.binary_kl_loss``). Published without; see ``DHKD``.
    """

    distillation: Callable[..., Tensor] = staticmethod(losses.binary_kl_loss)
    takes_forms = True

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        ce_weight: Weight = 1.0,
        weight: Weight = 1.0,
        temperature: Positive = 2.0,
        center_teacher: bool = True,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, **shared)
        self.ce_weight, self.weight = ce_weight, weight
        self.options: dict[str, Any] = {"temperature": temperature, "center_teacher": center_teacher}

    @classmethod
    def top_k_temperature(cls, options: Mapping[str, Any]) -> float:
        return temperature_at_k("binary_kl", *TemperatureOptions(options["temperature"]))

    def describe_start(self, seen: Seen) -> list[str]:
        return [describe_offset(seen.teacher_logits, self.options["center_teacher"])]

    def terms(self, seen: Seen) -> Terms:
        distillation = self.distillation(seen.student_logits, seen.teacher_logits, **self.options)
        ce = cross_entropy(seen.student_logits, seen.target)
        return {"ce": self.ce_weight * ce, self.name: self.weight * distillation}


class BinaryKLNorm(BinaryKL, name="binary_kl_norm"):
    """ce_weight CE + weight BinaryKL-Norm on a single head."""

    distillation = staticmethod(losses.binary_kl_norm_loss)
