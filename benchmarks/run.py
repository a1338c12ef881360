"""`python benchmarks/run.py [NAME ...] [--device cpu|cuda] [--quick]`: the benchmarks that compare us with
others.

A benchmark is a module beside this file with `cases(device, quick)`, a list of `Case`. Every case runs in a
fresh process: it is checked first, then warmed up, then timed; the cases of a benchmark take turns,
`--rounds` times, so that a busy or warming machine disturbs all alike. Medians with their spread, ratios to
the floor, and peak memory are printed and written to benchmarks/results/NAME-DEVICE.json and .md with device,
versions and commit, drawn as .png where matplotlib is installed, and filled into the pages of docs/ that have the mark
`<!-- benchmark: NAME-DEVICE -->`.

Cases of other packages run where these are importable: with this Python, or with the one `--peers` names (a
virtual environment with liger-kernel, trl, ...). Those that are nowhere are named as skipped.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import pathlib
import platform
import re
import runpy
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "results"
SHORT = 0.2  # seconds: calls that take less are timed several at once
NAMES = ("kd_loss", "kd_accuracy", "mixing_distance", "delta_distance", "ssd", "delta_rule")


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of one table.

    `make()` returns (check, work): `check()` gives an error against the reference, `work()` is what is timed,
    or None where the table is about errors alone (then check gives a dict of columns). `floor` is the line of
    the same table that ratios refer to, `formula` says what the floor counts, `needs` the package a peer's
    case imports. `against` is the line whose time and memory are divided by this one's. Cases with a place
    `at` on the horizontal axis are drawn as curves over it, one for each name up to its comma.
    """

    table: str
    name: str
    make: Callable[[], tuple[Callable, Callable | None]]
    needs: str | None = None
    floor: str | None = None
    formula: str = ""
    tolerance: float = 0.1
    against: str | None = None
    at: float | None = None

    @property
    def key(self) -> str:
        return f"{self.table}/{self.name}"


def find(name: str, device: str, quick: bool) -> list[Case]:
    return importlib.import_module(f"benchmarks.{name}").cases(device, quick)


# In the process of one case.


class PeakMemory:
    """Peak memory above that at the start, in MiB: torch's own count on CUDA, else resident pages as Linux counts
    them."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"

    @staticmethod
    def status(name: str) -> float:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(name)) / 1024

    def __enter__(self) -> PeakMemory:
        if self.cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated() / 2**20
            return self
        # Pages that the check left with the C library would hide as many of the work's own.
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak starts anew
        self.start = self.status("VmRSS")
        return self

    def __exit__(self, *_) -> None:
        if self.cuda:
            import torch

            self.mib = torch.cuda.max_memory_allocated() / 2**20 - self.start
            return
        self.mib = self.status("VmHWM") - self.start


def measure(case: Case, device: str, repeats: int) -> dict:
    """Check, warm up, measure memory once, then time: CPU seconds over all threads on CPU, seconds
    until the device is done on CUDA."""
    import torch

    check, work = case.make()
    result = {"error": check()}
    if work is None:
        return {"columns": result["error"]}
    if not result["error"] <= case.tolerance:
        return {"wrong": result["error"]}
    started = time.perf_counter()
    with PeakMemory(device) as peak:
        work()
    first = time.perf_counter() - started
    result["mib"] = peak.mib

    def seconds(calls: int) -> tuple[float, float]:
        if device == "cuda":
            torch.cuda.synchronize()
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(calls):
            work()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - wall) / calls, (time.process_time() - cpu) / calls

    once = seconds(1)[0] if first < SHORT or device == "cuda" else first  # the first may have compiled
    calls = max(1, min(100, int(SHORT / once)))
    wall, cpu = zip(*(seconds(calls) for _ in range(repeats)), strict=True)
    return result | {"wall": wall, "cpu": cpu}


# In the process that drives them.


@functools.cache
def interpreter_for(package: str | None, peers: str | None) -> str | None:
    """A Python that has the package."""
    if package is None:
        return sys.executable
    for python in filter(None, (sys.executable, peers)):
        probe = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
        if subprocess.run([python, "-c", probe], capture_output=True).returncode == 0:
            return python
    return None


def run_one(name: str, case: Case, python: str, options: argparse.Namespace, seconds_left: float | None) -> dict:
    command = [python, str(HERE / "run.py"), name, "--one", case.key, "--device", options.device]
    command += ["--repeats", str(options.repeats)] + ["--quick"] * options.quick
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=seconds_left)
    except subprocess.TimeoutExpired:
        return {"skipped": "out of time"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        return {"failed": (done.stderr.strip().splitlines() or ["no output"])[-1][:200]}
    return json.loads(lines[-1][len("RESULT ") :])


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment(device: str) -> dict:
    import torch

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    cpu = platform.processor() or platform.machine()
    if pathlib.Path("/proc/cpuinfo").exists():
        found = re.search(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text())
        cpu = found.group(1) if found else cpu
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip(),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{cpu}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        **{name: version_of(name) for name in ("triton", "transformers")},
        "python": platform.python_version(),
    }


def summarise(case: Case, runs: list[dict], device: str) -> dict:
    """The row of a case: medians over all timings of all its processes."""
    row = {"table": case.table, "name": case.name, "floor": case.floor, "formula": case.formula}
    row |= {key: getattr(case, key) for key in ("against", "at") if getattr(case, key) is not None}
    for trouble in ("failed", "wrong", "columns"):
        found = [run[trouble] for run in runs if trouble in run]
        if found:
            return row | {trouble: found[0]}
    runs = [run for run in runs if "error" in run]
    if not runs:
        return row | {"skipped": "out of time"}
    key = "wall" if device == "cuda" else "cpu"
    times = [t for run in runs for t in run[key]]
    return row | {
        "seconds": statistics.median(times),
        "spread": [min(times), max(times)],
        "wall": statistics.median([t for run in runs for t in run["wall"]]),
        "mib": max(run["mib"] for run in runs),
        "error": max(run["error"] for run in runs),
    }


def beside(row: dict, other: dict) -> str:
    """How many times the time and the memory of `row` the other line takes."""
    name, times = other["name"].split(",")[0], other["seconds"] / row["seconds"]
    return f"{name} takes {times:.2g} x the time, {other['mib'] / max(row['mib'], 1):.2g} x the memory"


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
            head = ["", seconds, "spread", "of the floor", "peak MiB", "error"] + ["beside it"] * compared
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
                cells += [f"{row['seconds']:.3g}", spread, ratio, f"{row['mib']:.0f}", f"{row['error']:.1e}"]
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
    curves = any("at" in row for row in rows)
    heights = [4.2 if curves else 0.26 * len(mine) + 1.1 for mine in grouped]
    figure, axes = plt.subplots(
        len(grouped), 2, figsize=(12, sum(heights) + 0.6), squeeze=False, layout="constrained",
        height_ratios=heights,
    )  # fmt: skip
    for mine, pair in zip(grouped, axes, strict=True):
        (draw_curves if curves else draw_bars)(mine, pair)
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
        axis.set_xlabel("tokens")
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


def put_in_docs(name: str, lines: list[str]) -> None:
    """Keeps a result's text as benchmarks/results/NAME.md and fills it into the pages that show it."""
    text = "\n".join(lines).strip() + "\n"
    (RESULTS / f"{name}.md").write_text(text.replace("](benchmarks/results/", "]("), encoding="utf-8")
    for page, new in runpy.run_path(str(ROOT / "docs" / "benchmark_tables.py"))["with_tables"]().items():
        if page.read_text(encoding="utf-8") != new:
            page.write_text(new, encoding="utf-8")
            print(f"{page.relative_to(ROOT)}: {name} written")


def run_benchmark(name: str, options: argparse.Namespace) -> bool:
    """Run one benchmark; False if something of ours failed or was wrong."""
    end = None if options.seconds is None else time.monotonic() + options.seconds
    cases = [c for c in find(name, options.device, options.quick) if options.only in c.key]
    if not cases:
        print(f"{name} has no case whose table/name contains {options.only!r}", file=sys.stderr)
        return False
    pythons = {case.key: interpreter_for(case.needs, options.peers) for case in cases}
    runs: dict[str, list[dict]] = {case.key: [] for case in cases}
    for number in range(options.rounds):
        for place, case in enumerate(cases, 1):
            if pythons[case.key] is None or any("failed" in run or "wrong" in run for run in runs[case.key]):
                continue
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                continue
            started = time.perf_counter()
            runs[case.key].append(run_one(name, case, pythons[case.key], options, left))
            seconds = time.perf_counter() - started
            where = f"round {number + 1} of {options.rounds}, case {place} of {len(cases)}"
            print(f"{where}: {case.key}: {seconds:.0f} s", file=sys.stderr, flush=True)
    rows = []
    for case in cases:
        if pythons[case.key] is None:
            rows.append(
                {"table": case.table, "name": case.name, "formula": "", "skipped": f"{case.needs} not installed"}
            )
        else:
            rows.append(summarise(case, runs[case.key], options.device))
    mark, about = f"{name}-{options.device}", environment(options.device)
    for row in rows:
        row |= {"commit": about["commit"], "date": about["date"]}
    old = RESULTS / f"{mark}.json"
    if options.only and old.exists():
        # Lines that this run left out stay as they were, in their places.
        new = {(row["table"], row["name"]): row for row in rows}
        before = json.loads(old.read_text())
        kept = [{key: before["about"][key] for key in ("commit", "date")} | row for row in before["rows"]]
        rows = [new.pop((row["table"], row["name"]), row) for row in kept] + list(new.values())
    lines = table_lines(rows, options.device)
    measured = sorted({(row.get("date", "?"), row.get("commit", "?")) for row in rows})
    measured = "; ".join(f"commit {commit}, {date}" for date, commit in measured)
    versions = f"torch {about['torch']}, Python {about['python']}; {measured}"
    told = f"{about['device']}; {versions}"
    lines += [f"{told}. `python benchmarks/run.py {name} --device {options.device}{' --quick' * options.quick}`"]
    print("\n".join(lines))
    if not (options.no_write or options.quick):
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{mark}.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
        draw(rows, RESULTS / f"{mark}.png", f"{name} on {about['device']}")
        put_in_docs(mark, lines)
    return not any(k in row for row in rows if row["name"].startswith("mohawk") for k in ("failed", "wrong"))


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all if none is given")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="small shapes, to see that everything runs; prints only")
    parser.add_argument(
        "--only", default="", help="only cases whose table/name contains this; results of the others stay"
    )
    parser.add_argument("--rounds", type=int, help="fresh processes per case: 3, or 1 with --quick")
    parser.add_argument("--repeats", type=int, default=2, help="timings in each process")
    parser.add_argument("--seconds", type=float, help="time for each benchmark; what is left then is named as skipped")
    parser.add_argument("--peers", help="another Python, with the peers installed")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.rounds = options.rounds or (1 if options.quick else 3)
    for name in options.names:
        if name not in NAMES:
            parser.error(f"no benchmark {name!r}; there are: {', '.join(NAMES)}")
    if options.device == "cuda" and not has_cuda():
        parser.error("--device cuda: torch sees no CUDA or ROCm device here")
    if options.one:
        case = next(c for c in find(options.names[0], options.device, options.quick) if c.key == options.one)
        print("RESULT " + json.dumps(measure(case, options.device, options.repeats)))
        return 0
    results = [run_benchmark(name, options) for name in options.names or NAMES]
    return 0 if all(results) else 1


if __name__ == "__main__":
    # The script's folder is on sys.path instead of the root, and its kd_loss.py is not mohawk's.
    sys.path[0] = str(ROOT)
    raise SystemExit(main())
