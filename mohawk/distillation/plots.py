"""The picture of an ablation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mohawk.runs.figures import BLUE, number, save, subplots
from mohawk.runs.plots import TEXTS


def plot_variants(rows: Sequence[Mapping[str, Any]], target: Path | str) -> Path | None:
    """KL from the teacher of each variant's student, a panel a text; None when there is nothing.

    rows: each with `name` and `texts`: {"held_out": a Comparison as a dict, ...}.
    """
    texts = [text for text in TEXTS if any("kl" in row["texts"].get(text, {}) for row in rows)]
    if not texts:
        return None
    figure, axes = subplots(1, len(texts), width=5.6, height=max(2.4, 0.34 * len(rows) + 1.2))
    for axis, text in zip(axes[0], texts, strict=True):
        shown = [row for row in rows if "kl" in row["texts"].get(text, {})]
        values = [number(row["texts"][text]["kl"]) for row in shown]
        bars = axis.barh(range(len(shown)), [v if math.isfinite(v) else 0 for v in values], color=BLUE, height=0.7)
        axis.bar_label(bars, [f"{v:#.3g}" for v in values], padding=3, fontsize=8)
        axis.set_yticks(range(len(shown)), [row["name"] for row in shown], fontsize=8.5)
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.set_xlabel("mean KL(teacher ‖ student), nats per token")
        axis.set_title(TEXTS[text])
    return save(figure, target)
