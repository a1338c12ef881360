"""Attention at every N-th layer, for runtimes that compute which layers are attention from one number.

SGLang, llama.cpp and MLX read `full_attention_interval` of a Qwen3.5 and take the layers i with (i + 1) % N == 0 for
attention. So there is nothing to rank: an interval is one choice of layers, and what it costs is measured as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mohawk.conversion.probe import Probe, short_fingerprint
from mohawk.conversion.select import trained_student
from mohawk.core.folders import locked
from mohawk.core.json_files import read_json, write_json
from mohawk.core.places import home
from mohawk.core.run_folder import SELECTION
from mohawk.errors import UserError
from mohawk.models.hybrid_config import HybridConfig
from mohawk.runs.kept import Point, Selection


def regular_layers(interval: int, config: HybridConfig) -> list[int]:
    """The layers to replace for attention at the layers i with (i + 1) % interval == 0 alone, sorted.

    config: of a student that has the run's mixers.

    Raises:
        UserError: an interval that leaves all layers attention or none, or layers to replace that have no mixer.
    """
    total, trained = config.num_hidden_layers, config.ssm_layers
    if not 2 <= interval <= total:
        raise UserError(f"--interval: got {interval}; allowed: from 2 to {total}, the number of layers")
    replaced = [i for i in range(total) if (i + 1) % interval]
    if missing := [i for i in replaced if i not in trained]:
        raise UserError(
            f"--interval: {interval} would replace layers {missing} too, which have no mixer in this run; convert all "
            "layers (ssm_layers: all), or choose an interval at which they stay attention"
        )
    return replaced


def measure_intervals(
    run: str | Path, intervals: Sequence[int], *, tokens: int = 2048, console: Console | None = None
) -> dict[str, Any]:
    """Measure attention at every N-th layer for each N of `intervals`: adds to RUN/selection.json, and prints a table.

    Args:
        run: folder of a run whose phases 1 and 2 are done, with mixers in all layers that are to be replaced.
        intervals: each from 2 to the number of layers.
        tokens: of held-out text for the KL, and about as many of lists for recall.

    Returns:
        What was written: `patterns` has for each interval its `attention` layers and what they `cost`. A stopped call
        goes on from what was measured.

    Raises:
        UserError: the run is not that far, an interval that cannot be, or what `mohawk.conversion.run.opened`
            refuses.
    """
    console, folder = console or Console(), home(run)
    _, student = trained_student(folder)
    config = HybridConfig.from_pretrained(student)
    asked = {interval: regular_layers(interval, config) for interval in sorted(set(intervals))}
    with locked(folder):
        probe = Probe(folder, student, tokens, console)
        costs: dict[int, Point] = {}
        with probe.progress("by interval", 2 * len(asked)):
            for interval, layers in asked.items():
                costs[interval] = {"kl": probe.kl(layers), "recall": probe.recall(layers)}
        found: dict[str, Any] = read_json(folder / SELECTION, Selection) or {}
        if found.get("settings") != probe.settings:
            found = {"settings": probe.settings, "rankings": {}}
        patterns = found.setdefault("patterns", {})
        for interval, cost in costs.items():
            attention = [i for i in range(probe.num_layers) if i not in asked[interval]]
            patterns[str(interval)] = {"attention": attention, "cost": cost}
        write_json(folder / SELECTION, found)
    _print(found, list(asked), probe.num_layers, console)
    line = f"written to {folder / SELECTION}; for phase 3 with one of them: mohawk compose {run} --interval N"
    console.print(line, highlight=False, soft_wrap=True, markup=False)
    return found


def interval_cost(folder: Path, student: Path, interval: int) -> Point | None:
    """What `measure_intervals` has found for this student; None where it was not asked."""
    found = read_json(folder / SELECTION, Selection)
    if found is None or found["settings"].get("student") != short_fingerprint(student):
        return None
    pattern = found.get("patterns", {}).get(str(interval))
    return pattern and pattern["cost"]


def _print(found: dict[str, Any], intervals: list[int], total: int, console: Console) -> None:
    """Beside each interval the KL of as many attention layers that a ranking by KL leaves, where there is one."""
    ranking = found["rankings"].get("kl")
    table = Table(title="attention at every N-th layer", title_justify="left")
    for column in ("N", "attention layers", "KL", "recalled", *(["KL if ranked"] if ranking else [])):
        table.add_column(column, justify="left" if column == "attention layers" else "right")
    for interval in intervals:
        pattern = found["patterns"][str(interval)]
        kept, cost = pattern["attention"], pattern["cost"]
        row = [str(interval), ", ".join(map(str, kept)), f"{cost['kl']:.4f}", f"{cost['recall']['accuracy']:.1%}"]
        if ranking:
            row.append(
                f"{ranking['path'][total - len(kept)]['kl']:.4f}" if total - len(kept) < len(ranking["path"]) else ""
            )
        table.add_row(*row)
    console.print(table)
