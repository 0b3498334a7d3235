"""A call that torch.compile leaves out, between two graphs; imported only while it traces.

``torch.compiler.disable`` imports the whole compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


uncompiled: Callable[..., Any] = torch.compiler.disable(
    _call, reason="a loss of ShardedLogits exchanges numbers with other ranks, and is not compiled"
)
