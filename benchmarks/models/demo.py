"""Keeps what a finished `mohawk demo` run found: its figures, tables and plots go to benchmarks/results/ and the
documentation.

make demo
python benchmarks/models/demo.py [--run runs/demo]
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.pages import RESULTS, put_in_docs  # noqa: E402
from mohawk.runs.tables import tables  # noqa: E402

PLOTS = ("losses", "evaluation", "mixing_matrices")


def markdown(results: dict) -> list[str]:
    """The run's tables and the two continuations."""
    lines = [results["architecture"] + ":"]
    for title, header, rows in tables(results):
        lines += ["", f"**{title}**", "", "| " + " | ".join(header) + " |"]
        lines += ["|---" + "|---:" * (len(header) - 1) + "|", *("| " + " | ".join(row) + " |" for row in rows)]
    said = results["continuations"]
    lines += ["", f"Greedy continuations of “{said['prompt']}”:", ""]
    lines += [f"- {who}: {' '.join(said[who].split())}" for who in ("teacher", "student")]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="folder of the finished run")
    run = parser.parse_args().run
    if not (run / "results.json").is_file():
        sys.exit(f"{run} holds no results.json: it is no finished run; make demo first")
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    results["teacher"] = Path(results["teacher"]).name  # where a machine keeps its cache says nothing
    for key in ("recipe", "plots"):
        results.pop(key)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "demo.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = markdown(results)
    found = results["machine"]
    versions = ", ".join(f"{package} {version}" for package, version in found["versions"].items())
    told = f"{'; '.join(found['devices'])}; {versions}. `make demo`"
    for name in PLOTS:
        shutil.copyfile(run / "plots" / f"{name}.png", RESULTS / f"demo_{name}.png")
    pictures = [f"![{name.replace('_', ' ')}](benchmarks/results/demo_{name}.png)" for name in PLOTS]
    put_in_docs("demo", [*lines, "", told, "", *pictures])


if __name__ == "__main__":
    main()
