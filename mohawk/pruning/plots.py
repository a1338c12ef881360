"""The picture of a search."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mohawk.runs.figures import BLUE, GREY, log_axis, number, save, subplots


def plot_candidates(state: Mapping[str, Any], target: Path | str) -> Path:
    """KL of a search's candidates as cut and after light healing, over their numbers of layers.

    state: as in a round's search.json (see mohawk.pruning.search).
    """
    figure, axes = subplots(1, 1, width=6.4, height=4.2)
    axis, rows = axes[0][0], state["candidates"]
    healed = any(row["kl"] != row["kl_as_cut"] for row in rows)
    shown = [("kl_as_cut", "as cut", GREY, "x")] + ([("kl", "after light healing", BLUE, "o")] if healed else [])
    for key, label, color, marker in shown:
        values = [number(row[key]) for row in rows]
        axis.plot([row["sizes"]["layers"] for row in rows], values, marker, color=color, label=label)
    for place, row in enumerate(rows):
        if math.isfinite(value := number(row["kl"])):
            sizes = row["sizes"]
            text = f"{sizes['hidden']} / {sizes['ffn']}" + " (picked)" * (place == state["picked"])
            axis.annotate(text, (sizes["layers"], value), xytext=(4, 4), textcoords="offset points", fontsize=8)
    if all(number(row[key]) > 0 for row in rows for key, *_ in shown):
        log_axis(axis)
    axis.margins(x=0.15, y=0.15)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_title("candidates for a budget: hidden / ffn")
    axis.set_xlabel("layers")
    axis.set_ylabel("KL(teacher ‖ student), nats per token")
    axis.legend(frameon=False)
    return save(figure, target)
