"""The loss that an mdistiller config means; needs no package: the config is any nested mapping."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

import fastkd

# What mdistiller's own config holds where a YAML file says nothing.
DEFAULTS: dict[str, Any] = {
    "DISTILLER": {"TYPE": "NONE"},
    "KD": {"TEMPERATURE": 4, "LOSS": {"CE_WEIGHT": 0.1, "KD_WEIGHT": 0.9}},
    "DKD": {"CE_WEIGHT": 1.0, "ALPHA": 1.0, "BETA": 8.0, "T": 4.0, "WARMUP": 20},
    "EXPERIMENT": {"LOGIT_STAND": False},
}
TYPES = ("NONE", "KD", "DKD")


class MDistillerLoss(nn.Module):
    """What ``from_mdistiller`` returns: ``loss(student_logits, teacher_logits, target, epoch=None)``.

    It gives ``(loss, terms)`` like ``fastkd.distill_loss``; ``terms`` are detached and unweighted. ``epoch``
    counts from 1, as mdistiller's trainers do; only a warm-up needs it.
    """

    def __init__(
        self, weights: Mapping[str, float], temperature: float, standardize: bool, warmup: float
    ) -> None:
        super().__init__()
        self.weights: dict[str, Any] = dict(weights)
        self.temperature = temperature
        self.standardize = standardize
        self.warmup = warmup
        # Its constructor checks the numbers at once.
        fastkd.DistillLoss(temperature=temperature, standardize=standardize, **self.weights)

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor, *, epoch: int | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        factor = 1.0
        if self.warmup > 1:
            if epoch is None:
                raise TypeError(
                    f"epoch is missing: the config warms distillation up over {self.warmup:g} epochs, and "
                    "mdistiller counts them from 1"
                )
            factor = min(epoch / self.warmup, 1.0)
        weights = {
            name: value if name == "ce_weight" else factor * value for name, value in self.weights.items()
        }
        return fastkd.distill_loss(
            student_logits,
            teacher_logits,
            target,
            temperature=self.temperature,
            standardize=self.standardize,
            **weights,
        )

    def extra_repr(self) -> str:
        weights = ", ".join(f"{name}={value:g}" for name, value in self.weights.items())
        rest = f"temperature={self.temperature:g}, standardize={self.standardize}, warmup={self.warmup:g}"
        return f"{weights}, {rest}"


def from_mdistiller(cfg: Mapping[str, Any]) -> MDistillerLoss:
    """The loss of ``cfg``: an mdistiller ``CfgNode``, or its YAML file read into a dict.

    ``DISTILLER.TYPE`` is KD (``KD.TEMPERATURE``, ``KD.LOSS.CE_WEIGHT``, ``KD.LOSS.KD_WEIGHT``), DKD
    (``DKD.CE_WEIGHT``, ``ALPHA``, ``BETA``, ``T``, and ``WARMUP`` epochs over which the distillation terms
    rise linearly) or NONE (cross-entropy alone). ``EXPERIMENT.LOGIT_STAND``, of logit standardisation's fork,
    standardises. What is missing takes mdistiller's default.
    Raises ``TypeError`` and ``ValueError`` for what has no meaning here.
    """
    if not isinstance(cfg, Mapping):
        raise TypeError(f"cfg is a {type(cfg).__name__}; expected mdistiller's config or a nested mapping")
    kind = _get(cfg, "DISTILLER", "TYPE")
    standardize = bool(_get(cfg, "EXPERIMENT", "LOGIT_STAND"))
    if kind == "NONE":
        return MDistillerLoss({"ce_weight": 1.0}, 1.0, False, 0)
    if kind == "KD":
        weights = {
            "ce_weight": _number(cfg, "KD", "LOSS", "CE_WEIGHT"),
            "kd_weight": _number(cfg, "KD", "LOSS", "KD_WEIGHT"),
        }
        return MDistillerLoss(weights, _number(cfg, "KD", "TEMPERATURE"), standardize, 0)
    if kind == "DKD":
        weights = {
            "ce_weight": _number(cfg, "DKD", "CE_WEIGHT"),
            "tckd_weight": _number(cfg, "DKD", "ALPHA"),
            "nckd_weight": _number(cfg, "DKD", "BETA"),
        }
        return MDistillerLoss(weights, _number(cfg, "DKD", "T"), standardize, _number(cfg, "DKD", "WARMUP"))
    raise ValueError(
        f"DISTILLER.TYPE is {kind!r}; of mdistiller's methods fastkd has the logit losses {', '.join(TYPES)}"
    )


def _get(cfg: Mapping[str, Any], *path: str) -> Any:
    node: Any = cfg
    default: Any = DEFAULTS
    for depth, name in enumerate(path):
        default = default[name]
        if not isinstance(node, Mapping):
            raise TypeError(f"{'.'.join(path[:depth])} is {node!r}; expected a mapping")
        if name not in node:
            for rest in path[depth + 1 :]:
                default = default[rest]
            return default
        node = node[name]
    return node


def _number(cfg: Mapping[str, Any], *path: str) -> float:
    value = _get(cfg, *path)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{'.'.join(path)} is {value!r}; expected a number")
    return float(value)
