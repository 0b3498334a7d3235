"""What the ranks of ``ShardedLogits`` must agree on, exchanged before the first loss of a kind.

Ranks that differ would wait for each other, or compute something else. The exchange is once per process
group and kind of call (rows, classes, dtypes, ...); it waits for the device. Later calls do not exchange it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from fastkd.ops.backend import BackendUnavailable, get_backend
from fastkd.ops.shards import Shard
from fastkd.ops.spec import LOSSES
from fastkd.ops.tensors import is_traced, transform_of

from .forms import LinearLogits, ShardedLogits
from .rows import Rows

# The ranks' numbers of classes, by process group and kind of call. Values must not refer to the group, which
# would then never be freed. Beyond so many kinds they are exchanged again.
# Also this rank's classes, by their number in all.
_AGREED: WeakKeyDictionary[Any, dict[Any, tuple[int, ...]]] = WeakKeyDictionary()
_MOST = 4096
# Between ``_projection`` of two ranks: of other rows they differ by about 1.
_SAME_ROWS = 0.02


def group_of(name: str, form: ShardedLogits) -> Any:
    """The process group, of which this rank is a member."""
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            f"{name}.group is {form.group!r}, but torch.distributed has no process group; call "
            "torch.distributed.init_process_group() first"
        )
    if form.group is None:
        return dist.group.WORLD
    if not isinstance(form.group, dist.ProcessGroup):
        raise TypeError(
            f"{name}.group is {form.group!r}; expected a ProcessGroup that this rank is a member of, such as "
            "device_mesh.get_group(), or None for the default group"
        )
    return form.group


def tell_error(error: Exception, *logits: Any) -> None:
    """Let all ranks of a group fail with the one whose arguments are refused, if it is their first loss.

    Later the others are already in the loss; as with any collective, they wait until this rank has ended.
    """
    parts = [part for one in logits for part in (one if isinstance(one, list | tuple) else [one])]
    form = next((part for part in parts if isinstance(part, ShardedLogits)), None)
    if form is None:
        return
    try:
        group = group_of("logits", form)
    except (TypeError, ValueError):
        return
    if group not in _AGREED:
        _exchange(group, {"error": f"{type(error).__name__}: {error}"})


def check_runs(tensors: Sequence[Tensor], rows: Rows) -> None:
    """Raise ``BackendUnavailable`` where collectives in plain torch cannot run."""
    name = get_backend()
    if name not in ("auto", "eager"):
        raise BackendUnavailable(
            f"backend {name!r} has no kernel for ShardedLogits, which are computed in plain torch; use "
            "set_backend('auto') or 'eager'"
        )
    transform = transform_of((*tensors, rows.weight, rows.label))
    if transform is None and is_traced(tensors):
        transform = "a dispatch mode or with fake tensors"
    if transform is not None:
        raise BackendUnavailable(
            f"a loss of ShardedLogits does not run inside {transform}: its collectives need real tensors; "
            "call it outside"
        )


def agree(
    loss: str,
    options: tuple[float, ...],
    student: ShardedLogits,
    teacher: ShardedLogits,
    rows: Rows,
    chunk_rows: int,
    center_teacher: bool,
    with_terms: bool,
) -> Shard:
    """The shard of this rank. Raises ``ValueError`` on every rank if they do not fit together."""
    group = group_of("student_logits", student)
    if group_of("teacher_logits", teacher) is not group:
        raise ValueError("student_logits and teacher_logits have different groups; expected one")
    kind = {
        "num_classes": student.num_classes,
        "rows": rows.leading.numel(),
        "loss": loss,
        "options other than 0": _nonzero(loss, options),
        "dtypes of student and teacher": (str(student.dtype), str(teacher.dtype)),
        "forms of student and teacher": (type(student.local).__name__, type(teacher.local).__name__),
        "tensors that require grad": _differentiated(student),
        "target": "none" if rows.label is None else "labels",
        "weight": "none" if rows.weight is None else "one per row",
        "reduction": "sum" if rows.reduced else "none",
        "chunk_rows": chunk_rows,
        "center_teacher": center_teacher,
        "terms": with_terms,
    }
    size = student.local.shape[-1]
    own = (student.first_class if size else 0, size)
    key = tuple(kind.values())
    known = _AGREED.get(group, {})
    _check_split(own, known.get(student.num_classes, own), student.num_classes)
    if key in known:
        return Shard(group, student.first_class, known[key])
    # Numbers that change from step to step are compared too, but do not make another kind of call.
    kind |= {"options": tuple(map(float, options)), **_exact(rows)}
    entries = _exchange(group, {"kind": kind, "range": own, "rows": _projections(student, teacher, rows)})
    for rank, entry in enumerate(entries):
        if "error" in entry:
            raise ValueError(f"rank {rank} of the group has refused its arguments: {entry['error']}")
    _check_kinds([entry["kind"] for entry in entries])
    _check_ranges([entry["range"] for entry in entries], student.num_classes)
    _check_rows([entry["rows"] for entry in entries])
    if len(known) >= _MOST:
        known.clear()
    known[student.num_classes] = own
    known[key] = tuple(entry["range"][1] for entry in entries)
    _AGREED[group] = known
    return Shard(group, student.first_class, known[key])


def _exchange(group: Any, entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of all ranks."""
    entries: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(entries, entry, group=group)
    return entries


# ---- what is compared ----------------------------------------------------------------------------------


def _nonzero(loss: str, options: tuple[float, ...]) -> tuple[str, ...]:
    """Names of the options that are not 0, which select what is computed."""
    return tuple(name for name, value in zip(LOSSES[loss].options._fields, options, strict=True) if value)


def _differentiated(student: ShardedLogits) -> tuple[str, ...]:
    if not torch.is_grad_enabled():
        return ()
    local = student.local
    tensors = local.tensors if isinstance(local, LinearLogits) else {"local": local}
    return tuple(name for name, tensor in tensors.items() if tensor.requires_grad)


def _exact(rows: Rows) -> dict[str, int]:
    """Sums that distinguish the rows' labels, and which of them are read."""
    found = {}
    if rows.label is not None:
        found["labels (a sum of them)"] = _digest(rows.label)
    if rows.weight is not None:
        found["rows of weight 0 (a sum of them)"] = _digest(rows.weight == 0)
    return found


def _digest(values: Tensor) -> int:
    places = torch.arange(values.numel(), device=values.device)
    # Squares, which wrap around in int64: a linear sum would miss labels that have moved.
    return int(((values * 1_000_003 + places + 1) ** 2 % 2_147_483_647).sum())


def _projections(student: ShardedLogits, teacher: ShardedLogits, rows: Rows) -> dict[str, float]:
    """A number of each tensor that all ranks have: equal for the same rows, up to rounding."""
    found = {} if rows.weight is None else {"weight": _projection(rows.weight[:, None])}
    for name, form in (("student_logits", student), ("teacher_logits", teacher)):
        if isinstance(form.local, LinearLogits):
            hidden = form.local.hidden.detach()
            found[f"{name}.local.hidden"] = _projection(hidden.reshape(-1, hidden.shape[-1]))
    return found


def _projection(values: Tensor) -> float:
    rows, width = values.shape
    across, down = (
        torch.arange(size, dtype=torch.float32, device=values.device).add_(1).square_().cos_()
        for size in (width, rows)
    )
    projected = down.dot((values @ across.to(values.dtype)).float())
    # Of independent values this is about normal, with deviation 1.
    norm = values.norm().float() * across.norm() * down.norm()
    return float(projected * (rows * width) ** 0.5 / norm.clamp_min(1e-30))


def _check_kinds(kinds: Sequence[Mapping[str, Any]]) -> None:
    for name, first in kinds[0].items():
        for rank, kind in enumerate(kinds):
            if kind.get(name) != first:
                raise ValueError(
                    f"the ranks of a loss of ShardedLogits differ in {name}: rank 0 has {first}, rank {rank} "
                    f"has {kind.get(name)}; expected the same rows, target, weight and options on every rank"
                )


def _check_split(own: tuple[int, ...], agreed: tuple[int, ...], classes: int) -> None:
    if own != agreed:
        now, before = (f"{first} to {first + size - 1}" if size else "none" for first, size in (own, agreed))
        raise ValueError(
            f"student_logits has the classes {now} of {classes} on this rank, and in an earlier loss of its "
            f"group {before}: ranks that keep theirs do not compare them again; use a process group of its "
            "own (torch.distributed.new_group) for each split"
        )


def _check_ranges(ranges: Sequence[tuple[int, int]], classes: int) -> None:
    """Check that they tile 0 to ``classes``."""
    end = 0
    for first, size in sorted(one for one in ranges if one[1]):
        if first != end:
            break
        end += size
    else:
        if end == classes:
            return
    seen = ", ".join(
        f"rank {rank} has {first} to {first + size}" for rank, (first, size) in enumerate(ranges)
    )
    raise ValueError(
        f"the ranks' classes of student_logits do not tile 0 to {classes}: {seen} (the end excluded); "
        "expected each class on one rank, such as first_class being the sum of the sizes of the ranks before"
    )


def _check_rows(projections: Sequence[Mapping[str, float]]) -> None:
    for name, first in projections[0].items():
        for rank, found in enumerate(projections):
            if abs(found[name] - first) > _SAME_ROWS:
                raise ValueError(
                    f"{name} has other rows on rank {rank} than on rank 0; expected the same rows on every "
                    "rank: gather them before the loss, as each rank has only some of the classes"
                )
