"""Checks for tensors whose values are not in their memory: wrappers, lazy bits, transforms, freed storage.

Kernels read memory directly, so every tensor is checked before its pointer is taken.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

# Wrappers used by tracing; the operator has a fake implementation for them.
TRACED = (FakeTensor, FunctionalTensor)
# How to unwrap well-known wrappers.
_REMEDIES = {
    "DTensor": "pass its .to_local() (each rank its own rows) or its .full_tensor()",
    "MaskedTensor": "pass its .to_tensor(value), and ignore rows with weight= or ignore_index",
    "AsyncCollectiveTensor": "pass its .wait()",
}
_ORDINARY_DISPATCH = Tensor.__torch_dispatch__


def is_transformed(tensor: Tensor) -> bool:
    """Whether it is wrapped by a transform of torch.func, or by autograd.grad(…, is_grads_batched=True)."""
    functorch = torch._C._functorch
    return functorch.is_functorch_wrapped_tensor(tensor) or functorch.is_legacy_batchedtensor(tensor)


def check_ordinary(name: str, tensor: Tensor) -> None:
    """Raise TypeError for sparse and nested tensors and wrapper subclasses."""
    if torch.compiler.is_compiling():
        return  # the compiler uses its own wrappers, and rejects tensors that it cannot trace
    kind = type(tensor)
    if (
        kind is not Tensor
        and kind.__torch_dispatch__ is not _ORDINARY_DISPATCH
        and not isinstance(tensor, TRACED)
    ):
        remedy = _REMEDIES.get(kind.__name__, "pass the ordinary tensor that it wraps")
        raise TypeError(f"{name} is a {kind.__name__}; expected an ordinary tensor: {remedy}")
    if tensor.is_nested:
        raise TypeError(
            f"{name} is a nested tensor; expected an ordinary one: pass its .values(), which holds all rows"
        )
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} has layout {tensor.layout}; expected a dense tensor: pass its .to_dense()")


def as_ordinary(name: str, tensor: Tensor) -> Tensor:
    """Return a tensor with the values in its memory: the same one if they already are. Differentiable."""
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
    except NotImplementedError:  # inside a transform: the wrapped tensor has the storage
        return tensor
    if tensor._is_zerotensor():
        return torch.zeros_like(tensor, memory_format=torch.contiguous_format)
    raise ValueError(
        f"{name} has shape {list(tensor.shape)} and its storage is empty (freed by resize_(0), as FSDP "
        "does between uses); expected a tensor with storage"
    )


def is_traced(tensors: Iterable[Tensor]) -> bool:
    """Whether the call must use torch's dispatcher: under a compiler, with fake tensors or a dispatch
    mode."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    for tensor in tensors:  # noqa: SIM110 - a generator is slower
        if type(tensor) is not Tensor:
            return True
    return False


def is_readable(tensor: Tensor) -> bool:
    """Whether the values can be read without synchronisation or a graph break."""
    return tensor.is_cpu and not is_traced((tensor,)) and not is_transformed(tensor)


def transform_of(tensors: Iterable[Tensor | None]) -> str | None:
    """Return the transform of torch.func, or forward-mode AD, that applies to one of these, or None.

    The memory of such a tensor is only part of its value: a kernel would lose the tangent or the batch.
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
    """Return the active transforms, whatever they apply to.

    torch.compile evaluates it while tracing, inside the transforms, as a constant.
    """
    stack = torch._C._functorch.get_interpreter_stack()
    if stack:
        names = {str(level.key()).rpartition(".")[2].lower() for level in stack}
        return "torch.func." + "/".join(sorted(names))
    return "forward-mode AD" if forward_ad._current_level >= 0 else None


_transform_around._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see ops.backend.resolve
