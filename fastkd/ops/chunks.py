"""The computation of a loss of a linear layer's output, in chunks of rows that are never all in memory.

For each chunk: the logits of both models by matmul, the row kernel, which writes losses and the gradient of
the logits, and two matmuls that turn it into gradients of the layer's input and weight. All chunks reuse the
same buffers. The gradients are those of the sum of all rows, in float32 (of float64, in float64).

Most kernels write the gradient into a buffer of its own: they keep exponentials there, and read the label's
logits late. Where ``Loss.may_alias`` allows it, the gradient replaces the logits, unless softcap needs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd.ops.call import Call, Outputs
from fastkd.ops.layout import as_rows
from fastkd.ops.operators import launcher_of
from fastkd.ops.shards import Shard
from fastkd.ops.spec import Needs
from fastkd.reference import centered

# Bytes of a chunk's logits of one model: enough rows for a matmul that is not bound by reading the weights.
_CHUNK_BYTES = {"cpu": 80 << 20, "cuda": 256 << 20}
_LEAST_ROWS = 224  # with 146, 1024 x 512 x 131,072 took 1.13 times as long as stored logits on a CPU
# Bytes of what the CPU raises to float32 at a time.
_BLOCK_BYTES = 8 << 20
# float16 holds 2^-24 to 2^16: gradients are stored with a bound of 2^10, before row weights and 1/N.
_LARGEST_HALF = 1024.0
_WIDE = (torch.float32, torch.float64)

Part = slice | Tensor  # of the rows: a range, or int64 indices


class LinearCall(NamedTuple):
    """``Call`` and what chunks need."""

    call: Call
    classes: int
    chunk_rows: int  # 0: chosen here
    center_teacher: bool
    student: tuple[float, float] = (1.0, 0.0)  # scale and softcap (0: none) of a linear layer
    teacher: tuple[float, float] = (1.0, 0.0)
    shard: Shard | None = None  # of the classes, if they are spread over ranks


def chunk_rows_of(chosen: int, rows: int, classes: int, element_bytes: int, device: str) -> int:
    """Rows per chunk: chunks of about equal size."""
    if not chosen:
        fitting = _CHUNK_BYTES.get(device, _CHUNK_BYTES["cuda"]) // (classes * element_bytes)
        chosen = max(fitting, _LEAST_ROWS)
    chunks = -(-rows // chosen)
    return -(-rows // max(chunks, 1)) or 1


def count_rows(tensors: Sequence[Tensor]) -> int:
    """Of the tensors of a model: its logits [..., C], or hidden [N, H], weight and bias."""
    first = tensors[0]
    return first.shape[0] if len(tensors) > 1 else first.shape[:-1].numel()


def new_gradients(student: Sequence[Tensor], wanted: Sequence[bool], *, zeros: bool) -> list[Tensor | None]:
    """Memory for the gradient of each tensor of the student: a layer's in float32 at least, logits' in their
    dtype.

    ``zeros``: not every row will be written.
    """
    layer = len(student) > 1
    made: list[Tensor | None] = []
    for index, (tensor, asked) in enumerate(zip(student, wanted, strict=True)):
        dtype = wide(tensor.dtype) if layer else tensor.dtype
        fresh = tensor.new_zeros if zeros or index > 0 else tensor.new_empty  # weight and bias are sums
        made.append(fresh(tensor.shape, dtype=dtype) if asked else None)
    return made


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of losses and sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def compute(
    student: Sequence[Tensor], teacher: Sequence[Tensor], options: LinearCall, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
    """Losses [N] and terms [K, N] in float32, or their sums, and the gradients of the student's tensors.

    ``student`` and ``teacher`` are (logits,), (hidden, weight) or (hidden, weight, bias). With
    ``options.shard`` these are a rank's classes; the gradient of hidden is that of the whole loss.
    """
    with _without_autocast(student[0].device.type):  # which would cast the operands of some matmuls
        return _compute(student, teacher, options, wanted)


def _without_autocast(device: str) -> AbstractContextManager[object]:
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _compute(
    student: Sequence[Tensor], teacher: Sequence[Tensor], options: LinearCall, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
    call, classes, first, shard = options.call, options.classes, student[0], options.shard
    count = count_rows(student)
    kept = _kept_rows(call.row_weight)
    used = count if kept is None else len(kept)
    widest = classes if shard is None else shard.largest  # so that all ranks have the same chunks
    chunk = chunk_rows_of(options.chunk_rows, used, widest, first.element_size(), first.device.type)
    ours = _model(student, options.student, classes, chunk)
    theirs = ours
    if call.needs & Needs.DISTILLS:
        theirs = _model(teacher, options.teacher, classes, chunk)
    if kept is None and call.row_weight is not None and isinstance(ours, _Layer):
        # Rows that are not read may hold anything, and 0 * NaN would be part of the weight's gradient.
        ours.hidden = ours.hidden.masked_fill((call.row_weight == 0)[:, None], 0.0)

    fresh = first.new_empty if kept is None else first.new_zeros
    rows = fresh(count, dtype=wide(first.dtype))
    term_count = len(call.spec.terms) if call.with_terms else 0
    terms = fresh((term_count, count), dtype=rows.dtype) if term_count else None
    gradients = new_gradients(student, wanted, zeros=kept is not None)
    to_layer = any(wanted) and isinstance(ours, _Layer)
    to_logits = gradients[0].view(count, classes) if gradients[0] is not None and not to_layer else None
    in_place = to_layer and call.spec.may_alias and not options.student[1]
    apart = (to_layer and not in_place) or (to_logits is not None and kept is not None)
    spare = first.new_empty(chunk, classes) if apart else None

    launch = _launcher(options)
    for start in range(0, used, chunk):
        size = min(chunk, used - start)
        part: Part = slice(start, start + size) if kept is None else kept[start : start + size]
        student_logits = ours.logits(part)
        teacher_logits = student_logits if theirs is ours else theirs.logits(part)
        if options.center_teacher and shard is None:
            teacher_logits = centered(teacher_logits)
        gradient = student_logits if in_place else None
        if spare is not None:
            gradient = spare[:size]
        elif to_logits is not None:
            gradient = to_logits[part]
        of_chunk, factors = _chunk_call(call, part, student_logits, to_layer, shard)
        losses = rows.new_empty(size)
        chunk_terms = None if terms is None else rows.new_empty(term_count, size)
        outputs = Outputs(losses, chunk_terms, gradient)
        pair: tuple[Sequence[Tensor], Sequence[Tensor]] = [student_logits], [teacher_logits]
        if shard is None:  # a kernel, which needs dense classes
            pair = as_rows(*pair, call.indices is not None)
        launch(*pair, of_chunk, outputs)
        rows[part] = losses if factors is None else losses * factors
        if terms is not None and chunk_terms is not None:
            terms[:, part] = chunk_terms if factors is None else chunk_terms * factors
        if gradient is None:
            continue
        if isinstance(ours, _Layer):
            _to_layer(ours, part, student_logits, gradient, factors, gradients)
        elif to_logits is not None and spare is not None:
            to_logits[part] = gradient
    if shard is not None and to_layer and gradients[0] is not None:
        shard.add_up_(gradients[0])  # each rank's is that by its own classes
    if call.reduced:
        return rows.sum(), None if terms is None else terms.sum(-1), gradients
    return rows, terms, gradients


def _launcher(options: LinearCall) -> Any:
    if options.shard is None:
        return launcher_of(options.call.backend).row_loss
    from fastkd.ops import sharded_rows

    return partial(sharded_rows.row_loss, options.shard, options.center_teacher)


def _kept_rows(weight: Tensor | None) -> Tensor | None:
    """The indices of the rows of a weight other than 0, which alone cost a matmul; None: all rows.

    On a GPU this waits for the device, once per loss; a graph that is being captured cannot.
    """
    if weight is None or (weight.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    kept = weight.nonzero().squeeze(1)
    return None if len(kept) == len(weight) else kept


# ---- logits of a chunk ---------------------------------------------------------------------------------


class _Stored:
    """Logits in memory."""

    def __init__(self, logits: Tensor) -> None:
        self.stored = logits

    def logits(self, part: Part) -> Tensor:
        """Of the rows ``part``: a view where strides allow it."""
        if self.stored.dim() == 2:
            return self.stored[part]
        leading, classes = self.stored.shape[:-1], self.stored.shape[-1]
        try:
            return self.stored.view(leading.numel(), classes)[part]
        except RuntimeError:  # such as logits[:, :-1] of [B, T, C]
            rows = torch.arange(leading.numel(), device=self.stored.device)[part]
            return self.stored[torch.unravel_index(rows, leading)]


class _Layer:
    """Logits of a linear layer, computed into a buffer that all chunks share."""

    def __init__(
        self, layer: Sequence[Tensor], numbers: tuple[float, float], classes: int, chunk: int
    ) -> None:
        self.hidden, weight, *bias = layer
        self.weight = weight[:classes]
        self.bias = bias[0][:classes] if bias else None
        self.scale, self.softcap = numbers
        self.buffer = self.hidden.new_empty(chunk, classes)

    def logits(self, part: Part) -> Tensor:
        """Of the rows ``part``; overwritten by the next call."""
        hidden = self.hidden[part]
        out = self.buffer[: len(hidden)]
        if self.bias is None:
            torch.mm(hidden, self.weight.t(), out=out)
        else:
            torch.addmm(self.bias, hidden, self.weight.t(), out=out)
        if self.scale != 1.0:
            out.mul_(self.scale)
        if self.softcap:
            out.div_(self.softcap).tanh_().mul_(self.softcap)
        return out


def _model(
    tensors: Sequence[Tensor], numbers: tuple[float, float], classes: int, chunk: int
) -> _Stored | _Layer:
    return _Stored(tensors[0]) if len(tensors) == 1 else _Layer(tensors, numbers, classes, chunk)


# ---- gradients -----------------------------------------------------------------------------------------


def _chunk_call(
    call: Call, part: Part, logits: Tensor, to_layer: bool, shard: Shard | None
) -> tuple[Call, Tensor | None]:
    """The call for a chunk, and what its rows must be multiplied by afterwards, in float32.

    In float16 the gradient of a layer's row is stored without its weight and 1/N, times a power of two, so
    that it uses the format's range.
    """
    target = None if call.target is None else call.target[part]
    weight = None if call.row_weight is None else call.row_weight[part]
    indices = None if call.indices is None else call.indices[part]
    call = call._replace(target=target, row_weight=weight, indices=indices, reduced=False, with_gradient=True)
    if not to_layer or logits.dtype != torch.float16:
        return call, None
    gains = _gain(call, logits, logits.shape[1] if shard is None else shard.classes).repeat(len(logits))
    if call.needs & Needs.STANDARDIZED:  # whose gradient has the factor 1 / std
        whole = logits if shard is None else shard.rows(logits.float())
        gains *= whole.std(1).float().clamp(2.0**-12, 1.0)
    factors = 1.0 / (gains * call.divisor)
    if weight is not None:
        factors = factors * weight
        gains = torch.where(weight == 0, 0.0, gains)
    return call._replace(row_weight=gains, divisor=1), factors


def _gain(call: Call, logits: Tensor, classes: int) -> Tensor:
    """The power of two that brings the gradients of the rows to the range of float16, in float32.

    Of numbers that are in a tensor, which is not read back, it is computed on the device.
    """
    values: list[Any] = list(call.options)
    if call.dynamic is not None:
        values[: call.spec.dynamic] = call.dynamic.unbind()
    bound = call.spec.bound(call.spec.options(*values), classes)
    bound = logits.new_ones(1, dtype=torch.float32) * bound
    return (_LARGEST_HALF / bound.clamp_min(2.0**-20)).log2().floor().exp2()


def _to_layer(
    layer: _Layer,
    part: Part,
    logits: Tensor,
    gradient: Tensor,
    factors: Tensor | None,
    sums: Sequence[Tensor | None],
) -> None:
    """From the gradient of a chunk's logits to those of the layer's input, weight and bias."""
    to_hidden, to_weight, to_bias = (*sums, None)[:3]
    scale, classes = layer.scale, logits.shape[1]
    if layer.softcap:  # times 1 - tanh^2, from the logits, which are not needed any more
        tanh = logits.div_(layer.softcap)
        torch.ops.aten.tanh_backward.grad_input(gradient, tanh, grad_input=gradient)
    if to_hidden is not None:
        product = to_hidden[part]  # a view, or with indices a copy
        _multiply(gradient, layer.weight, product)
        if factors is not None:
            product *= factors[:, None]
        if scale != 1.0:
            product *= scale
        if not isinstance(part, slice):
            to_hidden[part] = product
    if to_weight is not None:
        hidden = layer.hidden[part]
        operand = hidden if factors is None else hidden.float() * factors[:, None]
        _accumulate(gradient, operand, scale, to_weight[:classes])
    if to_bias is not None:
        ones = gradient.new_ones(()).expand(len(gradient)) if factors is None else factors
        _accumulate(gradient, ones[:, None], scale, to_bias[:classes, None])


def _multiply(gradient: Tensor, weight: Tensor, out: Tensor) -> None:
    """``out = gradient @ weight``, in float32."""
    if gradient.dtype in _WIDE:
        torch.mm(gradient, weight, out=out)
    elif gradient.is_cuda:
        torch.mm(gradient, weight, out_dtype=torch.float32, out=out)
    else:
        out.zero_()
        for block in _blocks(gradient, weight.shape[1]):
            out.addmm_(gradient[:, block].float(), weight[block].float())


def _accumulate(gradient: Tensor, hidden: Tensor, scale: float, out: Tensor) -> None:
    """``out += scale * gradient.T @ hidden``, in float32."""
    if gradient.dtype in _WIDE:
        out.addmm_(gradient.t(), hidden, alpha=scale)
    elif gradient.is_cuda and hidden.dtype == gradient.dtype:
        torch.addmm(out, gradient.t(), hidden, alpha=scale, out_dtype=torch.float32, out=out)
    else:
        wide = hidden.float()
        for block in _blocks(gradient, hidden.shape[1]):
            out[block].addmm_(gradient[:, block].float().t(), wide, alpha=scale)


def _blocks(gradient: Tensor, width: int) -> list[slice]:
    """Blocks of classes whose gradients [N, C] and weights [C, width] may be raised to float32."""
    rows, classes = gradient.shape
    size = max(_BLOCK_BYTES // (4 * max(width, rows, 1)), 1)
    return [slice(start, min(start + size, classes)) for start in range(0, classes, size)]
