"""Pictures of a run: loss curves, evaluation after each phase, mixing matrices as heat maps. All PNG."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mohawk.core.folders import drop_file
from mohawk.runs.figures import BLUE, GREY, ORANGE, halo, log_axis, number, save, subplots
from mohawk.training.metrics import ends, read_metrics

TITLES = {
    "before": "before",
    "mixing": "phase 1\nmatrices",
    "hidden": "phase 2\nhidden states",
    "end_to_end": "phase 3\nend to end",
}
TEXTS = {
    "held_out": "held-out text of the training source",
    "held_out_pairs": "held-out prompts and responses",
    "evaluation": "text of another source",
}
RETRIEVALS = {"needle": "among sentences about nothing", "pairs": "among others of their kind"}
SHARES = ("acc", "acc_norm", "exact_match", "pass@1", "f1", "em")  # metrics of tasks that lie between 0 and 1


@dataclass(frozen=True)
class Heads:
    """One head's mixing matrices (n, n): the teacher's, the student's before and after phase 1 (or None)."""

    label: str
    teacher: Any
    before: Any
    after: Any | None = None


def plot_losses(metrics: Path | str, target: Path | str, labels: Mapping[str, str] | None = None) -> Path | None:
    """The loss curve of every phase in metrics.jsonl, side by side, over tokens; None if none was logged.

    labels: what each phase's loss is, with its unit. A loss that was not finite leaves a gap.
    """
    records: dict[str, list[dict]] = {}
    for record in read_metrics(metrics):
        records.setdefault(record["phase"], []).append(record)
    names = [p for p in TITLES if p in records] + [p for p in records if p not in TITLES]
    if not names:
        return None
    figure, axes = subplots(1, len(names), width=4.6, height=3.4)
    for axis, name in zip(axes[0], names, strict=True):
        tokens = np.array([r["tokens"] for r in records[name]], dtype=float)
        loss = np.array([math.nan if r["loss"] is None else r["loss"] for r in records[name]], dtype=float)
        unit, scale = _unit(tokens.max())
        few = len(loss) < 20
        axis.plot(
            tokens / scale, loss, color=BLUE, alpha=1 if few else 0.3, lw=1.6 if few else 0.8,
            marker="o" if few else None, ms=3,
        )  # fmt: skip
        if not few:
            axis.plot(tokens / scale, _smooth(loss), color=BLUE, lw=1.8, label="running mean")
            axis.legend(frameon=False)
        finite = loss[np.isfinite(loss)]
        if len(finite) and finite.min() > 0 and finite.max() / finite.min() > 4:
            log_axis(axis)
        axis.set_title(TITLES.get(name, name).replace("\n", ": "), pad=20)
        axis.set_xlabel(f"tokens ({unit})" if unit else "tokens")
        axis.set_ylabel(textwrap.fill((labels or {}).get(name, "loss"), 28))
        first, last = map(number, ends([r["loss"] for r in records[name]]))
        said = f"{first:.4g} → {last:.4g}" + ("" if few else ", means of a tenth")
        # between title and curve, which may be anywhere in the panel
        axis.annotate(
            said, (0.5, 1), xytext=(0, 5), xycoords="axes fraction", textcoords="offset points",
            ha="center", color=GREY, fontsize=9,
        )  # fmt: skip
    return save(figure, target)


def plot_evaluation(stages: Mapping[str, Mapping[str, Mapping[str, float]]], target: Path | str) -> Path | None:
    """Perplexity, KL and top-1 agreement at each stage, in the order given; None when there is nothing.

    stages: {"before": {"held_out": a Comparison as a dict, ...}, "mixing": ..., ...}.
    """
    names = [s for s in stages if stages[s]]
    if not names:
        return None
    texts = [t for t in TEXTS if any(t in stages[s] for s in names)]
    panels = [
        ("student_perplexity", "student's perplexity", True),
        ("kl", "mean KL(teacher ‖ student), nats per token", True),
        ("top1_agreement", "same top token, % of positions", False),
    ]
    if not any("kl" in found for s in names for found in stages[s].values()):
        panels[1:] = [("bits_per_byte", "student's bits per byte", False)]
    figure, axes = subplots(1, len(panels), width=4.6, height=3.8)
    for axis, (key, label, logarithmic) in zip(axes[0], panels, strict=True):
        for text, color, marker in zip(texts, (BLUE, ORANGE, GREY), "os^", strict=False):
            values = [number(stages[s].get(text, {}).get(key)) for s in names]
            values = [v if math.isfinite(v) else math.nan for v in values]
            if key == "top1_agreement":
                values = [100 * v for v in values]
            axis.plot(range(len(names)), values, color=color, marker=marker, lw=1.8, label=TEXTS[text])
            theirs = {"student_perplexity": "teacher_perplexity", "bits_per_byte": "teacher_bits_per_byte"}.get(key)
            if theirs is not None and any(stages[s].get(text, {}).get(theirs) is not None for s in names):
                of_teacher = next(number(stages[s][text][theirs]) for s in names if text in stages[s])
                axis.axhline(of_teacher, color=color, ls="--", lw=1, label=f"teacher there: {of_teacher:.3g}")
            for i, value in enumerate(values):
                # the lower one of two texts has its number below the point, so that the two do not overlap
                numbers = {t: number(stages[names[i]].get(t, {}).get(key)) for t in texts}
                below = any(numbers[text] < other for other in numbers.values())
                if math.isfinite(value):
                    axis.annotate(
                        f"{value:.3g}", (i, value), xytext=(0, -14 if below else 8), fontsize=8, color=color,
                        textcoords="offset points", ha="center", zorder=4, path_effects=halo(),
                    )  # fmt: skip
        if logarithmic and any(value > 0 for line in axis.get_lines() for value in line.get_ydata()):
            log_axis(axis)
        elif key == "top1_agreement":
            axis.set_ylim(-8, 108)
        axis.margins(x=0.12, y=0.15)
        axis.set_xticks(range(len(names)), [TITLES.get(s, s) for s in names], fontsize=8.5)
        axis.set_title(label)
    handles, shown = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, shown, loc="outside lower center", ncols=len(shown), frameon=False)
    return save(figure, target)


def plot_mixing_matrices(rows: Sequence[Heads], target: Path | str) -> Path | None:
    """Heat maps, a head a row: the teacher's matrix, the student's before phase 1, and after it.

    Colour is a symmetric logarithm of the entry (red above 0, blue below), so that the faint structure of
    attention stays visible beside its peaks; it is the same within a row and saturates at the teacher's
    largest entry. Titles give the Frobenius distance.
    """
    if not rows:
        return None
    from matplotlib.colors import SymLogNorm

    columns = 2 + any(row.after is not None for row in rows)
    figure, axes = subplots(len(rows), columns, width=3.7, height=3.5)
    for line, row in zip(axes, rows, strict=True):
        matrices = [np.asarray(m, dtype=np.float64) for m in (row.teacher, row.before, row.after) if m is not None]
        # before phase 1 the student's entries may be thousands of times larger, which its title tells
        largest = max(1e-2, float(np.abs(matrices[0]).max()))
        norm = SymLogNorm(linthresh=1e-3, vmin=-largest, vmax=largest)
        names = (f"{row.label}: teacher", "student before phase 1", "student after phase 1")
        for axis, matrix, name in zip(line, matrices, names, strict=False):
            n = len(matrix)
            shown = np.where(np.tri(n, dtype=bool), matrix, np.nan)
            image = axis.imshow(shown, cmap="RdBu_r", norm=norm, interpolation="nearest")
            axis.set_facecolor("#eaeef2")
            if matrix is not matrices[0]:
                name += f"\n‖S − A‖ = {np.linalg.norm(matrix - matrices[0]):.3g}"
            else:
                name += f"\n‖A‖ = {np.linalg.norm(matrix):.3g}"
            axis.set_title(name, fontsize=10)
            axis.set_xlabel("from position j")
            axis.set_ylabel("to position i")
            axis.grid(False)
        for axis in line[len(matrices) :]:
            axis.set_axis_off()
        # pyrefly: ignore[unbound-name]  # there is a matrix in each row
        figure.colorbar(image, ax=list(line), label="entry (symmetric log)", shrink=0.85, pad=0.01)
    return save(figure, target)


def plot_retrieval(found: Mapping[str, Mapping[str, Any]], target: Path | str) -> Path | None:
    """Heat maps of `mohawk.measures.retrieval.retrieval`, teacher beside student, a kind of text a row; None, and no
    picture, where none was measured."""
    if not found:
        drop_file(Path(target))  # of a student that was there before
        return None
    figure, axes = subplots(
        len(found), 2, width=4.6, height=1.5 + 0.45 * max(len(t["lengths"]) for t in found.values())
    )
    for line, (kind, told) in zip(axes, found.items(), strict=True):
        for axis, who in zip(line, ("teacher", "student"), strict=True):
            shares = 100 * np.array(told[who], dtype=float)
            image = axis.imshow(shares, cmap="RdYlGn", vmin=0, vmax=100, aspect="auto")
            for (i, j), share in np.ndenumerate(shares):
                axis.annotate(f"{share:.0f}", (j, i), ha="center", va="center", fontsize=9)
            axis.set_xticks(range(len(told["depths"])), [f"{depth:.0%}" for depth in told["depths"]])
            axis.set_yticks(range(len(told["lengths"])), [f"{length:,}" for length in told["lengths"]])
            axis.set_title(f"{who}: {RETRIEVALS.get(kind, kind)}", fontsize=10)
            axis.set_xlabel("depth in the text")
            axis.set_ylabel("tokens")
            axis.grid(False)
        # pyrefly: ignore[unbound-name]  # there are two models
        figure.colorbar(image, ax=list(line), label="right, %", shrink=0.9, pad=0.01)
    return save(figure, target)


def plot_positions(found: Mapping[str, Sequence[Mapping[str, Any]]], target: Path | str) -> Path | None:
    """Perplexity of teacher and student in bins of positions, a text a panel; None, and no picture, where none was
    measured."""
    if not found:
        drop_file(Path(target))  # of a student that was there before
        return None
    figure, axes = subplots(1, len(found), width=4.6, height=3.4)
    for axis, (text, bins) in zip(axes[0], found.items(), strict=True):
        places = [math.sqrt(each["first"] * each["last"]) for each in bins]
        for who, color, marker in (("teacher", BLUE, "o"), ("student", ORANGE, "s")):
            values = [value if math.isfinite(value := number(each[who])) else math.nan for each in bins]
            axis.plot(places, values, color=color, marker=marker, lw=1.8, label=who)
        axis.set_xscale("log", base=2)
        axis.set_xticks(places, [f"{each['first']:,}–{each['last']:,}" for each in bins], fontsize=8, rotation=20)
        axis.set_xticks([], minor=True)
        axis.set_title(TEXTS.get(text, text), fontsize=10)
        axis.set_xlabel("position")
        axis.set_ylabel("perplexity")
        axis.set_ylim(bottom=0)
        axis.legend(frameon=False)
    return save(figure, target)


def plot_tasks(tasks: Mapping[str, Mapping[str, Any]], target: Path | str) -> Path | None:
    """Teacher and student on each task, by the first of its metrics that is a share, with standard errors.

    tasks: as in results.json. None, and no picture, where no task has such a metric.
    """
    rows = []
    for name, task in tasks.items():
        shares = [
            m for m, v in task["metrics"].items() if m.split(" ")[0] in SHARES and v["teacher_stderr"] is not None
        ]
        if shares:
            rows.append((f"{name}, {shares[0]}", task["metrics"][shares[0]]))
    if not rows:
        return None
    figure, axes = subplots(1, 1, width=7.5, height=1.1 + 0.34 * len(rows))
    axis = axes[0][0]
    for who, color, marker, shift in (("teacher", BLUE, "o", -0.12), ("student", ORANGE, "s", 0.12)):
        places = [row + shift for row in range(len(rows))]
        values = [100 * values[who] for _, values in rows]
        errors = [100 * (values[f"{who}_stderr"] or 0) for _, values in rows]
        axis.errorbar(values, places, xerr=errors, fmt=marker, ms=5, color=color, capsize=3, lw=1.4, label=who)
    axis.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=9)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlim(-3, 103)
    axis.set_xlabel("% ± one standard error")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    return save(figure, target)


def _unit(largest: float) -> tuple[str, float]:
    for unit, scale in (("billions", 1e9), ("millions", 1e6), ("thousands", 1e3)):
        if largest >= scale:
            return unit, scale
    return "", 1.0


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred running mean over a twentieth of the curve, ignoring gaps."""
    width = max(3, len(values) // 20) | 1
    padded = np.pad(values, width // 2, constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, width)
    counts = np.isfinite(windows).sum(-1)
    return np.where(counts > 0, np.nansum(windows, -1) / np.maximum(counts, 1), np.nan)
