"""The arguments and outputs that operators and launchers share."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from fastkd.ops.spec import LOSSES, Loss, needs_of


class Marks(NamedTuple):
    """Rows to ignore, for a launcher to apply to ``Call.row_weight``: rows that have weight 0."""

    labels: Tensor  # int64 [N]; a row is ignored if its label is
    ignore_index: int
    mean: bool  # divide the other rows' weights by their number, at least 1


class Call(NamedTuple):
    """The operator's arguments after its H pairs of logits [..., C] of N rows each.

    ``options`` are the values of ``Loss.options``. If ``dynamic`` is given (float32, on the logits' device),
    it holds the dynamic ones, known only when the operator runs. ``options`` then only selects code, with NaN
    for any number other than 0 and 1.
    """

    target: Tensor | None  # int64 [N]; a label out of range gives a NaN row
    row_weight: Tensor | None  # float32 [N], or [H, N]; a row of weight 0 is not read
    divisor: int  # every row loss is divided by it
    loss: str
    options: Sequence[float]
    dynamic: Tensor | None
    backend: str
    reduced: bool  # to the sum over rows of each pair
    with_terms: bool
    with_gradient: bool = False
    # int64 [N, K], ascending in each row: the teacher's logits are [N, K + 1], of these classes and of all
    # others as one. See reference.known_classes.
    indices: Tensor | None = None
    # Only of launches on the way around the dispatcher: no argument of the operator.
    marks: Marks | None = None

    @property
    def operands(self) -> tuple[Any, ...]:
        """The operator's arguments."""
        return self[:OPERANDS]

    @property
    def at_k(self) -> "Call":
        """For a teacher known at K classes: the loss over K + 1 classes, without terms of the student alone.

        Its target, if there is one, is still a class, and its options may be dynamic.
        """
        spec = self.spec
        labelled = spec.labelled_at_k(spec.options(*self.options))
        return self._replace(
            options=spec.at_k(self.options), target=self.target if labelled else None, indices=None
        )

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Those that an autograd function must save."""
        return self.target, self.row_weight, self.dynamic, self.indices

    def of(self, tensors: Sequence[Tensor | None]) -> "Call":
        """The same call with other ``tensors``."""
        target, row_weight, dynamic, indices = tensors
        return self._replace(target=target, row_weight=row_weight, dynamic=dynamic, indices=indices)

    @property
    def spec(self) -> Loss:
        return LOSSES[self.loss]

    @property
    def needs(self) -> int:
        """Bits of ``spec.Needs``."""
        spec = self.spec
        return needs_of(spec, tuple(self.options), spec.takes_label and self.target is not None)


# How many of a call's inputs are ``Call.operands`` and ``Call.tensors``.
OPERANDS, CALL_TENSORS = len(Call._fields) - 1, 4


class Outputs(NamedTuple):
    """Tensors that a launcher fills, pair by pair."""

    rows: Tensor  # float32 [H N]
    terms: Tensor | None = None  # float32 [K, H N]
    gradient: Tensor | None = None  # [H N, C]
    # Where the launcher can sum over rows too (``with_sums``): float32 [H], or [] for one pair, and [K, H] or
    # [K]. Losses or terms whose sum is None are summed afterwards.
    sums: Tensor | None = None
    term_sums: Tensor | None = None
    counters: Tensor | None = None  # int32, of Triton's programs

    def summed(self, pairs: int) -> "Outputs":
        """With memory for the sums."""
        rows, terms, gradient = self[:3]
        shape = () if pairs == 1 else (pairs,)
        term_sums = None if terms is None else rows.new_empty(terms.shape[0], *shape)
        return Outputs(rows, terms, gradient, rows.new_empty(shape), term_sums)
