"""Pictures of a run: loss curves, evaluation after each phase, mixing matrices as heat maps. All PNG."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mohawk.errors import naming
from mohawk.training.metrics import read_metrics

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
SHARES = ("acc", "acc_norm", "exact_match", "pass@1", "f1", "em")  # metrics of tasks that lie between 0 and 1
BLUE, ORANGE, GREY = "#1f6feb", "#d9730d", "#8c959f"


@dataclass(frozen=True)
class Heads:
    """One head's mixing matrices (n, n): the teacher's, the student's before and after phase 1 (or None)."""

    label: str
    teacher: Any
    before: Any
    after: Any | None = None


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


PANEL = 256  # pixels a side, so that 256 tokens are drawn one by one
_INCH = 128  # pixels


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
    figure, axes = _subplots(1, len(names), width=4.6, height=3.4)
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
            _log_axis(axis)
        axis.set_title(TITLES.get(name, name).replace("\n", ": "), pad=20)
        axis.set_xlabel(f"tokens ({unit})" if unit else "tokens")
        axis.set_ylabel(textwrap.fill((labels or {}).get(name, "loss"), 28))
        last = finite[-1] if len(finite) else math.nan
        first = finite[0] if len(finite) else math.nan
        # between title and curve, which may be anywhere in the panel
        axis.annotate(
            f"{first:.4g} → {last:.4g}", (0.5, 1), xytext=(0, 5), xycoords="axes fraction", textcoords="offset points",
            ha="center", color=GREY, fontsize=9,
        )  # fmt: skip
    return _save(figure, target)


def plot_evaluation(stages: Mapping[str, Mapping[str, Mapping[str, float]]], target: Path | str) -> Path | None:
    """Perplexity, KL and top-1 agreement at each stage, in the order given; None when there is nothing.

    stages: {"before": {"held_out": a Comparison as a dict, ...}, "mixing": ..., ...}.
    """
    names = [s for s in stages if stages[s]]
    if not names:
        return None
    texts = [t for t in TEXTS if any(t in stages[s] for s in names)]
    panels = (
        ("student_perplexity", "student's perplexity", True),
        ("kl", "mean KL(teacher ‖ student), nats per token", True),
        ("top1_agreement", "same most probable token, % of positions", False),
    )
    figure, axes = _subplots(1, len(panels), width=4.6, height=3.8)
    for axis, (key, label, logarithmic) in zip(axes[0], panels, strict=True):
        for text, color, marker in zip(texts, (BLUE, ORANGE, GREY), "os^", strict=False):
            values = [_number(stages[s].get(text, {}).get(key)) for s in names]
            values = [v if math.isfinite(v) else math.nan for v in values]
            if key == "top1_agreement":
                values = [100 * v for v in values]
            axis.plot(range(len(names)), values, color=color, marker=marker, lw=1.8, label=TEXTS[text])
            if key == "student_perplexity":
                of_teacher = next(_number(stages[s][text]["teacher_perplexity"]) for s in names if text in stages[s])
                axis.axhline(of_teacher, color=color, ls="--", lw=1, label=f"teacher there: {of_teacher:.3g}")
            for i, value in enumerate(values):
                # the lower one of two texts has its number below the point, so that the two do not overlap
                numbers = {t: _number(stages[names[i]].get(t, {}).get(key)) for t in texts}
                below = any(numbers[text] < other for other in numbers.values())
                if math.isfinite(value):
                    axis.annotate(
                        f"{value:.3g}", (i, value), xytext=(0, -14 if below else 8), fontsize=8, color=color,
                        textcoords="offset points", ha="center",
                    )  # fmt: skip
        if logarithmic and any(value > 0 for line in axis.get_lines() for value in line.get_ydata()):
            _log_axis(axis)
        elif not logarithmic:
            axis.set_ylim(-8, 108)
        axis.margins(x=0.12, y=0.15)
        axis.set_xticks(range(len(names)), [TITLES.get(s, s) for s in names], fontsize=8.5)
        axis.set_title(label)
    handles, shown = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, shown, loc="outside lower center", ncols=len(shown), frameon=False)
    return _save(figure, target)


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
    figure, axes = _subplots(len(rows), columns, width=3.7, height=3.5)
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
    return _save(figure, target)


def plot_layer(heads: Sequence[HeadPicture], title: str, rows: tuple[int, int], target: Path | str) -> Path:
    """Every head of a layer: teacher, student and difference side by side, or the teacher alone.

    rows: the range of positions that the pictures' rows are; their columns are all positions before its end.
    Colour as in `plot_mixing_matrices`, one scale a head.
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
    return _save(figure, target)


def plot_selection(found: Mapping[str, Any], target: Path | str) -> Path:
    """What each layer costs alone, and what rankings cost over the number of attention layers they leave.

    found: as in a run's selection.json (see mohawk.conversion.select).
    """
    figure, axes = _subplots(1, 3, width=5.2, height=3.8)
    single, loss, recalled = axes[0]
    layers = [row["layer"] for row in found["layers"]]
    values = [_number(row["kl"]) for row in found["layers"]]
    single.bar(layers, values, width=0.8, color=BLUE)
    single.set_title("one layer alone")
    single.set_xlabel("layer whose attention is replaced")
    single.set_ylabel("KL(teacher ‖ student), nats per token")
    for (name, ranking), color in zip(found["rankings"].items(), (BLUE, ORANGE, "#1a7f37", "#8250df"), strict=False):
        left = [found["num_layers"] - i for i in range(len(ranking["path"]))]
        loss.plot(left, [_number(p["kl"]) for p in ranking["path"]], color=color, marker="o", ms=3, label=f"by {name}")
        accuracy = [100 * _number(p["recall"]["accuracy"]) for p in ranking["path"]]
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
    return _save(figure, target)


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
    figure, axes = _subplots(1, 1, width=7.5, height=1.1 + 0.34 * len(rows))
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
    return _save(figure, target)


def plot_variants(rows: Sequence[Mapping[str, Any]], target: Path | str) -> Path | None:
    """KL from the teacher of each variant's student, a panel a text; None when there is nothing.

    rows: each with `name` and `texts`: {"held_out": a Comparison as a dict, ...}.
    """
    texts = [text for text in TEXTS if any(text in row["texts"] for row in rows)]
    if not texts:
        return None
    figure, axes = _subplots(1, len(texts), width=5.6, height=max(2.4, 0.34 * len(rows) + 1.2))
    for axis, text in zip(axes[0], texts, strict=True):
        shown = [row for row in rows if text in row["texts"]]
        values = [_number(row["texts"][text]["kl"]) for row in shown]
        bars = axis.barh(range(len(shown)), [v if math.isfinite(v) else 0 for v in values], color=BLUE, height=0.7)
        axis.bar_label(bars, [f"{v:#.3g}" for v in values], padding=3, fontsize=8)
        axis.set_yticks(range(len(shown)), [row["name"] for row in shown], fontsize=8.5)
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.set_xlabel("mean KL(teacher ‖ student), nats per token")
        axis.set_title(TEXTS[text])
    return _save(figure, target)


def percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _number(value: Any) -> float:
    return float(value) if value is not None else math.nan  # also reads "inf" and "nan"


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


def _log_axis(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))


def _subplots(rows: int, columns: int, *, width: float, height: float) -> tuple[Any, np.ndarray]:
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


def _save(figure: Any, target: Path | str) -> Path:
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.tmp")
    try:
        with naming(target):
            figure.savefig(beside, format="png")
        os.replace(beside, target)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    return target


def plot_candidates(state: Mapping[str, Any], target: Path | str) -> Path:
    """KL of a search's candidates as cut and after light healing, over their numbers of layers.

    state: as in a round's search.json (see mohawk.pruning.search).
    """
    figure, axes = _subplots(1, 1, width=6.4, height=4.2)
    axis, rows = axes[0][0], state["candidates"]
    healed = any(row["kl"] != row["kl_as_cut"] for row in rows)
    shown = [("kl_as_cut", "as cut", GREY, "x")] + ([("kl", "after light healing", BLUE, "o")] if healed else [])
    for key, label, color, marker in shown:
        values = [_number(row[key]) for row in rows]
        axis.plot([row["sizes"]["layers"] for row in rows], values, marker, color=color, label=label)
    for number, row in enumerate(rows):
        if math.isfinite(value := _number(row["kl"])):
            sizes = row["sizes"]
            text = f"{sizes['hidden']} / {sizes['ffn']}" + " (picked)" * (number == state["picked"])
            axis.annotate(text, (sizes["layers"], value), xytext=(4, 4), textcoords="offset points", fontsize=8)
    if all(_number(row[key]) > 0 for row in rows for key, *_ in shown):
        _log_axis(axis)
    axis.margins(x=0.15, y=0.15)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_title("candidates for a budget: hidden / ffn")
    axis.set_xlabel("layers")
    axis.set_ylabel("KL(teacher ‖ student), nats per token")
    axis.legend(frameon=False)
    return _save(figure, target)
