"""`python benchmarks/run.py [NAME ...] [--device cpu|cuda] [--quick]`: the kernels, timed beside
others'.

A benchmark is a module in benchmarks/kernels/ with `cases(device, quick)`, a list of `Case`. Every case runs in a
fresh process: it is checked first, in the first round at the size that is timed, then warmed up, then timed, forward
and backward together and apart; the cases of a benchmark take turns, `--rounds` times, so that a busy or warming
machine disturbs all alike. Medians with their spread, ratios to the floor, and peak memory are printed and written to
benchmarks/results/NAME-DEVICE.json and .md with device, versions and commit, drawn as .png where matplotlib is
installed, and filled into the pages of docs/ that have the mark `<!-- benchmark: NAME-DEVICE -->`. What is written is
of one whole run: `--quick` and `--only` print. A run that was stopped goes on where it was, with the same command on
the same code.

Cases of other packages run where these are importable: with this Python, or with the one `--peers` names (a
virtual environment with liger-kernel, trl, ...). Those that are nowhere are named as skipped.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import pathlib
import statistics
import subprocess
import sys
import time

RUN = pathlib.Path(__file__).resolve()
if __name__ == "__main__":  # the script's folder is on sys.path instead of the root
    sys.path[0] = str(RUN.parents[1])

from benchmarks import liger_csv, own  # noqa: E402
from benchmarks.harness import Case, environment, measure  # noqa: E402
from benchmarks.pages import RESULTS, ROOT, draw, put_in_docs, table_lines  # noqa: E402
from benchmarks.unfinished import Unfinished, signature  # noqa: E402

NAMES = ("kd_loss", "kd_sweeps", "kd_accuracy", "mixing_distance", "delta_distance", "ssd", "delta_rule")


def find(name: str, options: argparse.Namespace) -> list[Case]:
    module = importlib.import_module(f"benchmarks.kernels.{name}")
    return module.cases(options.device, options.quick, options.own.get(name, []))


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


def run_one(
    name: str, case: Case, whole: bool, python: str, options: argparse.Namespace, seconds_left: float | None
) -> dict:
    command = [python, str(RUN), name, "--one", case.key, "--device", options.device]
    command += ["--repeats", str(options.repeats)] + ["--quick"] * options.quick + ["--whole"] * whole
    command += [f"--module={file}" for file in options.module]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=seconds_left)
    except subprocess.TimeoutExpired:
        return {"skipped": "out of time"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        return {"failed": (done.stderr.strip().splitlines() or ["no output"])[-1][:200]}
    return json.loads(lines[-1][len("RESULT ") :])


def summarise(case: Case, runs: list[dict]) -> dict:
    """The row of a case: medians over all timings of all its processes."""
    row = {"table": case.table, "name": case.name, "floor": case.floor, "formula": case.formula}
    told = ("against", "at", "flops", "bytes") + ("axis",) * (case.at is not None)
    row |= {key: getattr(case, key) for key in told if getattr(case, key) is not None}
    for trouble in ("failed", "wrong", "columns"):
        found = [run[trouble] for run in runs if trouble in run]
        if found:
            return row | {trouble: found[0]}
    runs = [run for run in runs if "error" in run]
    if not runs:
        return row | {"skipped": "out of time"}
    times = {part: [t for run in runs for t in run["times"][part]] for part in runs[0]["times"]}
    return row | {
        "seconds": statistics.median(times["both"]),
        "spread": [min(times["both"]), max(times["both"])],
        "quantiles": {part: quantiles(found) for part, found in times.items()},
        "wall": statistics.median([t for run in runs for t in run["wall"]]),
        "mib": max(run["mib"] for run in runs),
        "error": max(run["error"] for run in runs),
    }


def quantiles(times: list[float]) -> list[float]:
    """The fifth, the median and the fourth fifth."""
    if len(times) == 1:
        return times * 3
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return [fifths[0], statistics.median(times), fifths[3]]


def run_benchmark(name: str, options: argparse.Namespace) -> bool:
    """Run one benchmark; False if something of ours failed or was wrong."""
    end = None if options.seconds is None else time.monotonic() + options.seconds
    cases = [c for c in find(name, options) if options.only in c.key]
    if not cases:
        print(f"{name} has no case whose table/name contains {options.only!r}", file=sys.stderr)
        return False
    pythons = {case.key: interpreter_for(case.needs, options.peers) for case in cases}
    mark, about = f"{name}-{options.device}", environment(options.device)
    writes = not (options.no_write or options.quick or options.only or options.module)
    signed = signature(name, options.device, options.repeats, options.peers, about)
    kept = Unfinished(RESULTS / f".{mark}.unfinished.jsonl" if writes else None, signed)
    if kept.found:
        print(f"{name}: goes on with {len(kept.found)} measurements made before it was stopped", file=sys.stderr)
    runs: dict[str, list[dict]] = {case.key: [] for case in cases}
    for number in range(options.rounds):
        for place, case in enumerate(cases, 1):
            if (case.key, number) in kept.found:
                runs[case.key].append(kept.found[case.key, number])
                continue
            if pythons[case.key] is None or any("failed" in run or "wrong" in run for run in runs[case.key]):
                continue
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                continue
            started = time.perf_counter()
            whole = number == 0 and not options.quick
            result = run_one(name, case, whole, pythons[case.key], options, left)
            runs[case.key].append(result)
            kept.keep(case.key, number, result)
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
            rows.append(summarise(case, runs[case.key]))
    for row in rows:
        row |= {"commit": about["commit"], "date": about["date"]}
    lines = table_lines(rows, options.device)
    versions = f"torch {about['torch']}, Python {about['python']}; commit {about['commit']}, {about['date']}"
    asked = " --quick" * options.quick + "".join(f" --module {file}" for file in options.module)
    lines += [f"{about['device']}; {versions}. `python benchmarks/run.py {name} --device {options.device}{asked}`"]
    print("\n".join(lines))
    if options.csv is not None:
        liger_csv.write(options.csv, name, rows, about)
    if writes:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{mark}.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
        draw(rows, RESULTS / f"{mark}.png", f"{name} on {about['device']}")
        put_in_docs(mark, lines)
        kept.end()
    return not any(k in row for row in rows if row["name"].startswith("mohawk") for k in ("failed", "wrong"))


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=own.described(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all if none is given")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="small shapes, to see that everything runs; prints only")
    parser.add_argument("--only", default="", help="only cases whose table/name contains this; prints only")
    parser.add_argument("--rounds", type=int, help="fresh processes per case: 3, or 1 with --quick")
    parser.add_argument("--repeats", type=int, default=2, help="timings in each process")
    parser.add_argument("--seconds", type=float, help="time for each benchmark; what is left then is named as skipped")
    parser.add_argument("--peers", help="another Python, with the peers installed")
    parser.add_argument(
        "--module", action="append", default=[], metavar="FILE", help="a Python file with kernels of yours; prints only"
    )
    parser.add_argument("--csv", type=pathlib.Path, metavar="FILE", help="also the columns of Liger Kernel's results")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--whole", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.rounds = options.rounds or (1 if options.quick else 3)
    for name in options.names:
        if name not in NAMES:
            parser.error(f"no benchmark {name!r}; there are: {', '.join(NAMES)}")
    if options.device == "cuda" and not has_cuda():
        parser.error("--device cuda: torch sees no CUDA or ROCm device here")
    try:
        options.own = own.load(options.module)
    except ValueError as error:
        parser.error(str(error))
    if options.csv is not None and len(options.names) != 1:
        parser.error("--csv is of one benchmark: name it")
    if options.one:
        case = next(c for c in find(options.names[0], options) if c.key == options.one)
        print("RESULT " + json.dumps(measure(case, options.device, options.repeats, options.whole)))
        return 0
    results = [run_benchmark(name, options) for name in options.names or NAMES]
    return 0 if all(results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
