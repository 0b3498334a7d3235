"""Tensors whose values are not simply those in their memory: made ordinary, computed another way, or refused.

Kernels read memory, so every tensor is looked at before its pointer is taken.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

# Wrappers that tracing passes to the operator, which has shapes for them.
TRACED = (FakeTensor, FunctionalTensor)
# How to get an ordinary tensor out of well-known wrappers.
_WAYS_OUT = {
    "DTensor": "pass its .to_local() (each rank its own rows) or its .full_tensor()",
    "MaskedTensor": "pass its .to_tensor(value), and ignore rows with weight= or ignore_index",
    "AsyncCollectiveTensor": "pass its .wait()",
}
_ORDINARY_DISPATCH = Tensor.__torch_dispatch__


def is_transformed(tensor: Tensor) -> bool:
    """Whether it is inside a transform of torch.func, or of autograd.grad(…, is_grads_batched=True)."""
    functorch = torch._C._functorch
    return functorch.is_functorch_wrapped_tensor(tensor) or functorch.is_legacy_batchedtensor(tensor)


def check_ordinary(name: str, tensor: Tensor) -> None:
    """Raise TypeError for a tensor that no kernel can read as rows of numbers: sparse, nested, a wrapper."""
    if torch.compiler.is_compiling():
        return  # the compiler uses wrappers of its own, and knows which tensors it can trace
    kind = type(tensor)
    if (
        kind is not Tensor
        and kind.__torch_dispatch__ is not _ORDINARY_DISPATCH
        and not isinstance(tensor, TRACED)
    ):
        way_out = _WAYS_OUT.get(kind.__name__, "pass the ordinary tensor that it wraps")
        raise TypeError(f"{name} is a {kind.__name__}; expected an ordinary tensor: {way_out}")
    if tensor.is_nested:
        raise TypeError(
            f"{name} is a nested tensor; expected an ordinary one: pass its .values(), which holds all rows"
        )
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} has layout {tensor.layout}; expected a dense tensor: pass its .to_dense()")


def as_ordinary(name: str, tensor: Tensor) -> Tensor:
    """Return it with its values in its memory, unchanged if they are there already; differentiable."""
    if torch.compiler.is_compiling():
        return tensor
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    if type(tensor) is not Tensor:
        if isinstance(tensor, TRACED):
            return tensor
        tensor = tensor.as_subclass(Tensor)
    try:
        if tensor.untyped_storage().nbytes() or not tensor.numel():
            return tensor
    except NotImplementedError:  # inside a transform: the wrapped tensor has the memory
        return tensor
    if tensor._is_zerotensor():
        return torch.zeros_like(tensor, memory_format=torch.contiguous_format)
    raise ValueError(
        f"{name} has shape {list(tensor.shape)} and its storage is empty (freed by resize_(0), as FSDP "
        "does between uses); expected a tensor whose values are there"
    )


def is_traced(tensors: Iterable[Tensor]) -> bool:
    """Whether the call must go through torch's dispatcher: for a compiler, fake tensors, a dispatch mode."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    for tensor in tensors:  # noqa: SIM110 - a generator is slower
        if type(tensor) is not Tensor:
            return True
    return False


def is_readable(tensor: Tensor) -> bool:
    """Whether the host can read the values without waiting for a device or breaking a graph."""
    return tensor.is_cpu and not is_traced((tensor,)) and not is_transformed(tensor)


def transform_of(tensors: Iterable[Tensor | None]) -> str | None:
    """Return the transform of torch.func, or forward-mode AD, that one of these is inside, or None.

    The memory of such a tensor is not its whole value: a kernel that reads it loses a tangent or a batch.
    """
    if torch.compiler.is_compiling():
        return _transform_around()
    if torch._C._functorch.peek_interpreter_stack() is not None:
        for tensor in tensors:
            if tensor is not None and is_transformed(tensor):
                if torch._C._functorch.is_batchedtensor(tensor):
                    return "torch.func.vmap"
                return _transform_around()
    if forward_ad._current_level >= 0:
        for tensor in tensors:
            if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
                return "forward-mode AD"
    return None


def _transform_around() -> str | None:
    """Return the transforms that are active here, whatever they apply to.

    torch.compile enters them as it traces and sees a constant; it traces again elsewhere.
    """
    stack = torch._C._functorch.get_interpreter_stack()
    if stack:
        names = {str(level.key()).rpartition(".")[2].lower() for level in stack}
        return "torch.func." + "/".join(sorted(names))
    return "forward-mode AD" if forward_ad._current_level >= 0 else None


_transform_around._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see ops.backend.resolve
