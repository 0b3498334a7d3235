"""Losses of logits that are a linear layer's output, in chunks of rows that are never all in memory.

For each chunk: the logits of both models by matmul, the row kernel, which writes losses and the gradient of
the logits, and two matmuls that turn it into gradients of the layer's input and weights. All chunks reuse the
same buffers. Gradients are computed with the loss, held in float32 until backward, scaled by grad_output and
rounded once.

The kernel writes its gradient into a buffer of its own: it keeps exponentials there, and reads the label's
logits late.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd.ops.call import Call, Outputs
from fastkd.ops.operators import launcher_of
from fastkd.ops.spec import Needs
from fastkd.ops.tensors import is_traced, is_transformed
from fastkd.reference import centered

# Bytes of a chunk's logits of one model: enough rows for a matmul that is not bound by reading the weights.
_CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}
_LEAST_ROWS = 32
# Bytes of a block of weights that the CPU raises to float32 at a time.
_BLOCK_BYTES = 8 << 20
# float16 holds 2^-24 to 2^16: gradients are stored with a bound of 2^10, before row weights and 1/N.
_LARGEST_HALF = 1024.0


class Source(NamedTuple):
    """Logits [N, C], or the input [N, H], weight [C or more, H] and bias of a linear layer."""

    tensors: Sequence[Tensor]  # (logits,), (hidden, weight) or (hidden, weight, bias)
    scale: float = 1.0
    softcap: float = 0.0  # 0: none

    @property
    def linear(self) -> bool:
        return len(self.tensors) > 1


class LinearCall(NamedTuple):
    """``Call`` and what chunks need."""

    call: Call
    classes: int
    chunk_rows: int  # 0: chosen here
    center_teacher: bool
    student: tuple[float, float] = (1.0, 0.0)  # scale and softcap
    teacher: tuple[float, float] = (1.0, 0.0)


def chunk_rows_of(chosen: int, rows: int, classes: int, element_bytes: int, device: str) -> int:
    """Rows per chunk: chunks of about equal size."""
    if not chosen:
        fitting = _CHUNK_BYTES.get(device, _CHUNK_BYTES["cuda"]) // (classes * element_bytes)
        chosen = max(fitting, _LEAST_ROWS)
    chunks = -(-rows // max(chosen, 1))
    return -(-rows // max(chunks, 1)) or 1


class _Gradients(NamedTuple):
    """Of the sum of all rows: float32, or None where it is not asked for."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    logits: Tensor | None  # of a student given as logits, in its dtype


def linear_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], options: LinearCall
) -> tuple[Tensor, Tensor | None]:
    """Weighted losses [N] and terms [K, N] in float32, or with ``call.reduced`` their sums.

    ``student`` and ``teacher`` are the tensors of a ``Source``.
    """
    if is_traced((*student, *teacher)):
        rows, terms, *_ = torch.ops.fastkd.linear_loss(student, teacher, *_flat(options), _wanted(student))
        return rows, terms
    if torch.is_grad_enabled() and any(part.requires_grad for part in student):
        rows, terms = _LinearLoss.apply(options, len(student), *student, *teacher)
        return rows, terms
    rows, terms, _ = _forward(student, teacher, options, [False] * len(student))
    return rows, terms


def _wanted(student: Sequence[Tensor]) -> list[bool]:
    return [torch.is_grad_enabled() and part.requires_grad for part in student]


class _Layer:
    """Chunks of a source's logits, in a buffer that all chunks share."""

    def __init__(self, source: Source, classes: int, chunk: int) -> None:
        self.source, self.classes = source, classes
        if source.linear:
            hidden, weight, *bias = source.tensors
            self.hidden, self.weight = hidden, weight[:classes]
            self.bias = bias[0][:classes] if bias else None
            self.buffer = hidden.new_empty(chunk, classes)

    def logits(self, part: slice) -> Tensor:
        """Of the rows ``part``; overwritten by the next call."""
        if not self.source.linear:
            return self.source.tensors[0][part]
        hidden, scale, cap = self.hidden[part], self.source.scale, self.source.softcap
        out = self.buffer[: len(hidden)]
        if self.bias is None:
            torch.mm(hidden, self.weight.t(), out=out)
        else:
            torch.addmm(self.bias, hidden, self.weight.t(), out=out)
        if scale != 1.0:
            out.mul_(scale)
        if cap:
            out.div_(cap).tanh_().mul_(cap)
        return out


def _forward(
    student: Sequence[Tensor], teacher: Sequence[Tensor], options: LinearCall, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor | None, _Gradients]:
    call, classes = options.call, options.classes
    first = student[0]
    count = first.shape[0]
    bytes_each = first.element_size()
    chunk = chunk_rows_of(options.chunk_rows, count, classes, bytes_each, first.device.type)
    student_layer = _Layer(Source(student, *options.student), classes, min(chunk, count))
    teacher_layer = _Layer(Source(teacher, *options.teacher), classes, min(chunk, count))
    rows = first.new_empty(count, dtype=torch.float32)
    term_count = len(call.spec.terms) if call.with_terms else 0
    terms = rows.new_empty(term_count, count) if term_count else None
    gradients = _new_gradients(student, wanted, count, classes)
    any_wanted = any(wanted)
    spare = first.new_empty(min(chunk, count), classes) if any_wanted and gradients.logits is None else None
    launch = launcher_of(call.backend).row_loss
    for start in range(0, count, chunk):
        part = slice(start, min(start + chunk, count))
        ours, theirs = student_layer.logits(part), teacher_layer.logits(part)
        if options.center_teacher:
            theirs = centered(theirs)
        to_gradient = None
        if any_wanted:
            to_gradient = gradients.logits[part] if spare is None else spare[: len(ours)]  # type: ignore[index]
        of_chunk, factors = _chunk_call(call, part, ours, half=any_wanted and spare is not None)
        chunk_terms = None if terms is None else terms.new_empty(term_count, len(ours))
        launch([ours], [theirs], of_chunk, Outputs(rows[part], chunk_terms, to_gradient))
        if factors is not None:
            rows[part] *= factors
        if terms is not None and chunk_terms is not None:
            terms[:, part] = chunk_terms if factors is None else chunk_terms * factors
        if spare is not None:
            assert to_gradient is not None
            _to_layer(student_layer, part, ours, to_gradient, factors, gradients)
    if call.reduced:
        return rows.sum(), None if terms is None else terms.sum(-1), gradients
    return rows, terms, gradients


def _new_gradients(student: Sequence[Tensor], wanted: Sequence[bool], count: int, classes: int) -> _Gradients:
    first = student[0]
    if len(student) == 1:
        return _Gradients(None, None, None, first.new_empty(count, classes) if wanted[0] else None)
    single: dict[str, Any] = {"dtype": torch.float32}
    hidden, weight, *bias = student
    return _Gradients(
        hidden.new_empty(hidden.shape, **single) if wanted[0] else None,
        weight.new_zeros(weight.shape, **single) if wanted[1] else None,
        bias[0].new_zeros(bias[0].shape, **single) if bias and wanted[2] else None,
        None,
    )


def _chunk_call(call: Call, part: slice, ours: Tensor, *, half: bool) -> tuple[Call, Tensor | None]:
    """The call for a chunk, and what its rows must be multiplied by afterwards, in float32.

    In float16 the gradient of a row is stored without its weight and 1/N, times a power of two, so that it
    uses the format's range.
    """
    target = None if call.target is None else call.target[part]
    weight = None if call.row_weight is None else call.row_weight[part]
    call = call._replace(target=target, row_weight=weight, reduced=False, with_gradient=True)
    if not half or ours.dtype != torch.float16:
        return call, None
    gain = 2.0 ** math.floor(math.log2(_LARGEST_HALF / _bound(call)))
    gains = ours.new_full((len(ours),), gain, dtype=torch.float32)
    if call.needs & Needs.STANDARDIZED:  # whose gradient has the factor 1 / std
        gains *= ours.std(1).float().clamp(2.0**-12, 1.0)
    factors = 1.0 / (gains * call.divisor)
    if weight is not None:
        factors = factors * weight
        gains = torch.where(weight == 0, 0.0, gains)
    return call._replace(row_weight=gains, divisor=1), factors


def _bound(call: Call) -> float:
    """A power of two near the largest gradient of a row's logits, without weights."""
    values = [abs(value) for value in call.options if not math.isnan(value)]
    bound = call.spec.bound(call.spec.options(*call.options)) if len(values) == len(call.options) else 64.0
    return max(bound, 2.0**-20)


def _to_layer(
    layer: _Layer, part: slice, logits: Tensor, gradient: Tensor, factors: Tensor | None, sums: _Gradients
) -> None:
    """From the gradient of a chunk's logits to those of the layer's input, weight and bias."""
    scale, cap = layer.source.scale, layer.source.softcap
    if cap:  # d tanh, from the logits, which are not needed any more
        gradient *= logits.div_(cap).square_().neg_().add_(1.0)
    hidden = layer.hidden[part]
    if sums.hidden is not None:
        into = sums.hidden[part]
        _multiply(gradient, layer.weight, into)
        if factors is not None:
            into *= factors[:, None]
        if scale != 1.0:
            into *= scale
    if sums.weight is not None:
        operand = hidden if factors is None else hidden.float() * factors[:, None]
        _accumulate(gradient, operand, scale, sums.weight[: layer.classes])
    if sums.bias is not None:
        wide = gradient if factors is None else gradient.float() * factors[:, None]
        sums.bias[: layer.classes] += wide.sum(0, dtype=torch.float32).mul_(scale)


def _multiply(gradient: Tensor, weight: Tensor, out: Tensor) -> None:
    """``out = gradient @ weight``, in float32."""
    if gradient.dtype == torch.float32:
        torch.mm(gradient, weight, out=out)
    elif gradient.is_cuda:
        out.copy_(torch.mm(gradient, weight, out_dtype=torch.float32))
    else:
        out.zero_()
        for block in _blocks(weight):
            out.addmm_(gradient[:, block].float(), weight[block].float())


def _accumulate(gradient: Tensor, hidden: Tensor, scale: float, out: Tensor) -> None:
    """``out += scale * gradient.T @ hidden``, in float32."""
    if gradient.dtype == torch.float32:
        out.addmm_(gradient.t(), hidden, alpha=scale)
    elif gradient.is_cuda and hidden.dtype == gradient.dtype:
        out.copy_(torch.addmm(out, gradient.t(), hidden, alpha=scale, out_dtype=torch.float32))
    else:
        wide = hidden.float()
        for block in _blocks(out):
            out[block].addmm_(gradient[:, block].float().t(), wide, alpha=scale)


def _blocks(weight: Tensor) -> list[slice]:
    """Blocks of a weight's rows, of a size that may be raised to float32."""
    classes, width = weight.shape
    size = max(_BLOCK_BYTES // (4 * max(width, 1)), 1)
    return [slice(start, min(start + size, classes)) for start in range(0, classes, size)]


# ---- autograd and the operator -------------------------------------------------------------------------


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, options: LinearCall, students: int, *tensors: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        student, teacher = tensors[:students], tensors[students:]
        wanted = list(ctx.needs_input_grad[2 : 2 + students])
        rows, terms, gradients = _forward(student, teacher, options, wanted)
        if terms is not None:
            ctx.mark_non_differentiable(terms)
        ctx.set_materialize_grads(False)
        ctx.dtypes = [part.dtype for part in student]
        ctx.rest = len(tensors) - students
        held = _of_tensors(gradients, students)
        ctx.save_for_backward(*held)
        return rows, terms

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Any, ...]:
        held = ctx.saved_tensors
        if grad_output is None:
            return None, None, *(None,) * (len(held) + ctx.rest)
        if is_transformed(grad_output):
            raise RuntimeError("LinearLogits has a gradient for one grad_output, not for a batch of them")
        if torch.is_grad_enabled():
            raise RuntimeError(
                "fastkd computes the gradient with the loss and does not differentiate it again "
                "(create_graph=True); use fastkd.set_backend('eager') for second derivatives"
            )
        return None, None, *_scaled(held, grad_output, ctx.dtypes), *(None,) * ctx.rest


def _of_tensors(gradients: _Gradients, count: int) -> list[Tensor | None]:
    """In the order of the student's tensors."""
    if count == 1:
        return [gradients.logits]
    return [gradients.hidden, gradients.weight, gradients.bias][:count]


def _scaled(
    gradients: Sequence[Tensor | None], grad_output: Tensor, dtypes: Sequence[torch.dtype]
) -> list[Tensor | None]:
    """Times grad_output, rounded to the tensors' dtypes once."""
    return [
        None if gradient is None or not gradient.numel() else (gradient * grad_output).to(dtype)
        for gradient, dtype in zip(gradients, dtypes, strict=True)
    ]


def _flat(options: LinearCall) -> tuple[Any, ...]:
    return (
        *options.call,
        options.classes,
        options.chunk_rows,
        options.center_teacher,
        list(options.student),
        list(options.teacher),
    )


_library = torch.library.Library("fastkd", "FRAGMENT")
_library.define(
    "linear_loss(Tensor[] student, Tensor[] teacher, Tensor? target, Tensor? row_weight, SymInt divisor, "
    "str loss, float[] options, Tensor? dynamic, str backend, bool reduced, bool with_terms, "
    "bool with_gradient, SymInt classes, SymInt chunk_rows, bool center_teacher, float[] student_numbers, "
    "float[] teacher_numbers, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_CALL = len(Call._fields)


def _unflat(arguments: Sequence[Any]) -> tuple[LinearCall, list[bool]]:
    classes, chunk_rows, center, student, teacher, wanted = arguments[_CALL:]
    call = Call(*arguments[:_CALL])
    return LinearCall(call, classes, chunk_rows, center, tuple(student), tuple(teacher)), wanted


def _absent(tensor: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.float32) if tensor is None else tensor


@torch.library.impl("fastkd::linear_loss", ("cpu", "cuda"), lib=_library)
def _operator(student: Sequence[Tensor], teacher: Sequence[Tensor], *arguments: Any) -> tuple[Tensor, ...]:
    options, wanted = _unflat(arguments)
    rows, terms, gradients = _forward(student, teacher, options, wanted)
    held = [*_of_tensors(gradients, len(student)), None, None][:3]
    return rows, *(_absent(tensor, rows) for tensor in (terms, *held))


@torch.library.register_fake("fastkd::linear_loss", lib=_library)
def _shapes(student: Sequence[Tensor], teacher: Sequence[Tensor], *arguments: Any) -> tuple[Tensor, ...]:
    options, wanted = _unflat(arguments)
    call, first = options.call, student[0]
    shape = () if call.reduced else (first.shape[0],)
    rows = first.new_empty(shape, dtype=torch.float32)
    terms = rows.new_empty((len(call.spec.terms), *shape)) if call.with_terms and call.spec.terms else None
    held = [*_of_tensors(_new_gradients(student, wanted, first.shape[0], options.classes), len(student))]
    return rows, *(_absent(tensor, rows) for tensor in (terms, *held, None, None)[:4])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, terms, *held = output
    ctx.mark_non_differentiable(terms, *held)
    ctx.set_materialize_grads(False)
    student, teacher, *_ = inputs
    ctx.dtypes, ctx.teachers = [part.dtype for part in student], len(teacher)
    ctx.save_for_backward(*held[: len(student)])


def _backward(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Any, ...]:
    rest = (None,) * (_CALL + 6)
    if grad_output is None:
        return [None] * len(ctx.dtypes), [None] * ctx.teachers, *rest
    return _scaled(ctx.saved_tensors, grad_output, ctx.dtypes), [None] * ctx.teachers, *rest


torch.library.register_autograd("fastkd::linear_loss", _backward, setup_context=_setup, lib=_library)
