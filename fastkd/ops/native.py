"""Loads the compiled extension (csrc/) and calls its operators."""

import ctypes
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

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
    torch_library = Path(torch.__file__).parent / "lib" / f"libtorch_cpu.{suffix}"
    library.fastkd_register.restype = ctypes.c_char_p
    library.fastkd_instruction_set.restype = ctypes.c_char_p
    refusal = library.fastkd_register(str(torch_library).encode())
    return refusal.decode() if refusal else library


def missing(device_type: str) -> str | None:
    """What stops the native backend on this kind of device; None where nothing does."""
    if device_type != "cpu":
        return f"it runs on the CPU, and there are no native kernels for {device_type} yet"
    loaded = _loaded()
    return loaded if isinstance(loaded, str) else None


def _library() -> ctypes.CDLL:
    loaded = _loaded()
    if isinstance(loaded, str):
        raise RuntimeError(f"the native backend cannot run: {loaded}")
    return loaded


def instruction_set() -> str:
    """The instruction set chosen for this processor: avx512, avx2 or portable."""
    return _library().fastkd_instruction_set().decode()


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
def _absent() -> Tensor:
    """Stands for an argument that is not given: an optional one costs an allocation a call."""
    return torch.empty(0)


def row_loss(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    target: Tensor | None,
    row_weight: Tensor | None,
    scale: float,
    loss: str,
    options: Sequence[float],
    rows: Tensor,
    terms: Tensor,
    gradient: Tensor,
) -> None:
    """Fills ``rows``, ``terms`` and ``gradient`` (an empty one is not computed); see ``ops.library``."""
    absent = _absent()
    labels = absent if target is None else target
    weights = absent if row_weight is None else row_weight
    settings = (_CODES[loss], *options, *(0.0,) * (_OPTIONS - len(options)))
    count = students[0].shape[0]
    if len(students) == 1:
        _operator("row_loss")(
            students[0], teachers[0], labels, weights, scale, rows, terms, gradient, *settings
        )
        return
    for pair, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
        of_pair = slice(pair * count, (pair + 1) * count)
        terms_of_pair = terms.new_empty(terms.shape[0], count)
        outputs = rows[of_pair], terms_of_pair, gradient[of_pair]
        _operator("row_loss")(student, teacher, labels, weights, scale, *outputs, *settings)
        terms[:, of_pair] = terms_of_pair


def scale_rows_(gradient: Tensor, upstream: Tensor) -> None:
    """``gradient[n] *= upstream[n]`` in place; rows whose factor is 1 are not touched."""
    _operator("scale_rows_")(gradient, upstream)
