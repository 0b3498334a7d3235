"""The network of an export: a safetensors file that says what it is of."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from fastkd.errors import CheckpointError
from fastkd.train.state_dicts import fill

from .about import About
from .safetensors_file import KEY, read_safetensors
from .student import rebuilt


def load_exported(path: Path, network: nn.Module | None = None) -> tuple[nn.Module, About]:
    """The network of a file, in eval mode; see ``read_student``. Raises ``CheckpointError``."""
    about, weights = read_safetensors(path)
    if about is None:
        raise CheckpointError(
            f"{path} does not say what network it is of: its header has no {KEY!r}; expected a file of "
            "`fastkd export`"
        )
    if network is None and ":" in about.network.name:
        raise CheckpointError(
            f"{path} is of the network {about.network.name}, which is not part of fastkd; a file does not "
            "decide what code is run: build the network and pass it as fastkd.load(…, network=…)"
        )
    model = rebuilt(about.network, path, network)
    fill(model, weights, str(path), "the network must be that of the export")
    return model.eval(), about
