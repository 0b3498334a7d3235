"""Rows whose classes are spread over the ranks of a process group, and the formulas of ``reference`` on them.

A formula sees ``ShardedRows``: tensors [N, C_local], one shard of [N, C] per rank. Functions of each class by
itself act on the shard; reductions over the classes exchange one or two numbers per row. These are gathered
from all ranks and merged in rank order, so that every rank has the same bits. Other functions are refused.

The gradient is exact. A reduction's result is the same on every rank, and so is the gradient of the loss by
it, which each rank passes on to its own classes. Where a result is combined with the classes again, the
ranks' gradients by it are summed. All ranks run the same functions, and so the same collectives in order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor


class Shard(NamedTuple):
    """The classes ``first`` to ``first + sizes[rank]`` of ``classes``."""

    group: dist.ProcessGroup
    first: int
    sizes: tuple[int, ...]  # by rank in the group

    @property
    def classes(self) -> int:
        return sum(self.sizes)

    @property
    def largest(self) -> int:
        return max(self.sizes)

    def gathered(self, part: Tensor) -> Tensor:
        """[ranks, ...] of each rank's [...]."""
        parts = part.new_empty((len(self.sizes), *part.shape))
        dist.all_gather(list(parts.unbind()), part.contiguous(), group=self.group)
        return parts

    def total(self, part: Tensor) -> Tensor:
        """The sum of the ranks' tensors, in rank order."""
        return self.gathered(part).sum(0)

    def add_up_(self, tensor: Tensor) -> None:
        """Replace a large tensor by the sum of the ranks' tensors."""
        dist.all_reduce(tensor, group=self.group)

    def rows(self, logits: Tensor) -> ShardedRows:
        """Of local logits [N, C_local]."""
        rows = logits.as_subclass(ShardedRows)
        rows.shard = self
        return rows

    def columns(self, label: Tensor) -> Tensor:
        """Labels as indices into the shard; below 0 or beyond it if they are another rank's."""
        return label - self.first

    def exponentials(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """exp(x - top) [N, C_local], with the row's maximum over all classes, top [N, 1], and the sum [N, 1].

        Kept apart, because top + log(sum) would round off what distinguishes rows of large logits.
        """
        top = x.amax(-1, keepdim=True) if x.shape[-1] else x.new_full((x.shape[0], 1), -torch.inf)
        # Infinite only for an empty shard or an infinite logit, as in torch.logsumexp.
        base = top.masked_fill(top.isinf(), 0.0)
        own = (x - base).exp_()
        tops, sums = self.gathered(torch.stack([top, own.sum(-1, keepdim=True)])).unbind(1)
        top = tops.amax(0)
        top = top.masked_fill(top.isinf(), 0.0)
        bases = tops.masked_fill(tops.isinf(), 0.0)
        # An empty shard's sum is 0, and its base may be far above top.
        factors = torch.where(sums == 0, 0.0, (bases - top).exp())
        return own.mul_((base - top).exp()), top, (sums * factors).sum(0)


class _Total(torch.autograd.Function):
    """The sum over ranks. Its gradient is the same on every rank."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, shard: Shard) -> Tensor:
        return shard.total(part)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Enter(torch.autograd.Function):
    """A value that all ranks share, on its way into each rank's classes: their gradients by it add up."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, shard: Shard) -> Tensor:
        ctx.shard = shard
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.shard.total(gradient), None


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: Shard) -> Tensor:
        _, top, total = shard.exponentials(x)
        result = top + total.log()
        ctx.save_for_backward(x, result)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        x, result = ctx.saved_tensors
        return (x - result).exp_().mul_(gradient), None


class _LogSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: Shard) -> Tensor:
        _, top, total = shard.exponentials(x)
        result = (x - top).sub_(total.log())
        ctx.shard = shard
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (result,) = ctx.saved_tensors
        total = ctx.shard.total(gradient.sum(-1, keepdim=True))
        return gradient - result.exp().mul_(total), None


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: Shard) -> Tensor:
        exponentials, _, total = shard.exponentials(x)
        result = exponentials.div_(total)
        ctx.shard = shard
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (result,) = ctx.saved_tensors
        product = gradient * result
        return product - result * ctx.shard.total(product.sum(-1, keepdim=True)), None


class _Deviation(torch.autograd.Function):
    """The standard deviation, with C - 1; from each rank's mean and sum of squares around it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: Shard) -> Tensor:
        mean = x.sum(-1, keepdim=True) / max(x.shape[-1], 1)
        squares = (x - mean).square_().sum(-1, keepdim=True)
        means, parts = shard.gathered(torch.stack([mean, squares])).unbind(1)
        # Filled on the device: a tensor made of a list would wait for it.
        counts = torch.stack([x.new_full((1, 1), size) for size in shard.sizes])
        mean = (counts * means).sum(0) / shard.classes
        total = (parts + counts * (means - mean).square()).sum(0)
        result = (total / (shard.classes - 1)).sqrt()
        ctx.classes = shard.classes
        ctx.save_for_backward(x, mean, result)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        x, mean, result = ctx.saved_tensors
        factor = (gradient / (result * (ctx.classes - 1))).masked_fill(result == 0, 0.0)
        return (x - mean).mul_(factor), None


# ---- reductions, by the name of torch's function -------------------------------------------------------


def _sum(shard: Shard, x: Tensor) -> Tensor:
    return cast(Tensor, _Total.apply(x.sum(-1, keepdim=True), shard))


# All give [N, 1], the same on every rank.
_REDUCTIONS: dict[str, Callable[[Shard, Tensor], Tensor]] = {
    "sum": _sum,
    "mean": lambda shard, x: _sum(shard, x) / shard.classes,
    "std": lambda shard, x: cast(Tensor, _Deviation.apply(x, shard)),
    "logsumexp": lambda shard, x: cast(Tensor, _LogSumExp.apply(x, shard)),
}
_SOFTMAXES = {"log_softmax": _LogSoftmax, "softmax": _Softmax}
# What acts on each class by itself. Operators are without their underscores.
_BY_CLASS = frozenset([
    "abs", "add", "div", "double", "exp", "float", "gt", "invert", "log", "log_sigmoid", "logaddexp", "lt",
    "masked_fill", "mul", "neg", "radd", "rmul", "rsub", "rtruediv", "sigmoid", "sub", "truediv", "where",
])  # fmt: skip
_PLAIN = frozenset(["get", "new_ones", "new_zeros"])  # "get": of a property, such as dtype


class ShardedRows(Tensor):
    """A rank's [N, C_local] of [N, C]: see the module. Made by ``Shard.rows``."""

    shard: Shard

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = function.__name__.strip("_")
        options = dict(kwargs or {})
        shard = next(x.shard for x in (*args, *options.values()) if isinstance(x, ShardedRows))
        with torch._C.DisableTorchFunctionSubclass():
            if name in _PLAIN:
                return function(*map(_plain, args), **options)
            if name in _BY_CLASS:
                args = [_entered(x, shard) for x in args]
                return shard.rows(function(*args, **{key: _entered(x, shard) for key, x in options.items()}))
            x = _plain(args[0])
            # Over the classes, called as the formulas do.
            match name, tuple(args[1:]), options:
                case _, (-1 | 1,), {**more} if name in _REDUCTIONS and more.keys() <= {"keepdim"}:
                    result = _REDUCTIONS[name](shard, x)
                    return result if options.get("keepdim", False) else result.squeeze(-1)
                case _, (-1 | 1,), {} if name in _SOFTMAXES and not options:
                    return shard.rows(_SOFTMAXES[name].apply(x, shard))
                case "gather", (-1 | 1, label), {}:
                    return _gathered(shard, x, label)
                case "scatter", (-1 | 1, label, value), {}:
                    own = shard.columns(label) == torch.arange(x.shape[-1], device=x.device)
                    return shard.rows(x.masked_fill(own, value))
                case "getitem", (place,), {} if place == _NO_CLASSES:
                    return x[_NO_CLASSES]
        known = ", ".join((*_REDUCTIONS, *_SOFTMAXES, "gather", "scatter"))
        raise TypeError(
            f"{name} of logits whose classes are spread over ranks is not defined as it is called here; "
            f"expected functions of each class by itself, or over the last dimension: {known}"
        )


_NO_CLASSES = (slice(None), slice(None, 0))


def _plain(x: Any) -> Any:
    return x.as_subclass(Tensor) if isinstance(x, ShardedRows) else x


def _entered(x: Any, shard: Shard) -> Any:
    """An argument beside sharded rows, as a plain tensor."""
    if isinstance(x, Tensor) and not isinstance(x, ShardedRows) and x.requires_grad:
        return _Enter.apply(x, shard)
    return _plain(x)


def _gathered(shard: Shard, x: Tensor, label: Tensor) -> Tensor:
    """Each row's value at its label [N, 1], from the rank that has it; others add 0."""
    columns = shard.columns(label)
    own = (columns >= 0) & (columns < x.shape[-1])
    if x.shape[-1]:
        value = x.gather(1, columns.clamp(0, x.shape[-1] - 1)).masked_fill(~own, 0.0)
    else:
        value = x.sum(-1, keepdim=True)
    return cast(Tensor, _Total.apply(value, shard))
