"""Forms of logits other than a tensor: ``LinearLogits``, ``TopKLogits`` and ``ShardedLogits``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, final

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@final
@dataclass(frozen=True, eq=False)
class LinearLogits:
    """Logits ``scale * (hidden @ weight.T + bias)`` that are never stored: a head's input and its weights.

    A loss computes them in chunks of rows, with the gradients of ``hidden``, ``weight`` and ``bias``, so that
    [..., C] is never in memory. With ``softcap`` they are ``softcap * tanh(logits / softcap)``.

    Args:
        hidden: [..., H].
        weight: [C, H], as of ``nn.Linear``. It may have more rows than there are classes.
        bias: [C], or None.
        scale: multiplies the logits before ``softcap``. Both are compiled in by torch.compile.
        softcap: bound of the logits' size, or None.
        num_classes: C, if ``weight`` is padded: the rows after it are not read, and their gradient is 0.
        chunk_rows: rows per chunk; by default as many as make good use of the device.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    num_classes: int | None = None
    chunk_rows: int | None = None

    @property
    def classes(self) -> int:
        return self.weight.shape[0] if self.num_classes is None else self.num_classes

    @property
    def shape(self) -> torch.Size:
        """Of the logits: [..., C]."""
        return torch.Size((*self.hidden.shape[:-1], self.classes))

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden.dtype

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By the names of the arguments; without ``bias`` if it is None."""
        layer = {"hidden": self.hidden, "weight": self.weight}
        return layer if self.bias is None else {**layer, "bias": self.bias}

    @property
    def requires_grad(self) -> bool:
        return any(tensor.requires_grad for tensor in self.tensors.values())

    def detach(self) -> LinearLogits:
        """The same logits as a constant, such as a teacher's."""
        return self.of([tensor.detach() for tensor in self.tensors.values()])

    def dense(self) -> Tensor:
        """The logits in memory, in plain torch: what the form stands for."""
        weight, bias = self.weight, self.bias
        if self.num_classes is not None:
            weight, bias = weight[: self.classes], None if bias is None else bias[: self.classes]
        logits = F.linear(self.hidden, weight, bias)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def of(self, tensors: Sequence[Tensor]) -> LinearLogits:
        """The same form of other tensors."""
        hidden, weight, *bias = tensors
        return replace(self, hidden=hidden, weight=weight, bias=bias[0] if bias else None)

    def under_autocast(self) -> LinearLogits:
        """The same, with the tensors in the dtype in which ``F.linear`` would use them here."""
        return self.of([tensor.to(autocast_dtype(tensor)) for tensor in self.tensors.values()])


@final
@dataclass(frozen=True, eq=False)
class TopKLogits:
    """A teacher known at K of C classes; all others count as one class, the rest.

    A loss of it is the loss over K + 1 classes: exact for what is known, and, up to rounding, never negative.
    ``fastkd.top_k`` makes them from logits; a serving engine's log-probabilities fit as they are.

    Args:
        log_probs: [..., K], at ``temperature`` and of all C classes.
        indices: [..., K] integers: which classes those are, each once, in any order.
        log_rest: [...], log of the probability of the other C - K classes together. None: log(1 - sum p),
            which float32 cannot tell from 0 below 6e-8, the value that is then used.
        num_classes: C.
        temperature: of the softmax that ``log_probs`` come from, which must be the loss's.
        rest: "one_class", or "renormalize": the probabilities are divided by their sum, and the other classes
            have none. The student is not renormalised.
    """

    log_probs: Tensor
    indices: Tensor
    log_rest: Tensor | None = None
    _: KW_ONLY
    num_classes: int
    temperature: float
    rest: Literal["one_class", "renormalize"] = "one_class"

    @property
    def shape(self) -> torch.Size:
        """Of the logits that it stands for: [..., C]."""
        return torch.Size((*self.log_probs.shape[:-1], self.num_classes))

    @property
    def dtype(self) -> torch.dtype:
        return self.log_probs.dtype

    @property
    def device(self) -> torch.device:
        return self.log_probs.device

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By the names of the arguments; without ``log_rest`` if it is None."""
        known = {"log_probs": self.log_probs, "indices": self.indices}
        return known if self.log_rest is None else {**known, "log_rest": self.log_rest}

    @property
    def requires_grad(self) -> bool:
        return any(tensor.requires_grad for tensor in self.tensors.values())

    def detach(self) -> TopKLogits:
        return self.of([tensor.detach() for tensor in self.tensors.values()])

    def of(self, tensors: Sequence[Tensor]) -> TopKLogits:
        """The same form of other tensors."""
        log_probs, indices, *log_rest = tensors
        return replace(self, log_probs=log_probs, indices=indices, log_rest=log_rest[0] if log_rest else None)


@final
@dataclass(frozen=True, eq=False)
class ShardedLogits:
    """A rank's part of logits whose classes are spread over the ranks of a process group.

    Every rank calls the loss with the same rows, target, weight and options, and its own classes. The loss
    is that of all classes, with the same bits on every rank, and the gradient that of the rank's classes. It
    is computed with the loss, so that backward has no collectives. Student and teacher are spread alike.

    The loss is computed in plain torch, in chunks of rows, and what is exchanged is a few numbers per row,
    never logits. In the first call of its kind the ranks compare what they were given, and all raise
    ``ValueError`` if it does not fit together. What cannot be used with it is in docs/large-classes.md.

    Args:
        local: the logits of this rank's classes: [..., C_local], or ``LinearLogits`` with this rank's rows of
            the head's weight. ``hidden`` is the same on every rank, and so is its gradient, which is summed
            over the ranks before the loss returns.
        group: the process group whose ranks have the other classes; None: the default group.
        first_class: the class of ``local[..., 0]``. The ranks' ranges tile 0 to C, in any order; they may
            differ in size, and be empty.
        num_classes: C, of all ranks together. Labels are from 0 to C - 1, on every rank.
    """

    local: Tensor | LinearLogits
    group: ProcessGroup | None = None
    _: KW_ONLY
    first_class: int
    num_classes: int

    @property
    def shape(self) -> torch.Size:
        """Of the logits of all ranks: [..., C]."""
        return torch.Size((*self.local.shape[:-1], self.num_classes))

    @property
    def dtype(self) -> torch.dtype:
        return self.local.dtype

    @property
    def device(self) -> torch.device:
        return self.local.device

    @property
    def requires_grad(self) -> bool:
        return self.local.requires_grad

    def detach(self) -> ShardedLogits:
        return replace(self, local=self.local.detach())


Form: TypeAlias = Tensor | LinearLogits | TopKLogits | ShardedLogits  # the logits of one model


# Asked here, because torch.compile of torch 2.10 and 2.11 cannot trace the question.
AUTOCAST_DEVICES = frozenset(
    filter(torch.amp.is_autocast_available, ("cpu", "cuda", "xpu", "mps", "hpu", "mtia"))
)


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which ``F.linear`` would use it here."""
    device = tensor.device.type
    enabled = device in AUTOCAST_DEVICES and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if enabled and tensor.dtype != torch.float64 else tensor.dtype


def _register(kind: type[LinearLogits] | type[TopKLogits] | type[ShardedLogits], *constant: str) -> None:
    """As a pytree of ``tensors``, or of ``local``; the constants are part of its structure."""

    def with_keys(form: Any) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
        parts = {"local": form.local} if kind is ShardedLogits else form.tensors
        keyed = [(_pytree.GetAttrKey(name), part) for name, part in parts.items()]
        return keyed, tuple(getattr(form, name) for name in constant)

    def flatten(form: Any) -> tuple[list[Any], tuple[Any, ...]]:
        keyed, values = with_keys(form)
        return [part for _, part in keyed], values

    def unflatten(tensors: Iterable[Any], values: tuple[Any, ...]) -> Any:
        return kind(*tensors, **dict(zip(constant, values, strict=True)))

    _pytree.register_pytree_node(
        kind,
        flatten,
        unflatten,
        serialized_type_name=f"fastkd.losses.forms.{kind.__name__}",
        flatten_with_keys_fn=with_keys,
    )


_register(LinearLogits, "scale", "softcap", "num_classes", "chunk_rows")
_register(TopKLogits, "num_classes", "temperature", "rest")
_register(ShardedLogits, "group", "first_class", "num_classes")
