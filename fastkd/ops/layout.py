"""Logits with any leading dimensions as rows for the kernels, without a copy if strides allow it."""

from collections.abc import Sequence

from torch import Tensor


def as_rows(
    students: Sequence[Tensor], teachers: Sequence[Tensor], known: bool = False
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Return views ``[N, C]``, or ``[M, K, C]`` if rows have two strides, as in ``logits[:, :-1]`` of [B, T,
    C].

    Classes are dense; all students have the same strides, and so have all teachers. Logits whose leading
    dimensions have three strides or more, or whose classes are not dense, are copied. Teachers ``known`` at
    some classes (``Call.indices``) are rows already.
    """
    if known:
        return as_rows(students, students)[0], teachers
    if len(students) == 1 and _are_rows(students[0]) and _are_rows(teachers[0]):
        return students, teachers
    students, teachers = _same_strides(students), _same_strides(teachers)
    size, classes = _outer(students[0]), students[0].shape[-1]
    if size == 1:
        size = _outer(teachers[0])
    shape = (-1, classes) if size == 1 else (size, -1, classes)
    return _viewed(students, shape), _viewed(teachers, shape)


def _are_rows(logits: Tensor) -> bool:
    return logits.dim() == 2 and logits.stride(1) == 1


def _same_strides(logits: Sequence[Tensor]) -> Sequence[Tensor]:
    stride = logits[0].stride()
    if stride[-1] == 1 and all(other.stride() == stride for other in logits[1:]):
        return logits
    return [tensor.contiguous() for tensor in logits]


def _levels(logits: Tensor) -> list[tuple[int, int]]:
    """(size, stride) of the leading dimensions, last first; dimensions with a common stride are merged."""
    levels: list[tuple[int, int]] = []
    for size, stride in zip(logits.shape[-2::-1], logits.stride()[-2::-1], strict=True):
        if size == 1:
            continue
        if levels and stride == levels[-1][0] * levels[-1][1]:
            levels[-1] = (levels[-1][0] * size, levels[-1][1])
        else:
            levels.append((size, stride))
    return levels


def _outer(logits: Tensor) -> int:
    """M of the view [M, K, C]; 1 if rows have one stride, or too many for a view."""
    levels = _levels(logits)
    return levels[1][0] if len(levels) == 2 else 1


def _viewed(logits: Sequence[Tensor], shape: tuple[int, ...]) -> Sequence[Tensor]:
    if logits[0].dim() == len(shape) == 2:
        return logits
    try:
        return [tensor.view(shape) for tensor in logits]
    except RuntimeError:  # three strides, or student and teacher need different M and K
        return [tensor.contiguous().view(shape) for tensor in logits]
