"""Tables of benchmarks/results/ in README.md and docs/: between the marks that name them."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS, RESULTS = ROOT / "docs", ROOT / "benchmarks" / "results"

MARK = re.compile(r"(<!-- benchmark: (\S+) -->\n).*?(<!-- end -->)", re.S)
IMAGE = re.compile(r"(!\[[^]]*\]\()([\w.-]+\.png\))")


def with_tables() -> dict[Path, str]:
    """Pages with marks `<!-- benchmark: NAME -->`, filled from benchmarks/results/NAME.md."""
    pages = {}
    for page in [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]:
        text = page.read_text(encoding="utf-8")
        if MARK.search(text):
            pages[page] = MARK.sub(lambda found, page=page: found[1] + table(found[2], page) + found[3], text)
    return pages


def table(name: str, page: Path) -> str:
    """A result's text, with its images found from the page."""
    if name == "summary":
        return "\n".join(summary()) + "\n"
    place = "benchmarks/results/" if page.parent == ROOT else "../benchmarks/results/"
    return IMAGE.sub(rf"\g<1>{place}\g<2>", (RESULTS / f"{name}.md").read_text(encoding="utf-8").strip() + "\n")


def summary() -> list[str]:
    """The README's one table: a line for each thing that was measured, from the results' figures."""
    demo, decode = (json.loads((RESULTS / f"{name}.json").read_text("utf-8")) for name in ("demo", "decode"))
    found, seconds = demo["evaluation"]["end_to_end"], sum(phase["seconds"] for phase in demo["phases"].values())
    tokens = sum(phase["tokens"] for phase in demo["phases"].values())
    told = [f"{found[text]['perplexity_ratio']:.2f} x" for text in ("held_out", "evaluation")]
    kl = [f"{found[text]['kl']:.2f}" for text in ("held_out", "evaluation")]
    last = {model["model"]: model["rows"][-1] for model in decode["models"]}
    context = f"{last['teacher']['context']:,}"
    state = [f"{last[model]['state_bytes'] / 2**20:,.0f}" for model in ("teacher", "hybrid", "pure")]
    speed = [f"{last[model]['ms_per_token']:.0f}" for model in ("teacher", "hybrid", "pure")]
    listed = json.loads((RESULTS / "layer_choice.json").read_text("utf-8"))["rows"]
    recalled = {row["choice"]: row["recall"]["accuracy"] for row in listed if len(row["attention"]) in (15, 30)}

    def kernel(file: str, table: str, *names: str) -> list[dict]:
        rows = json.loads((RESULTS / f"{file}-cpu.json").read_text("utf-8"))["rows"]
        return [next(row for row in rows if row["table"].startswith(table) and row["name"] == name) for name in names]

    loss = kernel("kd_loss", "float32, from hidden", "mohawk forward KL", "eager forward KL", "torchtune forward KL")
    distance = kernel("mixing_distance", "batch 1", "mohawk, n 2048", "eager, n 2048")
    scan = kernel("ssd", "float32", "mohawk", "transformers, Bamba in torch")

    def cost(row: dict) -> str:
        return f"{row['seconds']:.2g} s, {row['mib']:,.0f} MiB"

    version = demo["machine"]["versions"]["mohawk"]
    earlier = version == "0.1.0"
    demo_of = f"`make demo`, {version}" if earlier else "`make demo`"
    trainer = f" of mohawk {version}, whose training loop was another" if earlier else ""

    return [
        "| measured | mohawk | beside it |",
        "|---|---|---|",
        f"| **quality**: SmolLM2-135M, 15 of 30 attention layers converted, {tokens:,} tokens, {seconds / 60:.0f} "
        f"minutes of training ({demo_of}) | perplexity {told[0]} the teacher's on held-out text, {told[1]} on text "
        f"of another source; KL {kl[0]} and {kl[1]} nats | before training: "
        f"{demo['evaluation']['before']['held_out']['perplexity_ratio']:.2f} x and "
        f"{demo['evaluation']['before']['evaluation']['perplexity_ratio']:.2f} x |",
        f"| **looking things up**: 15 of 30 layers chosen by KL, before phase 3 | {recalled['kl']:.0%} of "
        f"{listed[0]['recall']['values']} values recalled from lists | teacher: {recalled['teacher']:.0%} |",
        f"| **state** of one sequence of {context} tokens | {state[1]} MiB with 15 attention layers, {state[2]} MiB "
        f"with none | teacher: {state[0]} MiB |",
        f"| **decoding** a token after {context} | {speed[1]} ms with 15 attention layers, {speed[2]} ms with none "
        f"| teacher: {speed[0]} ms |",
        f"| **distillation loss** from hidden states, vocabulary 49,152, 1,024 rows, with gradients | {cost(loss[0])} "
        f"| eager: {cost(loss[1])}; torchtune: {cost(loss[2])} |",
        f"| **mixing distance**, 8 heads, 2,048 tokens, with gradients | {cost(distance[0])} "
        f"| both matrices built: {cost(distance[1])} |",
        f"| **state-space scan**, 2 x 2,048 tokens, 24 heads, with gradients | {cost(scan[0])} "
        f"| transformers: {cost(scan[1])} |",
        "",
        f"On {', '.join(dict.fromkeys(cpu(each) for each in (demo['machine'], decode['about']['machine'])))} with 2 "
        f"cores. Kernels in float32: CPU seconds, peak memory. The demo is one run{trainer}; students that decode are "
        "untrained.",
    ]


def cpu(machine: dict) -> str:
    """The processor's name."""
    return machine["devices"][0].removeprefix("cpu: ").partition(";")[0]
