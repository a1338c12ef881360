"""What pictures have in common: figures of their own, their colours, and how they are written. All PNG."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from mohawk.core.folders import write_file

BLUE, ORANGE, GREY = "#1f6feb", "#d9730d", "#8c959f"


def number(value: Any) -> float:
    return float(value) if value is not None else math.nan  # also reads "inf" and "nan"


def log_axis(axis: Any) -> None:
    """Make the y axis of what is drawn logarithmic, with plain numbers at its ticks: more of them where it spans
    little, and none of this where it spans less than a factor of 2."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    low, high = axis.dataLim.minposy, axis.dataLim.y1
    if high < 2 * low:
        return
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 5, 7)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))


def halo() -> list[Any]:
    """A white edge, with which numbers are read where a curve passes behind them."""
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=4, foreground="white")]


def subplots(rows: int, columns: int, *, width: float, height: float) -> tuple[Any, np.ndarray]:
    # a figure of its own canvas: nothing here touches pyplot, the user's backend or a display
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.grid(True, alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Any, target: Path | str) -> Path:
    """Write a picture with its sum beside it."""
    target = Path(target)
    with write_file(target) as beside:
        figure.savefig(beside, format="png")
    return target
