"""The picture of a layer's heads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PANEL = 256  # pixels a side, so that 256 tokens are drawn one by one
_INCH = 128  # pixels


@dataclass(frozen=True)
class HeadPicture:
    """One head of a layer, as (r, c) pictures of at most PANEL points a side, NaN where nothing can be seen.

    norm: of the teacher's matrix; student_norm and distance: of the student's and of their difference; all Frobenius.
    rest: the share of the teacher's matrix that the student's, times whichever number fits best, leaves, 0 to 1. Of the
    matrices and not of the pictures. Without a student its five fields are None.
    """

    norm: float
    teacher: np.ndarray
    student_norm: float | None = None
    student: np.ndarray | None = None
    distance: float | None = None
    difference: np.ndarray | None = None
    rest: float | None = None


def plot_layer(heads: Sequence[HeadPicture], title: str, rows: tuple[int, int], target: Path | str) -> Path:
    """Every head of a layer: teacher, student and difference side by side, or the teacher alone; without a sum beside
    it, for a folder with a manifest.

    rows: the range of positions that the pictures' rows are; their columns are all positions before its end.
    Colour as in `mohawk.runs.plots.plot_mixing_matrices`, one scale a head.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import SymLogNorm
    from matplotlib.figure import Figure

    compared = heads[0].student is not None
    panels = 3 if compared else 1
    across = (2 if len(heads) <= 12 else 3) if compared else (4 if len(heads) <= 12 else 6)
    across = min(across, len(heads))
    down = -(-len(heads) // across)
    # Inches, each a whole number of pixels; placed by hand, because matplotlib's own layouts take minutes for a
    # hundred axes.
    side, (left, right, top), (above, below), (gap, bar) = (
        PANEL / _INCH,
        (0.5,) * 3,
        (40 / _INCH,) * 2,
        (8 / _INCH,) * 2,
    )
    wide, high = left + panels * (side + gap) + bar + right, above + side + below
    width, height = across * wide, top + down * high
    figure = Figure(figsize=(width, height), dpi=_INCH)
    FigureCanvasAgg(figure)
    figure.text(0.2 / width, 1 - 0.14 / height, title, fontsize=11, va="top", parse_math=False)
    (first, last), small = rows, {"fontsize": 7.5}
    for index, head in enumerate(heads):
        row, column = divmod(index, across)
        x, y = column * wide + left, height - top - (row + 1) * high + below
        largest = max(1e-2, float(np.nanmax(np.abs(head.teacher), initial=0)))
        norm = SymLogNorm(linthresh=1e-3, vmin=-largest, vmax=largest)
        pictures: list[tuple[Any, str]] = [(head.teacher, f"head {index}: ‖A‖ = {head.norm:.3g}")]
        if head.distance is not None and head.rest is not None:  # compared
            share = percent(head.distance / head.norm if head.norm else math.nan)
            pictures = [(head.teacher, f"head {index}: teacher, ‖A‖ = {head.norm:.3g}")]
            pictures.append((head.student, f"student, ‖S‖ = {head.student_norm:.3g}"))
            name = f"‖S − A‖ = {head.distance:.3g}, {share} of ‖A‖, {percent(head.rest)} at best scale"
            pictures.append((head.difference, name))
        for place, (picture, name) in enumerate(pictures):
            at = ((x + place * (side + gap)) / width, y / height, side / width, side / height)
            axis = figure.add_axes(at, facecolor="#eaeef2")
            image = axis.imshow(
                picture, cmap="RdBu_r", norm=norm, interpolation="nearest", aspect="auto",
                extent=(-0.5, last - 0.5, last - 0.5, first - 0.5),
            )  # fmt: skip
            axis.set_title(name, pad=3, **small)
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(labelsize=6.5, length=2, pad=1.5, labelleft=place == 0)
            axis.locator_params(nbins=5, integer=True)
            # a label at the right end would run into the next picture's 0
            axis.set_xticks([tick for tick in axis.get_xticks() if 0 <= tick < 0.9 * last])
            axis.set_xlim(-0.5, last - 0.5)
            if row == down - 1 or index + across >= len(heads):
                axis.set_xlabel("from position j", labelpad=1, **small)
            if place == 0:
                axis.set_ylabel("to position i", labelpad=1, **small)
        at = ((x + panels * (side + gap)) / width, y / height, bar / width, side / height)
        # pyrefly: ignore[unbound-name]  # there is a picture of each head
        figure.colorbar(image, cax=figure.add_axes(at)).ax.tick_params(labelsize=6.5, length=2, pad=1.5)
    figure.savefig(target, format="png")
    return Path(target)


def percent(share: float) -> str:
    return f"{100 * share:.3g}%"
