"""Loads the compiled extension (csrc/) and calls its operators."""

import ctypes
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fastkd.ops.plan import device_of
from fastkd.ops.team_plan import plan_team

_FOLDER = Path(__file__).parent
_BUILD_ERROR = _FOLDER / "_native_build_error.txt"


def library_path() -> Path | None:
    """The compiled library beside this file, or None."""
    return next(iter(sorted(_FOLDER.glob("_native*.so"))), None)


@cache
def _loaded() -> ctypes.CDLL | str:
    """The library with its operators registered, or what stopped it."""
    path = library_path()
    if path is None:
        if _BUILD_ERROR.exists():
            reason = _BUILD_ERROR.read_text().strip()
            return f"its extension could not be built when fastkd was installed ({reason})"
        return "its extension is not built (install with `pip install .`, which needs a C++17 compiler)"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return f"its extension {path.name} does not load: {error}"
    suffix = "dylib" if sys.platform == "darwin" else "so"
    torch_libraries = (
        str(Path(torch.__file__).parent / "lib" / f"libtorch_{part}.{suffix}").encode()
        for part in ("cpu", "cuda")
    )
    for function in ("register", "instruction_set", "cuda_absent", "cuda_missing"):
        getattr(library, f"fastkd_{function}").restype = ctypes.c_char_p
    library.fastkd_labels_all_count.argtypes = [ctypes.c_void_p] + [ctypes.c_int64] * 3
    library.fastkd_labels_all_count.restype = ctypes.c_bool
    refusal = library.fastkd_register(*torch_libraries)
    return refusal.decode() if refusal else library


def missing(device_type: str) -> str | None:
    """What stops the native backend on this kind of device; None where nothing does."""
    if device_type not in ("cpu", "cuda"):
        return f"it runs on CPUs and CUDA devices, not on {device_type}"
    loaded = _loaded()
    if isinstance(loaded, str):
        return loaded
    return _cuda_missing() if device_type == "cuda" else None


def cuda_kernels_absent() -> str | None:
    """Why the extension was built without CUDA kernels; None where it has them, whatever the devices."""
    reason = _library().fastkd_cuda_absent()
    return reason.decode() if reason else None


@cache
def _cuda_missing() -> str | None:
    absent = cuda_kernels_absent()
    if absent is not None:
        return f"its extension has no CUDA kernels: {absent}"
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    reason = _library().fastkd_cuda_missing(torch.cuda.current_device())
    return reason.decode() if reason else None


def _library() -> ctypes.CDLL:
    loaded = _loaded()
    if isinstance(loaded, str):
        raise RuntimeError(f"the native backend cannot run: {loaded}")
    return loaded


def instruction_set() -> str:
    """The instruction set chosen for this processor: avx512, avx2 or portable."""
    return _library().fastkd_instruction_set().decode()


def labels_all_count(target: Tensor, classes: int, ignore_index: int) -> bool:
    """Whether each label on the CPU is a class and none is ignored; False too where nobody looked."""
    library = _loaded()
    if isinstance(library, str) or target.dtype != torch.int64 or not target.is_contiguous():
        return False
    return library.fastkd_labels_all_count(target.data_ptr(), target.numel(), classes, ignore_index)


# The order of csrc/row_formulas.h.
_CODES = {
    name: code
    for code, name in enumerate(("softmax", "nkd", "ttm", "reverse_kl", "jsd", "binary_kl", "binary_kl_norm"))
}
_OPTIONS = 8


@cache
def _operator(name: str) -> Callable[..., None]:
    _library()
    return getattr(torch.ops.fastkd_native, name).default


@cache
def _absent(device: torch.device) -> Tensor:
    """Stands for an argument that is not given: an optional one costs an allocation a call."""
    return torch.empty(0, 0, device=device)


def _team(logits: Tensor, pairs: int, element_bytes: int, keeps: bool) -> Sequence[int]:
    """How a CUDA kernel shares a row; the CPU needs no such plan."""
    if not logits.is_cuda:
        return ()
    rows, classes = logits.shape
    device = device_of(logits.device)
    return plan_team(rows * pairs, classes, element_bytes, device.capability, device.multiprocessors, keeps)


def row_loss(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    target: Tensor | None,
    row_weight: Tensor | None,
    scale: float,
    loss: str,
    options: Sequence[float],
    rows: Tensor,
    terms: Tensor | None,
    gradient: Tensor | None,
    sums: Tensor | None = None,
    dynamic: Tensor | None = None,
) -> None:
    """Fills ``rows`` and, where they are given, ``terms`` and ``gradient``; see ``ops.library``.

    And, on the CPU alone, ``sums`` [H] or [] with each pair's sum of rows.
    """
    if dynamic is not None:
        options = dynamic.tolist()
    student, teacher, pairs = students[0], teachers[0], len(students)
    absent = _absent(student.device)
    of_pairs = terms
    if terms is not None and pairs > 1:  # the kernels write each pair's terms together
        of_pairs = terms.new_empty(pairs, len(terms), len(student))
    # A kernel of one sweep has no use for the row again.
    keeps = gradient is not None and loss not in ("binary_kl", "binary_kl_norm")
    _operator("row_loss")(
        student,
        teacher,
        absent if target is None else target,
        absent if row_weight is None else row_weight,
        scale,
        rows,
        absent if of_pairs is None else of_pairs,
        absent if gradient is None else gradient,
        absent if sums is None else sums,
        absent if pairs == 1 else _addresses(students, teachers),
        _CODES[loss],
        *options,
        *(0.0,) * (_OPTIONS - len(options)),
        *_team(student, pairs, student.element_size() + teacher.element_size(), keeps),
    )
    if terms is not None and of_pairs is not None and pairs > 1:
        terms.view(len(terms), pairs, -1).copy_(of_pairs.transpose(0, 1))


def _addresses(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    """Of the logits of several pairs, [H, 2]: read as the kernel is launched, on the host."""
    pairs = zip(students, teachers, strict=True)
    return torch.tensor([[student.data_ptr(), teacher.data_ptr()] for student, teacher in pairs])


def scale_rows_(gradient: Tensor, upstream: Tensor) -> None:
    """``gradient[n] *= upstream[n]`` in place; rows whose factor is 1 are not touched."""
    _operator("scale_rows_")(gradient, upstream, *_team(gradient, 1, gradient.element_size(), False))
