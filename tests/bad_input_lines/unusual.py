"""Tensors of other kinds, and transforms, for the lines of docs/bad-inputs.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map

import fastkd


class Subclass(torch.Tensor):
    """With ordinary storage, and with torch's functions left as they are."""


class WithoutStorage(torch.Tensor):
    """As quantised and sharded weights are: its numbers are in another tensor, and torch unwraps it."""

    @staticmethod
    def of(inner: torch.Tensor) -> WithoutStorage:
        outer = torch.Tensor._make_wrapper_subclass(
            WithoutStorage, inner.shape, dtype=inner.dtype, device=inner.device
        )
        outer.inner = inner
        return outer

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        def unwrap(x: Any) -> Any:
            return x.inner if isinstance(x, cls) else x

        return function(*tree_map(unwrap, arguments), **tree_map(unwrap, options or {}))


def as_dtensor(values: torch.Tensor) -> torch.Tensor:
    """Replicated over a group of this process alone."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return distribute_tensor(values, init_device_mesh("cpu", (1,)))


def jagged(values: torch.Tensor) -> torch.Tensor:
    return torch.nested.nested_tensor([values], layout=torch.jagged)


def faked(values: torch.Tensor) -> torch.Tensor:
    from torch._subclasses.fake_tensor import FakeTensorMode

    global _mode
    _mode = _mode or FakeTensorMode()
    return _mode.from_tensor(values)


_mode: Any = None


def nothing_real(
    make: Callable[[torch.Tensor], torch.Tensor],
    student: torch.Tensor,
    teacher: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor,
) -> bool:
    """Whether loss and gradient of tensors without numbers have none either, and the right shapes."""
    leaf = make(student).requires_grad_()
    loss = fastkd.dkd_loss(leaf, make(teacher), make(target), weight=make(weight))
    loss.backward()
    assert leaf.grad is not None
    kinds = [type(x) is type(make(student)) and x.device == make(student).device for x in (loss, leaf.grad)]
    return all(kinds) and loss.shape == () and leaf.grad.shape == student.shape


def _dual(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    with forward_ad.dual_level():
        loss = fastkd.kd_loss(forward_ad.make_dual(student, torch.ones_like(student).cumsum(-1)), teacher)
        tangent = forward_ad.unpack_dual(loss).tangent
        return torch.zeros(()) if tangent is None else tangent


# A transform, and what a message about it may call it: torch.func's are made of grad, vmap and jvp.
Transform = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
TRANSFORMS: dict[str, tuple[Transform, str]] = {
    "torch.func.grad": (lambda s, t: torch.func.grad(fastkd.kd_loss)(s, t), "grad"),
    "torch.func.vjp": (
        lambda s, t: torch.func.vjp(lambda a: fastkd.kd_loss(a, t), s)[1](torch.tensor(2.0))[0],
        "vjp|grad",
    ),
    "torch.func.vmap": (lambda s, t: torch.func.vmap(fastkd.kd_loss)(s, t), "vmap"),
    "torch.func.jvp": (
        lambda s, t: torch.func.jvp(lambda a: fastkd.kd_loss(a, t), (s,), (s.cumsum(-1),))[1],
        "jvp|forward",
    ),
    "torch.func.jacrev": (
        lambda s, t: torch.func.jacrev(lambda a: fastkd.kd_loss(a, t, reduction="none"))(s),
        "jacrev|vmap|grad",
    ),
    "torch.func.jacfwd": (
        lambda s, t: torch.func.jacfwd(lambda a: fastkd.kd_loss(a, t, reduction="none"))(s),
        "jacfwd|vmap|jvp|forward",
    ),
    "vmap of grad": (lambda s, t: torch.func.vmap(torch.func.grad(fastkd.kd_loss))(s, t), "vmap|grad"),
    "forward-mode AD": (_dual, "forward|jvp"),
}
