"""What benchmarks found, as tables, plots and the pages that show them."""

from __future__ import annotations

import pathlib
import runpy

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# of a row's counts: which, a power of ten, and the unit that it makes of them
RATES = {
    "cpu": (("flops", 9, "GFLOP/s"), ("bytes", 9, "GB/s")),
    "cuda": (("flops", 12, "TFLOP/s"), ("bytes", 9, "GB/s")),
}


def beside(row: dict, other: dict) -> str:
    """How many times the time and the memory of `row` the other line takes."""
    name, times = other["name"].split(",")[0], other["seconds"] / row["seconds"]
    return f"{name} takes {times:.2g} x the time, {other['mib'] / max(row['mib'], 1):.2g} x the memory"


def rate(row: dict, device: str) -> str:
    """What the floor counts, over the time."""
    rates = [
        f"{row[kind] / row['seconds'] / 10**power:.3g} {unit}" for kind, power, unit in RATES[device] if kind in row
    ]
    return ", ".join(rates)


def part(row: dict, name: str) -> str:
    return f"{row['quantiles'][name][1]:.3g}" if name in row.get("quantiles", ()) else ""


def table_lines(rows: list[dict], device: str) -> list[str]:
    """Markdown of one benchmark."""
    seconds = "seconds" if device == "cuda" else "CPU seconds"
    lines, by_key = [], {(row["table"], row["name"]): row for row in rows}
    for table in dict.fromkeys(row["table"] for row in rows):
        mine = [row for row in rows if row["table"] == table]
        columns = next((row["columns"] for row in mine if "columns" in row), None)
        if columns:
            lines += [f"**{table}**", "", "| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        else:
            compared = any("against" in row for row in mine)
            parts = ["forward", "backward"] * any("quantiles" in row for row in mine)
            rated = any("flops" in row or "bytes" in row for row in mine)
            head = ["", seconds, "spread", *parts, "of the floor", *["floor's work"] * rated, "peak MiB", "error"]
            head += ["beside it"] * compared
            lines += [f"**{table}**", "", f"| {' | '.join(head)} |".replace("|  |", "| |"), "|---" * len(head) + "|"]
        for row in mine:
            cells = [row["name"]]
            if "columns" in row:
                cells += [
                    f"{value:.2%}" if isinstance(value, float) else str(value) for value in row["columns"].values()
                ]
            elif "seconds" in row:
                floor = by_key.get((table, row["floor"]), {}).get("seconds")
                ratio = f"{row['seconds'] / floor:.2f}" if floor else ""
                spread = "-".join(f"{x:.3g}" for x in row["spread"])
                cells += [f"{row['seconds']:.3g}", spread, *(part(row, name) for name in parts), ratio]
                cells += [rate(row, device)] * rated + [f"{row['mib']:.0f}", f"{row['error']:.1e}"]
                other = by_key.get((table, row.get("against")), {})
                if "seconds" in other:
                    cells.append(beside(row, other))
                elif compared:
                    cells.append("")
            else:
                trouble = next(k for k in ("skipped", "failed", "wrong") if k in row)
                cells.append(f"{trouble}: {row[trouble]}")
            lines.append("| " + " | ".join(cells) + " |")
        notes = dict.fromkeys(row["formula"] for row in mine if row["formula"])
        lines += ["", *notes, ""]
    return lines


def draw(rows: list[dict], path: pathlib.Path, title: str) -> None:
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no plot")
        return
    matplotlib.use("Agg")
    figure = panels([row for row in rows if "seconds" in row], title)
    if figure is not None:
        figure.savefig(path, dpi=110)


def panels(rows: list[dict], title: str):
    """A figure with a row of panels for each table: time as a ratio to the table's floor, and peak memory. None
    without rows."""
    import matplotlib.pyplot as plt

    tables = dict.fromkeys(row["table"] for row in rows)
    if not tables:
        return None
    grouped = [[row for row in rows if row["table"] == table] for table in tables]
    curves = [any("at" in row for row in mine) for mine in grouped]
    heights = [4.2 if curve else 0.26 * len(mine) + 1.1 for mine, curve in zip(grouped, curves, strict=True)]
    figure, axes = plt.subplots(
        len(grouped), 2, figsize=(12, sum(heights) + 0.6), squeeze=False, layout="constrained",
        height_ratios=heights,
    )  # fmt: skip
    for mine, pair, curve in zip(grouped, axes, curves, strict=True):
        (draw_curves if curve else draw_bars)(mine, pair)
        pair[0].set_title(mine[0]["table"], loc="left", fontsize="medium", fontweight="bold")
    figure.suptitle(title)
    plt.close(figure)  # of pyplot's list; the figure itself stays
    return figure


def floors(rows: list[dict]) -> list[float]:
    """Of each row, its time over that of its floor; nan where it has none."""
    seconds = {row["name"]: row["seconds"] for row in rows}
    return [row["seconds"] / seconds.get(row["floor"], float("nan")) for row in rows]


def draw_curves(rows: list[dict], axes) -> None:
    """One table, measured at several lengths."""
    ratios = floors(rows)
    for axis, values, unit in ((axes[0], ratios, "time / floor"), (axes[1], [row["mib"] for row in rows], "peak MiB")):
        for name in dict.fromkeys(row["name"].split(",")[0] for row in rows):
            mine = [i for i, row in enumerate(rows) if row["name"].split(",")[0] == name]
            axis.plot([rows[i]["at"] for i in mine], [values[i] for i in mine], marker="o", label=name)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        lengths = sorted({row["at"] for row in rows})
        axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axis.set_xlabel(rows[0].get("axis", "tokens"))
        axis.set_ylabel(unit)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small")


def draw_bars(rows: list[dict], axes) -> None:
    """One table, a bar for each row, in the table's order."""
    colours = ["#3b6ea5" if row["name"].startswith("mohawk") else "#b0b0b0" for row in rows]
    places = range(len(rows))  # places, not names: two rows may be called the same
    told = (
        (axes[0], floors(rows), "time / floor (and seconds)", [f"{row['seconds']:.3g} s" for row in rows], "{:.2f} x"),
        (axes[1], [row["mib"] for row in rows], "peak MiB", None, "{:,.0f}"),
    )
    for axis, values, name, beside, form in told:
        bars = axis.barh(places, values, color=colours)
        texts = [form.format(value) for value in values]
        texts = texts if beside is None else [f"{text}  ({more})" for text, more in zip(texts, beside, strict=True)]
        white = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # where the floor's line would cross it
        axis.bar_label(bars, texts, padding=3, fontsize="x-small", bbox=white)
        axis.margins(x=0.22)
        axis.invert_yaxis()
        axis.set_xlabel(name, fontsize="small")
        axis.tick_params(labelsize="small")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].axvline(1, color="#c0504d", linewidth=1, linestyle="--")
    axes[0].set_yticks(places, [row["name"] for row in rows])
    axes[1].set_yticks([])


def made_by(machine: dict, command: str) -> str:
    """The line under a table: the machine's devices, as runs report them, and the script with its options."""
    return f"{'; '.join(machine['devices'])}. `python benchmarks/{command}`"


def put_in_docs(name: str, lines: list[str]) -> None:
    """Keeps a result's text as benchmarks/results/NAME.md and fills it into the pages that show it."""
    text = "\n".join(lines).strip() + "\n"
    (RESULTS / f"{name}.md").write_text(text.replace("](benchmarks/results/", "]("), encoding="utf-8")
    for page, new in runpy.run_path(str(ROOT / "docs" / "benchmark_tables.py"))["with_tables"]().items():
        if page.read_text(encoding="utf-8") != new:
            page.write_text(new, encoding="utf-8")
            print(f"{page.relative_to(ROOT)}: {name} written")
