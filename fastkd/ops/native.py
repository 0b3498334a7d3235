"""Loads the compiled extension (csrc/) and calls its operators."""

import ctypes
import sys
import threading
from collections.abc import Callable, Sequence
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastkd.environment import EnvironmentValueError
from fastkd.ops.call import Call, Outputs
from fastkd.ops.plan import device_of
from fastkd.ops.spec import LOSSES, Needs
from fastkd.ops.team_plan import plan_team

_FOLDER = Path(__file__).parent
_BUILD_ERROR = _FOLDER / "_native_build_error.txt"


def library_path() -> Path | None:
    """The compiled library beside this file, or None."""
    return next(iter(sorted(_FOLDER.glob("_native*.so"))), None)


_LOADING = threading.Lock()


@cache
def _loaded() -> ctypes.CDLL | str:
    """The library with its operators registered, or the reason why it cannot be loaded."""
    with _LOADING:  # operators can be registered once only, and the cache would let two threads do it
        return _load()


@cache
def _load() -> ctypes.CDLL | str:
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
    if found := _spec_mismatch(library):
        return f"its extension {path.name} is from another version of fastkd ({found}); reinstall fastkd"
    suffix = "dylib" if sys.platform == "darwin" else "so"
    torch_libraries = (
        str(Path(torch.__file__).parent / "lib" / f"libtorch_{part}.{suffix}").encode()
        for part in ("cpu", "cuda")
    )
    for function in ("register", "instruction_set", "instruction_set_refusal", "cuda_absent", "cuda_missing"):
        getattr(library, f"fastkd_{function}").restype = ctypes.c_char_p
    if refusal := library.fastkd_instruction_set_refusal():
        raise EnvironmentValueError(refusal.decode())
    library.fastkd_labels_all_valid.argtypes = [ctypes.c_void_p] + [ctypes.c_int64] * 3
    library.fastkd_labels_all_valid.restype = ctypes.c_bool
    library.fastkd_top_k_ready.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 3 + [ctypes.c_float]
    library.fastkd_top_k_ready.restype = ctypes.c_bool
    refusal = library.fastkd_register(*torch_libraries)
    return refusal.decode() if refusal else library


def missing(device_type: str) -> str | None:
    """Why the native backend cannot run on this type of device, or None."""
    if device_type not in ("cpu", "cuda"):
        return f"it runs on CPUs and CUDA devices, not on {device_type}"
    loaded = _loaded()
    if isinstance(loaded, str):
        return loaded
    return _cuda_missing() if device_type == "cuda" else None


def cuda_kernels_absent() -> str | None:
    """Why the extension was built without CUDA kernels; None if it has them."""
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


def labels_all_valid(target: Tensor, classes: int, ignore_index: int) -> bool:
    """Whether all labels are in range and none is ignored; False also if they cannot be read here."""
    library = _reader()
    if library is None or not _in_memory(target, torch.int64):
        return False
    return library.fastkd_labels_all_valid(target.data_ptr(), target.numel(), classes, ignore_index)


def top_k_ready(indices: Tensor, log_probs: Tensor, labels: Tensor | None, classes: int, most: float) -> bool:
    """Whether rows [N, K] are such as the kernels expect; False also if they cannot be read here.

    Ascending indices in range, log-probabilities of at most 0 that sum to at most ``most``, and the labels
    among the indices. NaN passes.
    """
    library = _reader()
    if (
        library is None
        or not (_in_memory(indices, torch.int64) and _in_memory(log_probs, torch.float32))
        or not (labels is None or _in_memory(labels, torch.int64))
    ):
        return False
    address = None if labels is None else labels.data_ptr()
    return library.fastkd_top_k_ready(
        indices.data_ptr(), log_probs.data_ptr(), address, *indices.shape, classes, most
    )


def _in_memory(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether a plain CPU tensor's storage holds its values, so that they can be read without the dispatcher.

    Subclasses (DTensor, FakeTensor) and functorch wrappers may have no memory.
    """
    if type(tensor) not in _PLAIN or tensor.dtype != dtype or not tensor.is_contiguous():
        return False
    try:
        address, end = tensor.data_ptr(), tensor.storage_offset() + tensor.numel()
        return address != 0 and tensor.untyped_storage().nbytes() >= dtype.itemsize * end
    except RuntimeError:  # a functorch wrapper, whose type is Tensor
        return False


_PLAIN = (Tensor, torch.nn.Parameter)


@cache
def _reader() -> ctypes.CDLL | None:
    loaded = _loaded()
    return None if isinstance(loaded, str) else loaded


# The index of a loss in `Losses` of csrc/row_formulas.h, which has the order of LOSSES.
_LOSS_INDEX = {name: index for index, name in enumerate(LOSSES)}
_OPTIONS = 8


def _spec_mismatch(library: ctypes.CDLL) -> str | None:
    """How the library's losses, options and needs differ from ``spec``, or None."""
    if not hasattr(library, "fastkd_losses"):
        return "it does not list its losses"
    library.fastkd_losses.restype = ctypes.c_char_p
    losses = library.fastkd_losses().decode()
    needs = " ".join(need.name.title().replace("_", "") for need in Needs)  # type: ignore[union-attr]
    expected = [f"needs {needs}"]
    expected += [f"{name}: {', '.join(loss.options._fields)}" for name, loss in LOSSES.items()]
    for ours, found in zip_longest(expected, losses.splitlines(), fillvalue="nothing"):
        if ours != found:
            return f"it has {found!r} where this version has {ours!r}"
    return None


@cache
def _operator(name: str) -> Callable[..., None]:
    _library()
    return getattr(torch.ops.fastkd_native, name).default


@cache
def _absent() -> Tensor:
    """The placeholder for None, which saves one allocation per call.

    Made by the first call of a kernel, not at import, which may happen while a program is traced, with
    tensors that are not real. Torch's defaults may be another dtype, device or mode; it is on the CPU
    whatever the logits' device, since it has no elements.
    """
    with torch.inference_mode(False):
        return torch.empty(0, dtype=torch.float32, device="cpu")


def _team(logits: Tensor, pairs: int, rereads: bool, teacher: Tensor | None = None) -> Sequence[int]:
    """The TeamPlan of a CUDA kernel; empty on the CPU."""
    if not logits.is_cuda:
        return ()
    element_bytes = logits.element_size() + (0 if teacher is None else teacher.element_size())
    rows, classes = logits.shape[:-1].numel(), logits.shape[-1]
    device = device_of(logits.device)
    return plan_team(rows * pairs, classes, element_bytes, device.capability, device.multiprocessors, rereads)


# Of TopKStatistics in csrc/cuda/arguments.h, in int64.
STATISTICS_WORDS = 6


def _top_k_arguments(student: Tensor, teacher: Tensor, call: Call, rereads: bool) -> Sequence[Any]:
    """Indices, needs, workspace and plans. The kernels cannot allocate: the workspace is scratch memory."""
    indices, needs = call.indices, call.at_k.needs
    if indices is None or not student.is_cuda:
        return indices, needs, _absent()
    rows, known = indices.shape
    workspace = indices.new_empty(rows * (STATISTICS_WORDS + known + 1))
    return indices, needs, workspace, *_team(teacher, 1, rereads, teacher), *_team(student, 1, False)


def with_sums(outputs: Outputs, pairs: int, call: Call) -> Outputs:
    """With memory for what ``row_loss`` can sum over rows."""
    if not outputs.rows.is_cpu:
        return outputs
    # The overhead of torch's sum equals the time of a small loss.
    return outputs.summed(pairs)


def row_loss(students: Sequence[Tensor], teachers: Sequence[Tensor], call: Call, outputs: Outputs) -> None:
    """Fill ``outputs``. Logits are [N, C] or [M, K, C] with dense classes; see ``layout.as_rows``."""
    student, teacher, pairs = students[0], teachers[0], len(students)
    rows, terms, gradient, sums, term_sums = outputs[:5]
    family = call.spec.family
    # Mixtures and moments read a row again for the loss alone too.
    rereads = family == "mixture" or bool(call.needs & Needs.STANDARDIZED)
    if gradient is not None:
        rereads = family != "pointwise"
    single, absent = pairs == 1, _absent()
    name: str = "row_loss" if single else "row_loss_of_pairs"
    last: Sequence[Any] = ()
    if call.indices is None:
        last = _team(student, pairs, rereads, teacher)
    else:
        name, last = "top_k_loss", _top_k_arguments(student, teacher, call, rereads)
    _operator(name)(
        student if single else students,
        teacher if single else teachers,
        absent if call.target is None else call.target,
        absent if call.row_weight is None else call.row_weight,
        1.0 / call.divisor,
        rows,
        absent if terms is None else terms,
        absent if gradient is None else gradient,
        absent if sums is None else sums,
        absent if term_sums is None else term_sums,
        absent if call.dynamic is None else call.dynamic,
        _LOSS_INDEX[call.loss],
        call.needs,
        *call.options,
        *(0.0,) * (_OPTIONS - len(call.options)),
        *last,
    )


def scale_rows_(gradient: Tensor, factors: Tensor) -> None:
    """``gradient[n] *= factors[n]`` in place, of N factors; rows whose factor is 1 are not accessed."""
    _operator("scale_rows_")(gradient, factors.reshape(-1), *_team(gradient, 1, False))
