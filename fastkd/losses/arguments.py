"""Checks of a loss's arguments, before any kernel runs and without waiting for the device."""

from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from fastkd.ops import native
from fastkd.ops.tensors import check_ordinary

from .forms import LinearLogits, ShardedLogits, TopKLogits, autocast_dtype

LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ONE = (Tensor, LinearLogits, TopKLogits, ShardedLogits)  # the logits of one model
REDUCTIONS = ("batchmean", "sum", "none")
LARGEST = torch.finfo(torch.float32).max
# What float32 can hold: the largest unmasked logits divided by T, and T^2 times a loss.
TEMPERATURES = (1e-6, 1e6)
# A sum of probabilities may differ from 1 by this much: they may have been rounded to half precision.
SUM_TOLERANCE = 0.02


def check_linear(name: str, form: LinearLogits, least: int = 2) -> None:
    """Raise TypeError or ValueError that names the field, its value and what is expected.

    ``least``: of classes.
    """
    for field, tensor in form.tensors.items():
        _check_part(f"{name}.{field}", tensor, f"{name}.hidden", form.hidden)
    hidden, weight = form.hidden, form.weight
    if hidden.dim() < 1 or hidden.shape[-1] < 1:
        raise ValueError(f"{name}.hidden has shape {list(hidden.shape)}; expected [..., H]")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{name}.weight has shape {list(weight.shape)}; expected [C, {hidden.shape[-1]}] for hidden "
            f"{list(hidden.shape)}"
        )
    outputs = weight.shape[0]
    if outputs < least:
        raise ValueError(f"{name}.weight has shape {list(weight.shape)}; expected at least {least} classes")
    if form.bias is not None and form.bias.shape != (outputs,):
        raise ValueError(
            f"{name}.bias has shape {list(form.bias.shape)}; expected [{outputs}], one number for each row "
            f"of weight {list(weight.shape)}"
        )
    if len(set(map(autocast_dtype, form.tensors.values()))) > 1:
        found = ", ".join(f"{field} {tensor.dtype}" for field, tensor in form.tensors.items())
        raise TypeError(f"{name} has {found}; expected one dtype, or torch.autocast")
    if form.num_classes is not None:
        check_size(f"{name}.num_classes", form.num_classes, least, outputs, "the rows of weight")
    if form.chunk_rows is not None:
        check_size(f"{name}.chunk_rows", form.chunk_rows, 1)
    check_number(f"{name}.scale", form.scale)
    if form.softcap is not None:
        check_number(f"{name}.softcap", form.softcap)
        if not form.softcap > 0:
            raise ValueError(f"{name}.softcap is {form.softcap!r}; expected a number above 0, or None")


def _check_part(name: str, tensor: Any, hidden_name: str, hidden: Any, integers: bool = False) -> None:
    """Check a tensor of a form, on the device of ``hidden``."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; expected a tensor")
    if type(tensor).__name__ == "DTensor":
        raise TypeError(
            f"{name} is a DTensor; expected an ordinary tensor: build LinearLogits inside the forward of the "
            "wrapped module that owns the head, where FSDP has gathered it"
        )
    check_ordinary(name, tensor)
    if integers and (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool):
        raise TypeError(f"{name} has dtype {tensor.dtype}; expected int64 or another integer type")
    if not integers and tensor.dtype not in LOGIT_DTYPES:
        raise TypeError(f"{name} has dtype {tensor.dtype}; expected float32, bfloat16, float16 or float64")
    if tensor.device != hidden.device:
        raise ValueError(
            f"{name} is on {tensor.device} and {hidden_name} on {hidden.device}; expected one device"
        )


def check_size(name: str, value: int, least: int, most: int | None = None, what: str = "") -> None:
    """Check a whole number; ``what`` says what ``most`` is."""
    if not isinstance(value, int | Integral) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; expected a whole number")
    if value < least or (most is not None and value > most):
        upto = "or more" if most is None else f"to {most}, {what}"
        raise ValueError(f"{name} is {value}; expected {least} {upto}")


def check_top_k_form(name: str, form: TopKLogits) -> None:
    """Raise TypeError or ValueError that names the field; ``known.known_of`` checks the values."""
    log_probs, indices = form.log_probs, form.indices
    for field, tensor in form.tensors.items():
        _check_part(f"{name}.{field}", tensor, f"{name}.log_probs", log_probs, field == "indices")
    check_size(f"{name}.num_classes", form.num_classes, 2)
    check_temperature(form.temperature, f"{name}.temperature")
    if form.rest not in ("one_class", "renormalize"):
        raise ValueError(f"{name}.rest is {form.rest!r}; expected 'one_class' or 'renormalize'")
    if log_probs.dim() < 1 or not 1 <= log_probs.shape[-1] <= form.num_classes:
        raise ValueError(
            f"{name}.log_probs has shape {list(log_probs.shape)}; expected [..., K] with K from 1 to "
            f"{form.num_classes}, the number of classes"
        )
    if indices.shape != log_probs.shape:
        raise ValueError(
            f"{name}.indices has shape {list(indices.shape)}; expected {list(log_probs.shape)}, the shape of "
            "log_probs"
        )
    if form.log_rest is not None and form.log_rest.shape != log_probs.shape[:-1]:
        raise ValueError(
            f"{name}.log_rest has shape {list(form.log_rest.shape)}; expected {list(log_probs.shape[:-1])}, "
            f"one number for each row of log_probs {list(log_probs.shape)}"
        )


def check_sharded(name: str, form: ShardedLogits) -> None:
    """Raise TypeError or ValueError for what one rank can tell; ``sharded.agree`` compares the ranks."""
    check_size(f"{name}.num_classes", form.num_classes, 2)
    check_size(f"{name}.first_class", form.first_class, 0)
    if isinstance(form.local, LinearLogits):
        return check_linear(f"{name}.local", form.local, least=0)
    if not isinstance(form.local, Tensor):
        raise TypeError(
            f"{name}.local is a {type(form.local).__name__}; expected a tensor of shape [..., C_local], or "
            "LinearLogits"
        )
    return check_stored(f"{name}.local", form.local, least=0)


def check_one(name: str, logits: Any) -> None:
    """Check the logits of one model."""
    if isinstance(logits, LinearLogits):
        return check_linear(name, logits)
    if isinstance(logits, ShardedLogits):
        return check_sharded(name, logits)
    if isinstance(logits, TopKLogits):
        return check_top_k_form(name, logits)
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name} is a {type(logits).__name__}; expected a tensor of shape [..., C]")
    return check_stored(name, logits)


def check_stored(name: str, logits: Tensor, least: int = 2) -> None:
    """Check logits in memory, of at least so many classes."""
    check_ordinary(name, logits)
    if logits.dtype not in LOGIT_DTYPES:
        raise TypeError(f"{name} has dtype {logits.dtype}; expected float32, bfloat16, float16 or float64")
    if logits.dim() < 1 or logits.shape[-1] < least:
        expected = f"[..., C] with at least {least} classes" if least else "[..., C_local]"
        raise ValueError(f"{name} has shape {list(logits.shape)}; expected {expected}")


def check_logits(student_logits: Any, teacher_logits: Any, which: str = "") -> None:
    """Check one pair; ``which`` is its index in messages, if there are several."""
    student_name, teacher_name = f"student_logits{which}", f"teacher_logits{which}"
    if isinstance(student_logits, TopKLogits):
        raise TypeError(
            f"{student_name} is a TopKLogits; expected all logits: only a teacher may be known at K classes"
        )
    check_one(student_name, student_logits)
    check_one(teacher_name, teacher_logits)
    if isinstance(student_logits, ShardedLogits) or isinstance(teacher_logits, ShardedLogits):
        check_spread_alike(student_name, student_logits, teacher_name, teacher_logits)
    if student_logits.shape[-1] != teacher_logits.shape[-1]:
        raise ValueError(
            f"{student_name} has {student_logits.shape[-1]} classes and {teacher_name} "
            f"{teacher_logits.shape[-1]}; both models must score the same classes"
        )
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"{student_name} has shape {list(student_logits.shape)} and {teacher_name} "
            f"{list(teacher_logits.shape)}; expected equal shapes"
        )
    if student_logits.device != teacher_logits.device:
        raise ValueError(
            f"{student_name} is on {student_logits.device} and {teacher_name} on {teacher_logits.device}; "
            "expected one device"
        )
    if teacher_logits.requires_grad:
        raise ValueError(
            f"{teacher_name} requires grad, but the teacher is a constant of every fastkd loss; compute it "
            "under torch.no_grad() or pass teacher_logits.detach()"
        )


def check_spread_alike(student_name: str, student: Any, teacher_name: str, teacher: Any) -> None:
    """Check that both models of a pair have the same classes on this rank."""
    for name, form, other_name, other in (
        (student_name, student, teacher_name, teacher),
        (teacher_name, teacher, student_name, student),
    ):
        if not isinstance(form, ShardedLogits):
            raise TypeError(
                f"{name} is a {type(form).__name__} and {other_name} a ShardedLogits; expected ShardedLogits "
                f"for both, of the same classes: here {_range(other)}"
            )
    if _range(student) != _range(teacher):
        raise ValueError(
            f"{student_name} has {_range(student)} on this rank and {teacher_name} {_range(teacher)}; "
            "expected the same classes of both models"
        )


def _range(form: ShardedLogits) -> str:
    return f"classes {form.first_class} to {form.first_class + form.local.shape[-1]} of {form.num_classes}"


def check_pairs(student_logits: Any, teacher_logits: Any) -> tuple[Sequence[Any], Sequence[Any]]:
    """Check two tensors or forms of logits, or two lists that are alike; return lists."""
    if isinstance(student_logits, ONE) and isinstance(teacher_logits, ONE):
        check_logits(student_logits, teacher_logits)
        return [student_logits], [teacher_logits]
    if isinstance(student_logits, ONE) or isinstance(teacher_logits, ONE):
        name = "teacher_logits" if isinstance(student_logits, ONE) else "student_logits"
        other = teacher_logits if isinstance(student_logits, ONE) else student_logits
        raise TypeError(
            f"{name} is a {type(other).__name__} beside one tensor; expected two tensors [..., C], or "
            "two lists of them"
        )
    for name, several in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        if not isinstance(several, list | tuple) or not several:
            raise TypeError(f"{name} is {several!r}; expected a tensor of shape [..., C], or a list of them")
    if len(student_logits) != len(teacher_logits):
        raise ValueError(
            f"student_logits has {len(student_logits)} tensors and teacher_logits {len(teacher_logits)}; "
            "expected one teacher for each student"
        )
    for index, (student, teacher) in enumerate(zip(student_logits, teacher_logits, strict=True)):
        check_logits(student, teacher, f"[{index}]")
        for name, logits in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
            first, one = logits[0], logits[index]
            if (one.shape, one.dtype, one.device) != (first.shape, first.dtype, first.device):
                raise ValueError(
                    f"{name}[{index}] is {one.dtype} {list(one.shape)} on {one.device} and {name}[0] "
                    f"{first.dtype} {list(first.shape)} on {first.device}; pairs of one call must be alike; "
                    "pass others in separate calls"
                )
    return student_logits, teacher_logits


def check_one_per_row(name: str, values: Tensor, what: str, logits: Any, of: str) -> None:
    if values.shape != logits.shape[:-1]:
        raise ValueError(
            f"{name} has shape {list(values.shape)}; expected {list(logits.shape[:-1])}, one {what} "
            f"for each row of {of} {list(logits.shape)}"
        )
    if values.device != logits.device:
        raise ValueError(f"{name} is on {values.device} and {of} on {logits.device}; expected one device")


def check_target(target: Tensor, logits: Any, of: str = "student_logits") -> None:
    """Check type, dtype, shape and device, not the labels themselves: ``check_labels`` does."""
    if not isinstance(target, Tensor):
        raise TypeError(f"target is a {type(target).__name__}; expected an int64 tensor of labels")
    check_ordinary("target", target)
    if target.dtype != torch.int64:
        raise TypeError(
            f"target has dtype {target.dtype}; expected int64 class indices"
            + (": only distill_loss takes probabilities, for CE and KD" if target.is_floating_point() else "")
        )
    check_one_per_row("target", target, "label", logits, of)


def check_labels(
    target: Tensor, classes: int, ignore_index: int = -100, *, weight: Tensor | None = None
) -> bool:
    """Raise if a label is neither in 0..classes-1 nor ``ignore_index``; return whether none is ignored.

    Rows whose ``weight`` is 0 may have any label.

    The losses call it themselves on the CPU. On a GPU the check would wait for the device, so the losses give
    a row with such a label a NaN loss instead; call this function if you want the error.
    """
    if not isinstance(target, Tensor):
        raise TypeError(f"target is a {type(target).__name__}; expected an int64 tensor of labels")
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(f"target has dtype {target.dtype}; expected int64 class indices")
    # Torch's operators below take longer to launch than a small loss takes.
    if target.numel() == 0 or (target.is_cpu and native.labels_all_valid(target, classes, ignore_index)):
        return True
    lowest, highest = (int(bound) for bound in target.aminmax())
    if lowest >= 0 and highest < classes and not lowest <= ignore_index <= highest:
        return True
    wrong = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if weight is not None:
        wrong &= weight.reshape(wrong.shape) != 0
    if wrong.any():
        value = int(target[wrong][0])
        raise ValueError(
            f"target has the label {value}; expected 0 to {classes - 1}, or ignore_index ({ignore_index}) "
            "for a row to ignore"
        )
    return not bool((target == ignore_index).any())


def check_row_weight(weight: Tensor, student_logits: Tensor) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(
            f"weight is a {type(weight).__name__}; expected a tensor with one number for each row"
        )
    check_ordinary("weight", weight)
    if not weight.is_floating_point():
        raise TypeError(f"weight has dtype {weight.dtype}; expected a floating-point tensor")
    check_one_per_row("weight", weight, "number", student_logits, "student_logits")
    if weight.requires_grad:
        raise ValueError(
            "weight requires grad, but it is a constant of every fastkd loss; pass weight.detach()"
        )


def check_number(name: str, value: float) -> None:
    """Check that it is finite in float32, in which losses are computed. torch.compile may be tracing it."""
    if isinstance(value, Tensor):
        raise TypeError(f"{name} is a tensor, which would have to be read back; expected a number")
    if isinstance(value, bool) or not isinstance(value, float | int | Real):
        raise TypeError(f"{name} is {value!r}; expected a number")
    # Comparisons can be traced, math.isfinite cannot; a NaN fails them.
    if not -LARGEST <= plain(value) <= LARGEST:
        raise ValueError(f"{name} is {value!r}; expected a finite number, at most {LARGEST:.1e} in size")


def plain(value: float) -> float:
    """A number of another type, such as NumPy's, as a float: an int8 or a float16 would round its square."""
    return value if isinstance(value, float | int) else float(value)


def check_temperature(temperature: float, name: str = "temperature") -> None:
    check_number(name, temperature)
    low, high = TEMPERATURES
    if not low <= plain(temperature) <= high:
        raise ValueError(
            f"{name} is {temperature!r}; expected a number above 0, from {low:g} to {high:g}: beyond that, "
            "float32 does not hold the logits divided by it, or its square"
        )


def check_flag(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; expected True or False")


def check_ignore_index(ignore_index: int) -> None:
    if not isinstance(ignore_index, int | Integral) or isinstance(ignore_index, bool):
        raise TypeError(f"ignore_index is {ignore_index!r}; expected an integer")


def check_fraction(name: str, value: float) -> None:
    check_number(name, value)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} is {value!r}; expected a number from 0 to 1")


_OF_OPTION: dict[str, Callable[[str, Any], None]] = {
    "temperature": lambda name, value: check_temperature(value),
    **dict.fromkeys(("label_smoothing", "skew"), check_fraction),
    "ignore_index": lambda name, value: check_ignore_index(value),
    "reduction": lambda name, value: check_reduction(value),
    **dict.fromkeys(("standardize", "fix_acquired", "weighted", "reverse", "center_teacher"), check_flag),
}


def check_options(**options: Any) -> None:
    """Check a loss's options by name; one without its own check is a weight: any finite number."""
    for name, value in options.items():
        _OF_OPTION.get(name, check_number)(name, value)


def check_reduction(reduction: str) -> None:
    if reduction == "mean":
        raise ValueError(
            "reduction='mean' is refused: for torch.nn.KLDivLoss it divides by rows times classes, which "
            "makes the loss weaker by the number of classes; use 'batchmean' (divide by the "
            "non-ignored rows), 'sum' or 'none'"
        )
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; expected one of {', '.join(REDUCTIONS)}")
