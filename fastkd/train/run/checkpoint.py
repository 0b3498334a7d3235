"""Checkpoints: written atomically, read as plain tensors and values only.

A checkpoint is torch's zip archive with the SHA-256 of its bytes in the archive's comment, which torch and
zip tools ignore. torch's reader checks little itself: for an entry whose directory bit is set, for example,
it returns a tensor with uninitialised memory.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastkd.errors import CheckpointError
from fastkd.files.atomic import write_atomically
from fastkd.files.plain import load_plain
from fastkd.files.regular import open_regular
from fastkd.files.sealed import Damage, check_sealed, seal
from fastkd.messages import first_line, kind_and_text
from fastkd.train.state_dicts import is_extra_state

_FORMAT = "fastkd-2"
_WITHOUT_DIGEST = "fastkd-1"  # written by older versions


def save_checkpoint(path: Path, content: Mapping[str, Any], *, keep_as: Path | None = None) -> None:
    # Through memory: torch's own writer reports a failed write without the reason.
    buffer = io.BytesIO()
    torch.save({**content, "format": _FORMAT}, buffer)
    seal(buffer)
    write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getbuffer()), keep_as=keep_as)


def load_checkpoint(path: Path, *, remedy: str) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. ``remedy`` ends the error message.

    Raises ``CheckpointError``.
    """
    if not path.exists():
        raise CheckpointError(f"no checkpoint {path}; {remedy}")
    try:
        # Opened once for check and reading: the file could be replaced in between.
        with open(open_regular(path), "rb") as file:
            sealed = check_sealed(file)
            content = load_plain(file)
    except Damage as damage:
        raise CheckpointError(f"checkpoint {path} is damaged: {damage}; {remedy}") from None
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"checkpoint {path} is damaged or holds more than tensors: {error}; {remedy}"
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # damaged pickles can raise anything
        raise CheckpointError(
            f"checkpoint {path} is truncated or damaged: {first_line(error)}; {remedy}"
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(
            f"checkpoint {path} holds a {type(content).__name__}, expected a dict; {remedy}"
        )
    _check_format(path, content.get("format"), sealed, remedy)
    return content


def check_extra_states(network: nn.Module) -> None:
    """Raise ``ValueError`` for an extra state (``get_extra_state``) that a checkpoint could not give back."""
    for key, value in network.state_dict().items():
        if not is_extra_state(key):
            continue
        module = network.get_submodule(key.rpartition(".")[0])
        buffer = io.BytesIO()
        try:
            torch.save(value, buffer)
            module.set_extra_state(load_plain(buffer))
        except Exception as error:  # pickle's or the module's own
            raise ValueError(
                f"{key} of {type(module).__name__}.get_extra_state cannot be saved and loaded: "
                f"{kind_and_text(error)}; expected tensors and plain values, and a set_extra_state for them"
            ) from None


def _check_format(path: Path, name: object, sealed: bool, remedy: str) -> None:
    if not (isinstance(name, str) and name.startswith("fastkd-")):
        return  # written by another program
    if name not in (_FORMAT, _WITHOUT_DIGEST):
        raise CheckpointError(
            f"checkpoint {path} has the format {name!r}, but this fastkd reads {_FORMAT} and "
            f"{_WITHOUT_DIGEST}: a newer fastkd wrote it, or it is damaged; {remedy}"
        )
    if name == _FORMAT and not sealed:
        raise CheckpointError(f"checkpoint {path} is damaged: its SHA-256 is missing; {remedy}")
