"""What a teacher's cache stores of an image: its logits at K classes, all of them, or the input of its head.

A store makes records of what the teacher gives for a batch, and from records the entries of a batch that a
``GivenTeacher`` takes. A record has one field of float16; in records of missing images it is NaN.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastkd import losses
from fastkd.distill import FeatureError, GivenFeatures, GivenLogits, GivenTeacher, GivenTopK, find_classifier
from fastkd.distill.taps import INPUT, Taps, eval_mode, logits_of
from fastkd.errors import TrainError

from .resume import fingerprint

STORES = ("top_k", "logits", "features")
_LEAST = -6e4  # the least float16 is -65504


class CacheError(TrainError):
    """A cache of a teacher is missing, damaged or made for another recipe, or its folder exists."""


class Store(ABC):
    name: ClassVar[str]
    half: ClassVar[str]  # the field of float16
    num_classes: int

    @property
    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What cache.json says of the store."""

    @property
    @abstractmethod
    def record(self) -> np.dtype[Any]:
        """The type of one image's record."""

    @abstractmethod
    def of_teacher(self, teacher: nn.Module, images: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        """What the teacher gives for a batch, unrounded: the entries that ``teacher()`` takes."""

    @abstractmethod
    def pack(self, *outputs: Tensor) -> np.ndarray:
        """Records ``[N]``."""

    @abstractmethod
    def unpack(self, records: np.ndarray, device: torch.device) -> tuple[Tensor, ...]:
        """The entries that ``teacher()`` takes."""

    @abstractmethod
    def teacher(self) -> GivenTeacher: ...


@dataclass(frozen=True)
class TopKStore(Store):
    """Log-probabilities at a temperature of ``k`` classes, the label among them, and that of all others."""

    num_classes: int
    k: int
    temperature: float
    name: ClassVar[str] = "top_k"
    half: ClassVar[str] = "log_probs"

    @property
    def facts(self) -> dict[str, Any]:
        return {"store": self.name, "k": self.k, "temperature": self.temperature}

    @property
    def record(self) -> np.dtype[Any]:
        index = "<u2" if self.num_classes <= 2**16 else "<u4"
        return np.dtype([("log_rest", "<f4"), ("log_probs", "<f2", self.k), ("classes", index, self.k)])

    def of_teacher(self, teacher: nn.Module, images: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        # No loss that takes mixed labels reads the teacher's probability of a label.
        label = None if target.is_floating_point() else target
        logits = logits_of(teacher, images, "teacher")
        form = losses.top_k(logits, self.k, label, temperature=self.temperature)
        assert form.log_rest is not None
        return form.log_probs, form.indices, form.log_rest

    def pack(self, *outputs: Tensor) -> np.ndarray:
        log_probs, classes, log_rest = outputs
        records = np.empty(len(log_probs), self.record)
        records["log_probs"] = log_probs.clamp(min=_LEAST).cpu().numpy()
        records["classes"] = classes.cpu().numpy()
        records["log_rest"] = log_rest.cpu().numpy()
        return records

    def unpack(self, records: np.ndarray, device: torch.device) -> tuple[Tensor, ...]:
        classes = torch.from_numpy(records["classes"].astype(np.int64)).to(device, non_blocking=True)
        return (
            _part(records, "log_probs", device).float(),
            classes,
            _part(records, "log_rest", device),
        )

    def teacher(self) -> GivenTopK:
        return GivenTopK(self.num_classes, self.k, self.temperature)


@dataclass(frozen=True)
class LogitsStore(Store):
    """All log-probabilities, which float16 holds best where they are near 0, and the logsumexp."""

    num_classes: int
    name: ClassVar[str] = "logits"
    half: ClassVar[str] = "log_probs"

    @property
    def facts(self) -> dict[str, Any]:
        return {"store": self.name}

    @property
    def record(self) -> np.dtype[Any]:
        return np.dtype([("logsumexp", "<f4"), ("log_probs", "<f2", self.num_classes)])

    def of_teacher(self, teacher: nn.Module, images: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        return (logits_of(teacher, images, "teacher").float(),)

    def pack(self, *outputs: Tensor) -> np.ndarray:
        (logits,) = outputs
        records = np.empty(len(logits), self.record)
        records["logsumexp"] = logits.logsumexp(1).cpu().numpy()
        records["log_probs"] = logits.log_softmax(1).clamp(min=_LEAST).cpu().numpy()
        return records

    def unpack(self, records: np.ndarray, device: torch.device) -> tuple[Tensor, ...]:
        log_probs = _part(records, "log_probs", device).float()
        return (log_probs + _part(records, "logsumexp", device)[:, None],)

    def teacher(self) -> GivenLogits:
        return GivenLogits(self.num_classes)


@dataclass(frozen=True)
class FeaturesStore(Store):
    """The input ``[N, H]`` of the teacher's last linear layer; the layer itself is kept once, ``head``."""

    head: GivenFeatures
    path: str | None = None  # of the layer in the teacher; None: opened for reading
    # How far logits of the head may be from the teacher's, as a share of the largest.
    tolerance: float = 2e-3
    name: ClassVar[str] = "features"
    half: ClassVar[str] = "features"
    num_classes: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_classes", self.head.weight.shape[0])

    @property
    def facts(self) -> dict[str, Any]:
        return {"store": self.name, "width": self.head.weight.shape[1], "head": fingerprint(self.head)}

    @property
    def record(self) -> np.dtype[Any]:
        return np.dtype([("features", "<f2", self.head.weight.shape[1])])

    def of_teacher(self, teacher: nn.Module, images: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        assert self.path is not None
        taps = Taps(teacher, "teacher")
        path = taps.add(self.path + INPUT)
        with taps.reading() as found:
            logits = logits_of(teacher, images, "teacher").float()
        features = found[path]
        if features.dim() != 2:
            raise _unfit(self.path, f"gets {list(features.shape)}, expected [N, H]")
        with torch.autocast(features.device.type, enabled=False):
            again = F.linear(features.to(self.head.weight.dtype), self.head.weight, self.head.bias)
        if again.shape != logits.shape:
            raise _unfit(self.path, f"gives {again.shape[1]} numbers, and the network {logits.shape[1]}")
        if not bool((again - logits).abs().max() <= self.tolerance * logits.abs().max()):
            raise _unfit(self.path, "does not give its logits")
        return (features,)

    def pack(self, *outputs: Tensor) -> np.ndarray:
        (features,) = outputs
        records = np.empty(len(features), self.record)
        records["features"] = features.to(torch.float16).cpu().numpy()
        if not np.isfinite(records["features"]).all():
            largest = float(features.abs().max())
            raise CacheError(
                f"the teacher's features go up to {largest:.3g}, beyond float16's 65504; use --store logits"
            )
        return records

    def unpack(self, records: np.ndarray, device: torch.device) -> tuple[Tensor, ...]:
        return (_part(records, "features", device),)

    def teacher(self) -> GivenFeatures:
        return self.head


def features_store(teacher: nn.Module, example: Tensor, precision: str) -> FeaturesStore:
    """The store of ``teacher``, tried on a batch. Raises ``CacheError`` if its head cannot be found."""
    try:
        path, linear = find_classifier(teacher, "teacher")
    except FeatureError as error:
        reason = str(error).partition("; name the layer")[0]
        raise CacheError(f"--store features: {reason}; use --store logits or top_k") from None
    tolerance = FeaturesStore.tolerance if precision == "float32" else 0.05
    store = FeaturesStore(GivenFeatures(linear.weight, linear.bias), path, tolerance)
    with torch.no_grad(), eval_mode(teacher):
        store.of_teacher(teacher, example, torch.empty(0))
    return store


def _unfit(path: str, what: str) -> CacheError:
    return CacheError(
        f"--store features: the teacher's last linear layer {path!r} {what}; use --store logits or top_k"
    )


def stored_as(facts: dict[str, Any], head: Callable[[], GivenFeatures]) -> Store:
    """The store of a cache with these facts; ``head`` reads the teacher's. Raises for damaged facts."""
    classes = int(facts["classes"])
    match facts["store"]:
        case "top_k":
            return TopKStore(classes, int(facts["k"]), float(facts["temperature"]))
        case "logits":
            return LogitsStore(classes)
        case "features":
            store = FeaturesStore(head())
            if store.num_classes != classes or any(facts[k] != v for k, v in store.facts.items()):
                raise ValueError("its head is not the one that the features were made with")
            return store
    raise ValueError(f"its store is {facts['store']!r}, expected one of {', '.join(STORES)}")


def _part(records: np.ndarray, name: str, device: torch.device) -> Tensor:
    # Copied, since torch refuses the strides of a field, even for one row.
    return torch.from_numpy(records[name].copy()).to(device, non_blocking=True)
