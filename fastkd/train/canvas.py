"""matplotlib without a backend: pictures go to files, so none is looked for."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

_VARIABLE = "MPLBACKEND"


def figure(**options: Any) -> Any:
    """A ``matplotlib.figure.Figure`` on an Agg canvas: pyplot would keep global state and want a display."""
    _import_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(**options)
    FigureCanvasAgg(made)
    return made


def font_folder() -> Path:
    """Of the DejaVu faces that matplotlib ships."""
    return Path(_import_matplotlib().get_data_path()) / "fonts" / "ttf"


def _import_matplotlib() -> Any:
    """matplotlib, which refuses to be imported where MPLBACKEND names a backend that is not installed.

    Notebooks set it, also for the commands they start. What it says is put back for the rest of the process.
    """
    if "matplotlib" not in sys.modules and (wanted := os.environ.pop(_VARIABLE, None)) is not None:
        try:
            import matplotlib

            with contextlib.suppress(ValueError):
                matplotlib.rcParams["backend"] = wanted
        finally:
            os.environ[_VARIABLE] = wanted
    import matplotlib

    return matplotlib
