"""Reading files of ``torch.save`` as plain values, without running code from them.

Besides tensors and builtin values they may hold what training scripts often store:
``argparse.Namespace``, and NumPy's numbers and arrays.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import pickle
import re
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

# Numbers only: no object arrays, text or structures.
_NUMBERS = ["?", "b", "h", "i", "l", "q", "B", "H", "I", "L", "Q", "e", "f", "d", "F", "D"]


@functools.lru_cache(maxsize=1)
def _allowed() -> tuple[Any, ...]:
    scalar, array = (value.__reduce__()[0] for value in (np.float64(0), np.zeros(0)))
    names = [
        (function, f"numpy.{package}.multiarray.{name}")
        for function, name in ((scalar, "scalar"), (array, "_reconstruct"))
        for package in ("core", "_core")  # NumPy 1 and 2
    ]
    types = {type(np.dtype(code)) for code in _NUMBERS}
    return (argparse.Namespace, *names, np.ndarray, np.dtype, *types)


def load_plain(file: str | Path | BinaryIO) -> Any:
    """The content of the file, on the CPU.

    Raises ``pickle.UnpicklingError`` that names the refused types; for damaged files whatever ``torch.load``
    raises.
    """
    if not isinstance(file, str | Path):
        file.seek(0)
    try:
        with torch.serialization.safe_globals(list(_allowed())), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on tensor types that callers refuse by name
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise pickle.UnpicklingError(_refused(file, str(error))) from None


def _refused(file: str | Path | BinaryIO, text: str) -> str:
    # torch's own message explains how to run the code in the file.
    names: list[str] = []
    with contextlib.suppress(Exception):  # an older format, or a damaged file
        if not isinstance(file, str | Path):
            file.seek(0)
        known = {name for _, name in (entry for entry in _allowed() if isinstance(entry, tuple))}
        known |= {f"{e.__module__}.{e.__qualname__}" for e in _allowed() if not isinstance(e, tuple)}
        names = [n for n in torch.serialization.get_unsafe_globals_in_checkpoint(file) if n not in known]
    names = names or re.findall(r"(?:GLOBAL |but got <class ')([\w.]+)", text)[:1]
    if not names:
        return "it is not a file of torch.save, or it is damaged"
    return (
        f"it holds {', '.join(sorted(set(names))[:5])}, which is not loaded, since that could run code from "
        "the file; save only the weights instead: torch.save(model.state_dict(), FILE)"
    )
