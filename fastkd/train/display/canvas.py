"""Figures of matplotlib that are only ever written to files."""

from __future__ import annotations

from typing import Any

from fastkd.imports import import_matplotlib


def figure(**options: Any) -> Any:
    """A ``matplotlib.figure.Figure`` on an Agg canvas: pyplot would keep global state and want a display."""
    import_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(**options)
    FigureCanvasAgg(made)
    return made
