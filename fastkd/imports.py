"""Importing what a user names as ``module:attribute``, and matplotlib whatever its environment says."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from typing import Any


def import_named(name: str, what: str) -> Any:
    """The object ``module:attribute``, from any installed package or a file of the working directory.

    ``what`` ("the method") begins the message. Raises ``ValueError``.
    """
    module_name, _, attribute = name.partition(":")
    sys.path.insert(0, os.getcwd())  # a console script does not look in the working directory by itself
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"{what} {name!r} cannot be imported: {error}") from None
    finally:
        sys.path.remove(os.getcwd())
    found = getattr(module, attribute, None)
    if found is None:
        raise ValueError(f"{what} {name!r}: the module {module_name} has no {attribute!r}")
    return found


def import_matplotlib() -> Any:
    """matplotlib, even where MPLBACKEND names a backend that is not installed.

    Its import would fail there. Notebooks set the variable, also for the commands they start. The variable is
    restored for the rest of the process.
    """
    variable = "MPLBACKEND"
    if "matplotlib" not in sys.modules and (wanted := os.environ.pop(variable, None)) is not None:
        try:
            import matplotlib

            with contextlib.suppress(ValueError):
                matplotlib.rcParams["backend"] = wanted
        finally:
            os.environ[variable] = wanted
    import matplotlib

    return matplotlib


def make_figure(**options: Any) -> Any:
    """A ``matplotlib.figure.Figure`` on an Agg canvas: pyplot keeps global state and looks for a display."""
    import_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(**options)
    FigureCanvasAgg(figure)
    return figure
