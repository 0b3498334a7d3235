"""MHKD: classifiers on inner layers of both models, distilled in pairs."""

from __future__ import annotations

import functools
import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastkd import losses
from fastkd.files.plain import load_plain
from fastkd.files.regular import open_regular
from fastkd.files.sealed import Damage, check_sealed

from .heads import MapHead
from .logits import cross_entropy
from .method import Method, Seen
from .options import Count, File, Fraction, Positive, Weight
from .precision import dtype_of_parts
from .terms import Terms


class MHKD(Method):
    """Auxiliary heads on paired inner layers: Multi-head knowledge distillation (arXiv 2012.02911).

    ce_weight CE(z_s, y) + alpha T^2 KL(z_t, z_s) + sum_h CE(teacher head h, y)
    + beta sum_h [head_kd T^2 KL(sg teacher head h, student head h) + (1 - head_kd) CE(student head h, y)]

    Head: twice 3x3 convolution, BatchNorm, ReLU; then the mean over space and Linear. The teacher's backbone
    is frozen and in eval mode; its heads learn only from the labels, together with the student or before. All
    heads and the final logits share one launch of the fused loss. Heads are only used in training. Needs
    ``example``.

    Of the paper only the abstract was available. The defaults of ``ce_weight``, ``temperature``, ``head_kd``,
    ``head_width`` and ``head_linears`` are those of its first author's later code; ``alpha`` and ``beta`` of
    1, and layers, are not published. A reproduction by others (DIH, intermediate classifiers) has
    ``ce_weight`` 0.1, ``alpha`` 0.9, ``beta`` 0.5 and ``head_linears`` 2 at the same temperature.

    Args:
        layers: paths of the student's layers. Each head reads only its own layer and averages over space, so
            the features of a pair may differ in width, spatial size and kind (map, tokens, vector).
        teacher_layers: paths of the teacher's, in the same order; by default the student's.
        ce_weight: weight of the cross-entropy of the final logits with the labels.
        alpha: weight of the distillation of the final logits.
        beta: weight of the student's heads.
        temperature: T, by which all logits that are distilled are divided.
        head_kd: share of the distillation in the loss of a student's head; the rest is cross-entropy.
        head_width: channels of the heads, also between two linear layers.
        head_linears: linear layers after the mean over space: 1, Linear(head_width, C), or 2, Linear, ReLU,
            Linear. Both are published.
        teacher_heads: a checkpoint of an MHKD run (``last.pt``) whose teacher heads to use, frozen; by
            default they are trained too.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        layers: list[str],
        teacher_layers: list[str] | None = None,
        ce_weight: Weight = 1.0,
        alpha: Weight = 1.0,
        beta: Weight = 1.0,
        temperature: Positive = 4.0,
        head_kd: Fraction = 0.9,
        head_width: Count = 256,
        head_linears: Literal[1, 2] = 1,
        teacher_heads: File | None = None,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, **shared)
        self.ce_weight, self.alpha, self.beta = ce_weight, alpha, beta
        self.temperature, self.head_kd = temperature, head_kd
        of_teacher = layers if teacher_layers is None else teacher_layers
        if not layers or len(layers) != len(of_teacher):
            raise ValueError(
                f"layers {layers} and teacher_layers {of_teacher} must pair up, one or more of each model"
            )
        self.pairs = [self.tap_both(*pair) for pair in zip(layers, of_teacher, strict=True)]
        (of_student, student_logits), (of_teacher_, teacher_logits) = self.all_shapes()
        heads: list[list[MapHead]] = [[], []]
        for pair in self.pairs:
            shapes = of_student[pair[0]], of_teacher_[pair[1]]
            of_models = zip(heads, (student, teacher), shapes, (student_logits, teacher_logits), strict=True)
            for made, model, shape, logits in of_models:
                head = MapHead(tuple(shape), logits[1], width=head_width, linears=head_linears)
                made.append(head.to(self.example.device, dtype_of_parts(model)))
        self.student_heads, self.teacher_heads = (nn.ModuleList(made) for made in heads)
        self.teacher_heads_train = teacher_heads is None
        if teacher_heads is not None:
            self._load_teacher_heads(teacher_heads)

    @classmethod
    def reads_layers(cls, options: Mapping[str, Any]) -> bool:
        return True

    def terms(self, seen: Seen) -> Terms:
        target = seen.target
        student = [
            head(seen.student[path]) for head, (path, _) in zip(self.student_heads, self.pairs, strict=True)
        ]
        with torch.set_grad_enabled(self.teacher_heads_train and torch.is_grad_enabled()):
            teacher = self._of_teacher_heads(seen)
        # Detached, so that the student's heads do not train the teacher's.
        teachers = [seen.teacher_logits, *(logits.detach() for logits in teacher)]
        students = _of_one_dtype([seen.student_logits, *student])
        kd = losses.kd_loss(students, _of_one_dtype(teachers), temperature=self.temperature)
        head_ce = _sum([cross_entropy(logits, target) for logits in student])
        terms = {
            "ce": self.ce_weight * cross_entropy(seen.student_logits, target),
            "kd": self.alpha * kd[0],
            "head_kd": self.beta * self.head_kd * kd[1:].sum(),
            "head_ce": self.beta * (1 - self.head_kd) * head_ce,
        }
        if self.teacher_heads_train:
            terms["teacher_head_ce"] = _sum([cross_entropy(logits, target) for logits in teacher])
        return terms

    def _of_teacher_heads(self, seen: Seen) -> list[Tensor]:
        heads = zip(self.teacher_heads, self.pairs, strict=True)
        return [head(seen.teacher[path]) for head, (_, path) in heads]

    @torch.no_grad()
    def describe_start(self, seen: Seen) -> list[str]:
        """A warning for heads from a file that know nothing of the labels: they may be of another teacher."""
        if self.teacher_heads_train:
            return []
        chance = math.log(seen.student_logits.shape[-1])
        notes = []
        for (_, path), logits in zip(self.pairs, self._of_teacher_heads(seen), strict=True):
            found = cross_entropy(logits, seen.target).item()
            if not found < chance:
                notes.append(
                    f"the teacher's head on {path} has cross-entropy {found:.2f} on the first batch, "
                    f"and equal logits {chance:.2f}: are teacher_heads those of this teacher?"
                )
        return notes

    def train(self, mode: bool = True) -> MHKD:
        super().train(mode)
        if not self.teacher_heads_train:
            self.teacher_heads.eval()
        return self

    def _load_teacher_heads(self, path: str) -> None:
        try:
            with open(open_regular(Path(path)), "rb") as file:
                check_sealed(file)
                content = load_plain(file)
        except Damage as damage:
            raise ValueError(f"teacher_heads {path} is damaged: {damage}") from None
        except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise ValueError(
                f"teacher_heads {path} cannot be read: {reason}; a run that used them has them in its last.pt"
            ) from None
        state = content.get("method", content) if isinstance(content, dict) else {}
        prefix = "teacher_heads."
        heads = {
            key.removeprefix(prefix): value
            for key, value in (state.items() if isinstance(state, dict) else ())
            if isinstance(key, str) and key.startswith(prefix)
        }
        if not heads:
            raise ValueError(
                f"teacher_heads {path} holds no teacher heads; expected the last.pt of an MHKD run"
            )
        try:
            self.teacher_heads.load_state_dict(heads)
        except RuntimeError as error:
            lines = [line.strip() for line in str(error).splitlines()]
            raise ValueError(f"teacher_heads {path} does not fit: {' '.join(lines[1:3])}") from None
        self.teacher_heads.requires_grad_(False).eval()


def _of_one_dtype(logits: list[Tensor]) -> list[Tensor]:
    """One dtype for one launch; autocast may have been on for only some of them."""
    dtypes = {one.dtype for one in logits}
    if len(dtypes) == 1:
        return logits
    widest = functools.reduce(torch.promote_types, dtypes, torch.float32)
    return [one.to(widest) for one in logits]


def _sum(values: list[Tensor]) -> Tensor:
    return torch.stack(values).sum()
