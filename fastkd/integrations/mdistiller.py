"""The loss that an mdistiller config specifies; needs no package: the config is any nested mapping."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

import fastkd
from fastkd.integrations.arguments import check_tensors, named

# Every key of mdistiller's config and of its logit-standardisation fork (EXPERIMENT.LOGIT_STAND), by section.
# An unknown key may be misspelt, or belong to another fork and change the loss.
KEYS = {
    "EXPERIMENT": ("PROJECT", "NAME", "TAG", "LOGIT_STAND"),
    "DATASET": ("TYPE", "NUM_WORKERS", "TEST"),
    "DATASET.TEST": ("BATCH_SIZE",),
    "DISTILLER": ("TYPE", "TEACHER", "STUDENT"),
    "SOLVER": (
        "TRAINER", "BATCH_SIZE", "EPOCHS", "LR", "LR_DECAY_STAGES", "LR_DECAY_RATE", "WEIGHT_DECAY",
        "MOMENTUM", "TYPE", "DOT",
    ),
    "SOLVER.DOT": ("DELTA",),
    "LOG": ("TENSORBOARD_FREQ", "SAVE_CHECKPOINT_FREQ", "PREFIX", "WANDB"),
    "KD": ("TEMPERATURE", "LOSS"),
    "KD.LOSS": ("CE_WEIGHT", "KD_WEIGHT"),
    "DKD": ("CE_WEIGHT", "ALPHA", "BETA", "T", "WARMUP"),
}  # fmt: skip
# Sections of other methods: a whole config has them all; they are not read.
UNREAD = ("AT", "RKD", "FITNET", "KDSVD", "OFD", "NST", "PKT", "SP", "VID", "CRD", "REVIEWKD")
TYPES = ("NONE", "KD", "DKD")

# The value of a key that a YAML file omits, in the config of each project.
DEFAULTS: dict[str, dict[str, Any]] = {
    "mdistiller": {
        "DISTILLER.TYPE": "NONE", "EXPERIMENT.LOGIT_STAND": False,
        "KD.TEMPERATURE": 4, "KD.LOSS.CE_WEIGHT": 0.1, "KD.LOSS.KD_WEIGHT": 0.9,
        "DKD.CE_WEIGHT": 1.0, "DKD.ALPHA": 1.0, "DKD.BETA": 8.0, "DKD.T": 4.0, "DKD.WARMUP": 20,
    },
    # Without LOGIT_STAND: the option --logit-stand of its training script sets it.
    "logit-standardization-KD": {
        "DISTILLER.TYPE": "NONE",
        "KD.TEMPERATURE": 2, "KD.LOSS.CE_WEIGHT": 0.1, "KD.LOSS.KD_WEIGHT": 9,
        "DKD.CE_WEIGHT": 1.0, "DKD.ALPHA": 1.0, "DKD.BETA": 8.0, "DKD.T": 4.0, "DKD.WARMUP": 20,
    },
}  # fmt: skip


class MDistillerLoss(nn.Module):
    """The loss of ``from_mdistiller``: ``loss(student_logits, teacher_logits, target, epoch=None)``.

    Logits [N, C], ``target`` [N]. Returns ``(loss, terms)`` like ``fastkd.distill_loss``; ``terms`` are
    detached and unweighted. ``epoch`` counts from 1, as mdistiller's trainers do; only a warm-up needs it.
    """

    def __init__(
        self, weights: Mapping[str, float], temperature: float, standardize: bool, warmup: float
    ) -> None:
        super().__init__()
        self.weights: dict[str, Any] = dict(weights)
        self.temperature = temperature
        self.standardize = standardize
        self.warmup = warmup
        # Its constructor checks the numbers.
        fastkd.DistillLoss(temperature=temperature, standardize=standardize, **self.weights)

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor, *, epoch: int | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        check_tensors(student_logits=student_logits, teacher_logits=teacher_logits)
        if student_logits.dim() != 2:
            raise ValueError(f"student_logits has shape {list(student_logits.shape)}; expected [N, C]")
        factor = 1.0
        if self.warmup > 1:
            if epoch is None:
                raise TypeError(
                    f"epoch is missing: the config warms distillation up over {self.warmup:g} epochs, and "
                    "mdistiller counts them from 1"
                )
            if isinstance(epoch, bool) or not isinstance(epoch, (int, float)):
                raise TypeError(f"epoch is {epoch!r}; expected a number from 1")
            if epoch < 1:
                raise ValueError(f"epoch is {epoch!r}; mdistiller counts epochs from 1")
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


def from_mdistiller(cfg: Mapping[str, Any], *, defaults: str | None = None) -> MDistillerLoss:
    """The loss of ``cfg``: an mdistiller ``CfgNode``, or its YAML file read into a dict.

    ``DISTILLER.TYPE`` is KD (``KD.TEMPERATURE``, ``KD.LOSS.CE_WEIGHT``, ``KD.LOSS.KD_WEIGHT``), DKD
    (``DKD.CE_WEIGHT``, ``ALPHA``, ``BETA``, ``T``, and ``WARMUP`` epochs over which the distillation terms
    rise linearly) or NONE (only cross-entropy). ``EXPERIMENT.LOGIT_STAND``, of logit standardisation's fork,
    standardises.

    A YAML file omits the defaults of the project's ``cfg.py``, and does not say which project that is.
    ``defaults``, "mdistiller" or "logit-standardization-KD", does; without it a missing key is an error if
    the two disagree (``KD.TEMPERATURE`` 4 or 2, ``KD.LOSS.KD_WEIGHT`` 0.9 or 9). A merged ``CfgNode`` holds
    every key. Keys that neither project has are refused. Raises ``TypeError`` and ``ValueError`` for what has
    no meaning here.
    """
    if not isinstance(cfg, Mapping):
        raise TypeError(f"cfg is a {type(cfg).__name__}; expected mdistiller's config or a nested mapping")
    if defaults is not None and defaults not in DEFAULTS:
        raise ValueError(f"defaults is {defaults!r}; expected one of {', '.join(DEFAULTS)}, or None")
    _check_keys(cfg)
    kind = _get(cfg, "DISTILLER.TYPE", defaults)
    if kind == "NONE":
        return MDistillerLoss({"ce_weight": 1.0}, 1.0, False, 0)
    if kind not in TYPES:
        raise ValueError(
            f"DISTILLER.TYPE is {kind!r}; of mdistiller's methods fastkd has the logit losses "
            f"{', '.join(TYPES)}"
        )
    standardize = _get(cfg, "EXPERIMENT.LOGIT_STAND", defaults)
    if not isinstance(standardize, bool):
        raise TypeError(f"EXPERIMENT.LOGIT_STAND is {standardize!r}; expected True or False")
    keys = {
        "KD": {
            "temperature": "KD.TEMPERATURE", "ce_weight": "KD.LOSS.CE_WEIGHT",
            "kd_weight": "KD.LOSS.KD_WEIGHT",
        },
        "DKD": {
            "temperature": "DKD.T", "ce_weight": "DKD.CE_WEIGHT", "tckd_weight": "DKD.ALPHA",
            "nckd_weight": "DKD.BETA",
        },
    }[kind]  # fmt: skip
    weights = {name: _number(cfg, key, defaults) for name, key in keys.items()}
    temperature = weights.pop("temperature")
    warmup = _number(cfg, "DKD.WARMUP", defaults) if kind == "DKD" else 0.0
    if kind == "DKD" and not warmup > 0:
        raise ValueError(f"DKD.WARMUP is {warmup:g}; expected a number of epochs above 0 (1: no warm-up)")
    return named(keys, MDistillerLoss, weights, temperature, standardize, warmup)


def _check_keys(node: Mapping[str, Any], path: str = "") -> None:
    """Refuse a key that neither project's config has, with the nearest one that it has."""
    known = KEYS[path] if path else (*(section for section in KEYS if "." not in section), *UNREAD)
    for key, value in node.items():
        name = f"{path}.{key}" if path else str(key)
        if key not in known:
            (nearest,) = difflib.get_close_matches(str(key).upper(), known, n=1, cutoff=0.0)
            raise ValueError(
                f"{name} is no key that fastkd knows of mdistiller's configs; nearest is "
                f"{path + '.' if path else ''}{nearest} (expected {', '.join(known)}). A key that does "
                "not change the loss may be left out of cfg"
            )
        if name in KEYS:
            if not isinstance(value, Mapping):
                raise TypeError(f"{name} is {value!r}; expected a mapping")
            _check_keys(value, name)


def _get(cfg: Mapping[str, Any], path: str, defaults: str | None) -> Any:
    node: Any = cfg
    for key in path.split("."):
        if key not in node:
            return _default(path, defaults)
        node = node[key]
    return node


def _default(path: str, defaults: str | None) -> Any:
    if defaults is None:
        values = [table[path] for table in DEFAULTS.values() if path in table]
        if all(value == values[0] for value in values):
            return values[0]
        told = ", ".join(f"{table[path]} in {name}" for name, table in DEFAULTS.items())
        raise ValueError(
            f"{path} is not in cfg and its default differs: {told}; write it into cfg, pass the merged "
            "CfgNode, or say defaults='mdistiller' or defaults='logit-standardization-KD'"
        )
    if path not in DEFAULTS[defaults]:
        raise ValueError(
            f"{path} is not in cfg, and in {defaults} its training script sets it (--logit-stand); write it "
            "into cfg as True or False"
        )
    return DEFAULTS[defaults][path]


def _number(cfg: Mapping[str, Any], path: str, defaults: str | None) -> float:
    value = _get(cfg, path, defaults)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{path} is {value!r}; expected a number")
    return float(value)
