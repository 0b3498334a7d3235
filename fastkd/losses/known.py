"""A teacher known at K classes: making ``TopKLogits``, checking them, and bringing them to K + 1 classes."""

from __future__ import annotations

from itertools import pairwise
from typing import NoReturn

import torch
from torch import Tensor

from fastkd.ops import native
from fastkd.ops.spec import LOSSES, Needs
from fastkd.ops.tensors import is_readable
from fastkd.reference import at_least_float32

from . import arguments
from .forms import LinearLogits, ShardedLogits, TopKLogits

# Elements that ``top_k`` raises to float32 at a time.
_BLOCK = 1 << 25
# The smallest difference from 1 that a sum of probabilities in float32 can have.
_LEAST_REST = 2.0**-24


def top_k(
    teacher_logits: Tensor | LinearLogits, k: int, target: Tensor | None = None, *, temperature: float = 1.0
) -> TopKLogits:
    """The ``k`` most probable classes of softmax(z / T), and the probability of the others together.

    Args:
        teacher_logits: [..., C], or ``LinearLogits``, whose logits are computed in chunks of rows.
        k: from 1 to C.
        target: labels [...]. A label that is not among the k takes the place of the least probable of them,
            so that losses with labels are defined. Labels out of range (``ignore_index``) are not included.
        temperature: the loss's; for ``ttm_loss`` 1 / gamma.

    The result has float32 (of float64 logits float64) ``log_probs`` and ``log_rest``, the latter summed over
    the other classes, so that nothing cancels; ``indices`` are in ascending order. No gradient.
    """
    if isinstance(teacher_logits, TopKLogits | ShardedLogits):
        raise TypeError(f"teacher_logits is a {type(teacher_logits).__name__}; expected all logits")
    arguments.check_one("teacher_logits", teacher_logits)
    arguments.check_temperature(temperature)
    classes = teacher_logits.shape[-1]
    arguments.check_size("k", k, 1, classes, "the number of classes")
    if target is not None:
        arguments.check_target(target, teacher_logits, "teacher_logits")
    with torch.no_grad():
        leading = teacher_logits.shape[:-1]
        first = teacher_logits.hidden if isinstance(teacher_logits, LinearLogits) else teacher_logits
        rows = first.reshape(-1, first.shape[-1])
        labels = None if target is None else target.reshape(-1)
        # Compiled code with as many parts as there are rows would be compiled for each number of rows.
        whole = torch.compiler.is_compiling() and not isinstance(teacher_logits, LinearLogits)
        step = max(_BLOCK // classes, 1)
        spans = [slice(None)] if whole else [slice(i, i + step) for i in range(0, max(len(rows), 1), step)]
        parts = []
        for part in spans:
            logits = rows[part]
            if isinstance(teacher_logits, LinearLogits):
                logits = teacher_logits.of([logits, *list(teacher_logits.tensors.values())[1:]]).dense()
            parts.append(_top_k_of_rows(logits, k, None if labels is None else labels[part], temperature))
        log_probs, indices, log_rest = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return TopKLogits(
        log_probs.view(*leading, k),
        indices.view(*leading, k),
        log_rest.view(leading),
        num_classes=classes,
        temperature=temperature,
    )


def _top_k_of_rows(
    logits: Tensor, k: int, target: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    v = at_least_float32(logits) / temperature
    indices = v.topk(k, -1).indices  # in descending order
    if target is not None:
        label = target[:, None]
        absent = (label >= 0) & (label < v.shape[1]) & (indices != label).all(-1, keepdim=True)
        indices[:, -1:] = torch.where(absent, label, indices[:, -1:])
    indices = indices.sort(-1).values
    log_sum = v.logsumexp(-1, keepdim=True)
    log_probs = v.gather(1, indices) - log_sum
    log_rest = v.scatter_(1, indices, -torch.inf).logsumexp(-1) - log_sum[:, 0]
    return log_probs, indices, log_rest


def check_top_k(form: TopKLogits, target: Tensor | None = None) -> None:
    """Raise ``ValueError`` for values that no teacher has.

    These are an index that is out of range or there twice, a log-probability above 0, probabilities that sum
    to more than 1, and a label of ``target`` that is not among the indices of its row (labels out of range
    are ignored).

    The losses call it themselves on the CPU, for rows that are read. On a GPU the check would wait for the
    device, so a loss gives such a row a NaN instead.
    """
    arguments.check_top_k_form("form", form)
    if target is not None:
        arguments.check_target(target, form, "form")
        target = target.reshape(-1)
    log_probs, indices = _by_row(form)
    indices, order = indices.sort(-1)
    log_probs = log_probs.gather(1, order)
    wrong = _wrong(form, log_probs, indices)
    if target is not None:
        in_range = (target >= 0) & (target < form.num_classes)
        wrong = wrong | (in_range & _lacks(indices, target))
    if bool(wrong.any()):
        _raise_for(form, log_probs, indices, target, wrong)


def known_of(
    form: TopKLogits, label: Tensor | None, row_weight: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """A teacher for a student of this dtype: logits [N, K + 1], and the classes [N, K] in ascending order.

    ``label`` [N] must be among the classes. Rows of weight 0 may hold anything; others are checked: on a CPU
    an error, elsewhere a NaN.
    """
    log_probs, indices = _by_row(form)
    log_probs = log_probs.double() if dtype == torch.float64 else log_probs.float()
    tensors = (indices, log_probs, form.log_rest, row_weight)
    readable = all([one is None or is_readable(one) for one in tensors])  # noqa: C419  # traced
    # The operators of the checks below take longer to launch than a small loss takes.
    ready = readable and native.top_k_ready(
        indices, log_probs, label, form.num_classes, 1 + arguments.SUM_TOLERANCE
    )
    if ready and form.log_rest is not None:
        ready = not bool(_wrong_rest(form, log_probs.exp().sum(-1)).any())
    if not ready:
        indices, order = indices.sort(-1)
        log_probs = log_probs.gather(1, order)
        wrong = _wrong(form, log_probs, indices)
        if label is not None:
            wrong = wrong | _lacks(indices, label)
        if row_weight is not None:
            wrong = wrong & (row_weight != 0)
        if not readable:
            log_probs = log_probs.masked_fill(wrong[:, None], torch.nan)
        elif bool(wrong.any()):
            _raise_for(form, log_probs, indices, label, wrong)
        indices = indices.clamp(0, form.num_classes - 1)  # of rows that are not read
    if indices.shape[1] == form.num_classes or form.rest == "renormalize":
        log_rest = torch.full_like(log_probs[:, :1], -torch.inf)
        if form.rest == "renormalize":
            log_probs = log_probs - log_probs.logsumexp(-1, keepdim=True)
    elif form.log_rest is None:
        log_rest = torch.log1p(-log_probs.exp().sum(-1, keepdim=True).clamp(max=1 - _LEAST_REST))
    else:
        log_rest = form.log_rest.reshape(-1, 1).to(log_probs.dtype)
    return form.temperature * torch.cat([log_probs, log_rest], 1), indices


def _by_row(form: TopKLogits) -> tuple[Tensor, Tensor]:
    known = form.indices.shape[-1]
    return form.log_probs.reshape(-1, known), form.indices.reshape(-1, known).long().contiguous()


def _lacks(indices: Tensor, label: Tensor) -> Tensor:
    """Which rows [N] do not know their label."""
    return (indices != label[:, None]).all(-1)


def _wrong(form: TopKLogits, log_probs: Tensor, indices: Tensor) -> Tensor:
    """Which rows [N] hold what no teacher has; ``indices`` are sorted. NaN passes, and reaches the loss."""
    wrong = (indices[:, 0] < 0) | (indices[:, -1] >= form.num_classes)
    wrong = wrong | (indices[:, 1:] == indices[:, :-1]).any(-1)
    total = log_probs.exp().sum(-1)
    wrong = wrong | (log_probs > 0).any(-1) | (total > 1 + arguments.SUM_TOLERANCE)
    if form.log_rest is not None:
        wrong = wrong | _wrong_rest(form, total)
    return wrong


def _wrong_rest(form: TopKLogits, total: Tensor) -> Tensor:
    """Which rows [N] have a log_rest that is not the rest of ``total``, the sum of their probabilities."""
    assert form.log_rest is not None
    log_rest = form.log_rest.reshape(-1)
    if form.rest == "renormalize" or form.indices.shape[-1] == form.num_classes:  # it is not read
        return log_rest > 0
    apart = total + log_rest.exp() - 1
    return (log_rest > 0) | (apart.abs() > arguments.SUM_TOLERANCE)


def _raise_for(
    form: TopKLogits, log_probs: Tensor, indices: Tensor, label: Tensor | None, wrong: Tensor
) -> NoReturn:
    """Raise ``ValueError`` for the first of the rows ``wrong``."""
    row = int(wrong.nonzero()[0, 0])
    where = f"row {row} of the teacher's TopKLogits"
    found, values = indices[row].tolist(), log_probs[row]
    outside = [index for index in found if not 0 <= index < form.num_classes]
    twice = [index for index, after in pairwise(found) if index == after]
    if outside:
        raise ValueError(f"{where} has the index {outside[0]}; expected 0 to {form.num_classes - 1}")
    if twice:
        raise ValueError(f"{where} has the index {twice[0]} twice; expected each class once")
    if bool((values > 0).any()):
        raise ValueError(f"{where} has the log-probability {float(values.max()):g}; expected at most 0")
    total = float(values.exp().sum())
    if total > 1 + arguments.SUM_TOLERANCE:
        raise ValueError(f"{where} has probabilities that sum to {total:.4g}; expected at most 1")
    if form.log_rest is not None and bool(form.log_rest.reshape(-1)[row] > 0):
        value = float(form.log_rest.reshape(-1)[row])
        raise ValueError(f"{where} has the log_rest {value:g}; expected at most 0")
    if form.log_rest is not None and bool(_wrong_rest(form, log_probs.exp().sum(-1))[row]):
        rest = float(form.log_rest.reshape(-1)[row].exp())
        raise ValueError(
            f"{where} has probabilities that sum to {total:.4g} and exp(log_rest) {rest:.4g}; expected 1 "
            "together: are both at one temperature?"
        )
    assert label is not None
    raise ValueError(
        f"{where} lacks its label {int(label[row])}, whose probability this loss reads; "
        "fastkd.top_k(teacher_logits, k, target) includes the labels"
    )


def check_defined(loss: str, options: tuple[float, ...], name: str, form: TopKLogits) -> None:
    """Raise ``ValueError`` for a loss that is not defined for this teacher, or is at another temperature."""
    spec = LOSSES[loss]
    named = spec.options(*options)
    if not spec.needs(named) & Needs.DISTILLS:
        return  # the teacher is not read
    reason = spec.undefined_at_k(named)
    if reason is not None:
        raise ValueError(f"{name} is a TopKLogits, for which {loss} is not defined {reason}; pass all logits")
    if form.rest == "renormalize" and spec.needs_rest:
        raise ValueError(
            f"{name} has rest='renormalize', for which {loss} is infinite: the teacher has no probability "
            "where the student has some; use rest='one_class'"
        )
    temperature = spec.temperatures(named)[1]
    if abs(form.temperature - temperature) > 1e-6 * temperature:
        raise ValueError(
            f"{name} has log-probabilities at temperature {form.temperature:g}, and the loss reads them at "
            f"{temperature:g}, where the probability of the rest does not follow from them; make them with "
            f"fastkd.top_k(teacher_logits, k, temperature={temperature:g})"
        )
