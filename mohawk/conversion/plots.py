"""The picture of a selection."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mohawk.runs.figures import BLUE, ORANGE, number, save, subplots


def plot_selection(found: Mapping[str, Any], target: Path | str) -> Path:
    """What each layer costs alone, and what rankings cost over the number of attention layers they leave.

    found: as in a run's selection.json (see mohawk.conversion.select).
    """
    figure, axes = subplots(1, 3, width=5.2, height=3.8)
    single, loss, recalled = axes[0]
    layers = [row["layer"] for row in found["layers"]]
    values = [number(row["kl"]) for row in found["layers"]]
    single.bar(layers, values, width=0.8, color=BLUE)
    single.set_title("one layer alone")
    single.set_xlabel("layer whose attention is replaced")
    single.set_ylabel("KL(teacher ‖ student), nats per token")
    for (name, ranking), color in zip(found["rankings"].items(), (BLUE, ORANGE, "#1a7f37", "#8250df"), strict=False):
        left = [found["num_layers"] - i for i in range(len(ranking["path"]))]
        loss.plot(left, [number(p["kl"]) for p in ranking["path"]], color=color, marker="o", ms=3, label=f"by {name}")
        accuracy = [100 * number(p["recall"]["accuracy"]) for p in ranking["path"]]
        recalled.plot(left, accuracy, color=color, marker="o", ms=3, label=f"by {name}")
    loss.set_title("layers replaced in a ranking's order")
    loss.set_ylabel("KL(teacher ‖ student), nats per token")
    recalled.set_title("key-value recall")
    recalled.set_ylabel("values recalled, %")
    recalled.set_ylim(-4, 104)
    for axis in (loss, recalled):
        axis.set_xlabel("attention layers left")
        axis.invert_xaxis()
        axis.xaxis.get_major_locator().set_params(integer=True)
    loss.legend(frameon=False)
    return save(figure, target)
