"""What is asked of a backend, and where it goes: the records that operators and launchers share."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from fastkd.ops.spec import LOSSES, Loss, needs_of


class Call(NamedTuple):
    """What is asked of H pairs of logits [..., C], N rows each: the operator's arguments after them.

    ``options`` are the values of ``Loss.options``. Where ``dynamic`` is given (float32, on the logits'
    device) it holds those that are dynamic, known only when the operator runs, and ``options`` selects code:
    there a NaN is any number but 0 and 1.
    """

    target: Tensor | None  # int64 [N]; a label out of range gives a NaN row
    row_weight: Tensor | None  # float32 [N], or [H, N]; a row of weight 0 is not read
    divisor: int  # of every row, beside its weight
    loss: str
    options: Sequence[float]
    dynamic: Tensor | None
    backend: str
    reduced: bool  # to each pair's sum over its rows
    with_terms: bool
    with_gradient: bool = False

    @property
    def spec(self) -> Loss:
        return LOSSES[self.loss]

    @property
    def needs(self) -> int:
        """Bits of ``spec.Needs``."""
        spec = self.spec
        return needs_of(spec, tuple(self.options), spec.takes_label and self.target is not None)


class Outputs(NamedTuple):
    """What a launcher fills, pair by pair. ``sums`` is for the native backend on the CPU alone."""

    rows: Tensor  # float32 [H N]
    terms: Tensor | None = None  # float32 [K, H N]
    gradient: Tensor | None = None  # [H N, C]
    sums: Tensor | None = None  # float32 [H], or [] for one pair: the sums of rows
