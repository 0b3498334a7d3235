"""DHKD: labels train one head, the teacher another, and both train the backbone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn
from torch.amp import GradScaler

from fastkd import losses
from fastkd.ops.spec import TemperatureOptions

from .alignment import GradientAlignment
from .centering import describe_offset
from .given import temperature_at_k
from .heads import pooled_head
from .logits import cross_entropy
from .method import Method, Seen
from .options import Count, Epochs, Fraction, Positive, Weight
from .precision import dtype_of_parts
from .taps import INPUT, pooled, width_of
from .terms import Terms


class DHKD(Method):
    """ce_weight CE(main head, y) + alpha BinaryKL-Norm(auxiliary head, teacher): Dual-Head KD.

    BinaryKL-Norm is T^2 sum_i log cosh((z_s,i - z_t,i) / 2T), a sum over classes and mean over rows. The
    auxiliary head, on the input of the student's classifier, is only used in training; its loss trains the
    backbone. On conflict, the component of its gradient along the cross-entropy's is removed
    (``GradientAlignment``), at the cost of one more backward pass of the student. Yang et al. 2024 (arXiv
    2411.08937) and their code.

    Args:
        ce_weight: weight of the cross-entropy of the main head with the labels.
        alpha: weight of the distillation. Published: 1 for CIFAR-100, 0.1 for ImageNet. The loss sums over
            classes, so more classes need a smaller weight.
        temperature: T, by which the auxiliary head's and the teacher's logits are divided.
        center_teacher: take the mean of each row's teacher logits out, which softmax does not see and this
            loss does (``fastkd.binary_kl_norm_loss``). Published without, with teachers trained by SGD, whose
            mean stays near 0.
        head: "linear", or "nonlinear": Linear(d, hidden), Dropout, BatchNorm, ReLU, Linear(hidden, C).
        hidden: width of a nonlinear head.
        dropout: share of a nonlinear head's features that are dropped.
        align: scope of the alignment: "all" as released, "shared", or "none" (published for ImageNet). It
            needs each parameter's ``.grad``, so it is refused for a student that FSDP shards.
        stop_epoch: train this many epochs with the auxiliary head, then only on the labels. Released: 49 of
            100 for ImageNet, where alpha is 0 from epoch 50 on, counted from 1. Under DDP it needs
            ``find_unused_parameters=True``, which the trainer sets.
        feature: path of the layer whose output is the pooled features; by default the classifier's input.
            ``[N, D, H, W]`` is averaged over space. Needs ``example``.

    For the alignment, hint and relation terms count as part of the logit loss.
    """

    takes_forms = True

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        ce_weight: Weight = 1.0,
        alpha: Weight = 1.0,
        temperature: Positive = 2.0,
        center_teacher: bool = True,
        head: Literal["linear", "nonlinear"] = "nonlinear",
        hidden: Count = 200,
        dropout: Fraction = 0.1,
        align: Literal["all", "shared", "none"] = "all",
        stop_epoch: Epochs | None = None,
        feature: str | None = None,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, **shared)
        self.ce_weight, self.alpha = ce_weight, alpha
        self.stop_epoch = stop_epoch
        self.options: dict[str, Any] = {"temperature": temperature, "center_teacher": center_teacher}
        self.alignment = None if align == "none" else GradientAlignment(align)
        if feature is None:
            path, classifier = self.classifier_of("student")
            self.feature = self.student_taps.add(path + INPUT)
            width, num_classes = classifier.in_features, classifier.out_features
            device = classifier.weight.device
        else:
            self.feature = self.student_taps.add(feature)
            shapes, logits_shape = self.student_taps.shapes(self.example)
            width, num_classes = width_of(shapes[feature]), logits_shape[1]
            device = self.example.device
        aux = pooled_head(head, width, num_classes, hidden=hidden, dropout=dropout)
        self.head = aux.to(device, dtype_of_parts(student))

    @classmethod
    def top_k_temperature(cls, options: Mapping[str, Any]) -> float:
        return temperature_at_k("binary_kl_norm", *TemperatureOptions(options["temperature"]))

    def describe_start(self, seen: Seen) -> list[str]:
        if not self.needs_teacher():
            return []
        return [describe_offset(seen.teacher_logits, self.options["center_teacher"])]

    def needs_teacher(self) -> bool:
        return self.alpha > 0 and (self.stop_epoch is None or self.epoch < self.stop_epoch)

    def leaves_parameters_out(self) -> bool:
        return self.alpha == 0 or self.stop_epoch is not None

    def terms(self, seen: Seen) -> Terms:
        terms = {"ce": self.ce_weight * cross_entropy(seen.student_logits, seen.target)}
        if self.needs_teacher():
            logits = self.head(pooled(seen.student[self.feature]))
            distillation = losses.binary_kl_norm_loss(logits, seen.teacher_logits, **self.options)
            terms["binary_kl_norm"] = self.alpha * distillation
        return terms

    def backward(self, terms: Terms, *, scaler: GradScaler | None = None, micro_batches: float = 1) -> Tensor:
        rest = [value for name, value in terms.items() if name != "ce"]
        if self.alignment is not None and rest:
            self.alignment.add(terms["ce"] / micro_batches, rest, scaler)
        loss = super().backward(terms, scaler=scaler, micro_batches=micro_batches)
        if self.alignment is not None and rest:
            self.alignment.check()
        return loss

    def finish_gradients(self) -> None:
        if self.alignment is not None:
            self.alignment.apply()
