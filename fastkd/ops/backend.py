"""Selection of the backend that runs a loss: ``triton``, ``native`` or ``eager``.

The backend is chosen per call: the one requested by name, or with ``auto`` the fastest that runs on the
logits' device. A backend requested by name that cannot run is an error, never a silent fallback.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch

from fastkd import environment
from fastkd.messages import first_line
from fastkd.ops.plan import NATIVE_CAPABILITY, device_of, native_is_faster
from fastkd.ops.spec import Family

BACKENDS = ("auto", "triton", "native", "eager")
FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class BackendUnavailable(RuntimeError):
    """The backend requested by name cannot run; the message says what is missing."""


_chosen = os.environ.get("FASTKD_BACKEND") or "auto"


def get_backend() -> str:
    """Return the current backend: ``"auto"``, ``"triton"``, ``"native"`` or ``"eager"``.

    Raises ``ValueError`` if the environment's ``FASTKD_BACKEND`` is none of them: on first use, not at
    import, so that the command line can report it in one line.
    """
    # set_backend rejects unknown names: an unknown one comes from the environment.
    environment.check_choice("FASTKD_BACKEND", _chosen, BACKENDS)
    return _chosen


def set_backend(name: str) -> None:
    """Set the backend of all later calls.

    ``"auto"`` (the default) selects the fastest that runs on the logits' device: native on CPUs and on GPUs
    without triton, triton on other GPUs, but native at the shapes where it was measured to be faster
    (``fastkd.explain`` says which), eager if neither can run. A name selects that backend; a call raises
    ``BackendUnavailable`` if it cannot run. The environment variable ``FASTKD_BACKEND`` sets the initial
    backend; an empty value counts as unset, and an unknown one is an error at the first loss.
    """
    global _chosen
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}; expected one of {', '.join(BACKENDS)}")
    _chosen = name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Set the backend within a ``with`` block.

    The backend is one for the whole process: do not use blocks in several threads at once.
    """
    global _chosen
    before = _chosen
    set_backend(name)
    try:
        yield
    finally:
        _chosen = before


def checked_device(device: str | torch.device, argument: str) -> torch.device:
    """Return a ``torch.device`` that can hold tensors; errors name ``argument``."""
    if not isinstance(device, str | torch.device):
        raise TypeError(f"{argument} is {device!r}; expected a device such as 'cpu' or 'cuda'")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(
            f"{argument} is {str(device)!r}; expected a device such as 'cpu' or 'cuda:0'"
        ) from None
    if found.type == "meta":
        raise ValueError(f"{argument} is {str(device)!r}, which holds no numbers; expected 'cpu' or 'cuda'")
    if found.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise ValueError(f"{argument} is {str(device)!r}, but torch finds no CUDA device here")
        if found.index is not None and found.index >= count:
            raise ValueError(f"{argument} is {str(device)!r}, but torch finds {count} CUDA devices here")
    elif found.type != "cpu":
        try:
            torch.empty(0, device=found)
        except Exception as error:  # its type depends on the device
            raise ValueError(
                f"{argument} is {str(device)!r}, which torch cannot use here: {first_line(error)}"
            ) from None
    return found


def missing(backend: str, device_type: str) -> str | None:
    """Return why ``backend`` cannot run on this type of device, or None."""
    return _PROBES[backend](device_type)


def resolve(chosen: str, device_type: str, *dtypes: torch.dtype) -> str:
    """Return the backend for logits of these dtypes on this device if ``chosen`` is the current backend.

    torch.compile evaluates it while tracing, as a constant, and retraces if the arguments change.
    """
    unsupported = None
    for dtype in dtypes:
        if dtype not in FUSED_DTYPES:
            unsupported = dtype
    if chosen == "auto":
        return "eager" if unsupported is not None else _automatic(device_type)
    if chosen == "eager":
        return "eager"
    if unsupported is not None:
        raise BackendUnavailable(
            f"backend {chosen!r} computes in float32 and takes float32, bfloat16 and float16 logits, not "
            f"{unsupported}; use set_backend('eager') or 'auto' for {unsupported}"
        )
    reason = missing(chosen, device_type)
    if reason is not None:
        raise BackendUnavailable(f"backend {chosen!r} cannot run on {device_type}: {reason}")
    return chosen


# Set by torch.compiler.assume_constant_result, which would import the whole compiler: two seconds, and Triton
# before its interpreter can be selected.
resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _automatic(device_type: str) -> str:
    candidates = {"cuda": ("triton", "native"), "cpu": ("native",)}.get(device_type, ())
    reasons = {}
    for name in candidates:
        reason = missing(name, device_type)
        if reason is None:
            return name
        reasons[name] = reason
    if not reasons:
        return "eager"
    warnings.warn(
        f"fastkd runs its slower eager backend on {device_type}, because "
        + "; and ".join(f"{name} is not available: {reason}" for name, reason in reasons.items())
        + " (see `fastkd doctor`)",
        RuntimeWarning,
        stacklevel=5,
    )
    return "eager"


def faster_for(
    chosen: str,
    device: torch.device,
    family: Family,
    labelled: bool,
    rows: int,
    classes: int,
    dtype: torch.dtype,
) -> str:
    """The backend for rows of dense logits if ``chosen`` is the one for their device."""
    if chosen != "triton" or get_backend() != "auto" or not native_may_be_faster(device):
        return chosen
    return "native" if native_is_faster(family, labelled, rows, classes, dtype) else chosen


@cache
def native_may_be_faster(device: torch.device) -> bool:
    """Whether ``plan.native_is_faster`` was measured on such a GPU, and the native kernels run on it."""
    if device.type != "cuda" or missing("native", "cuda") is not None:
        return False
    return device_of(device).capability == NATIVE_CAPABILITY


native_may_be_faster._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _native_missing(device_type: str) -> str | None:
    from fastkd.ops import native

    return native.missing(device_type)


def _triton_missing(device_type: str) -> str | None:
    from fastkd.ops.triton import runtime

    return runtime.missing(device_type)


_PROBES: dict[str, Callable[[str], str | None]] = {
    "native": _native_missing,
    "triton": _triton_missing,
    "eager": lambda device_type: None,
}
