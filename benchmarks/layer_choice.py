"""Which attention layers can go? What each layer's mixer costs when it alone takes its attention's place.

All 30 layers of SmolLM2-135M-Instruct get mixers, trained for a few minutes by phases 1 and 2 (layers are independent
there). Then each mixer is put into the otherwise untouched teacher, one at a time, and the KL from the teacher is
measured on plain text and on the second half of text that repeats its first half: heads that copy (induction heads)
show only there. The recipe of `mohawk demo` converts the layers with the smallest sum, repeated text at 0.3.

    python benchmarks/layer_choice.py [--layers 15] [--run runs/layer_choice]
"""

import argparse
import json
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
REPEATED_WEIGHT = 0.3
ROWS, HALF = 4, 256  # of evaluated text: rows of 2 * HALF tokens


def trained_mixers(run: Path):
    """The student with every layer converted, after phases 1 and 2, and what was loaded to make it."""
    from rich.console import Console

    from mohawk import fetch
    from mohawk.convert import Conversion, convert
    from mohawk.demo import local_settings
    from mohawk.models.hybrid import HybridForCausalLM
    from mohawk.recipe import Recipe, shipped

    settings = local_settings(str(fetch.smollm2()))
    settings += ["student.ssm_layers=all", "phases.end_to_end=null", "phases.hidden.tokens=40960", f"output={run}"]
    settings += ["evaluation.contexts=[64]", "evaluation.tokens=4096"]
    recipe = Recipe.load(shipped("demo"), settings)
    convert(recipe)
    return Conversion(recipe, run, Console()), HybridForCausalLM.from_pretrained(run / "student").eval()


def measure(conversion, student) -> list[dict]:
    """KL in nats per token for each layer alone, on plain and on repeated text that was held out."""
    import torch
    from tqdm import tqdm

    from mohawk.data import PackedDataset

    teacher, autocast = conversion.teacher, conversion.autocast
    rows = PackedDataset(conversion.data.held_out, 2 * HALF, seed=1)
    plain = torch.stack([rows[i]["input_ids"] for i in range(ROWS)])
    texts = {"plain": plain, "repeated": torch.cat([plain[:, :HALF], plain[:, :HALF]], 1)}

    @torch.no_grad()
    def log_probs(ids):
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            logits = teacher(ids, use_cache=False).logits[:, HALF + 8 :]  # a copy is recognised after a few tokens
        return logits.float().log_softmax(-1)

    expected = {name: log_probs(ids) for name, ids in texts.items()}
    found = []
    for i, layer in enumerate(tqdm(teacher.model.layers, desc="layers", unit="layer")):
        attention, layer.self_attn = layer.self_attn, student.model.layers[i].self_attn
        row = {"layer": i}
        for name, ids in texts.items():
            p, q = expected[name], log_probs(ids)
            row[name] = (p.exp() * (p - q)).sum(-1).mean().item()
        layer.self_attn = attention
        found.append(row)
    return found


def chosen(rows: list[dict], count: int) -> list[int]:
    ranked = sorted(rows, key=lambda row: row["plain"] + REPEATED_WEIGHT * row["repeated"])
    return sorted(row["layer"] for row in ranked[:count])


def draw(rows: list[dict], layers: list[int], target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 3.4), layout="constrained")
    index = [row["layer"] for row in rows]
    for offset, (name, color) in enumerate((("plain", "#1f6feb"), ("repeated", "#d9730d"))):
        axis.bar([i + 0.38 * (offset - 0.5) for i in index], [row[name] for row in rows], 0.36, color=color, label=name)
    for i in layers:
        axis.axvspan(i - 0.5, i + 0.5, color="#8c959f", alpha=0.18, lw=0)
    axis.set_yscale("log")
    axis.set_xticks(index)
    axis.set_xlabel("layer whose attention is replaced (shaded: converted by the demo)")
    axis.set_ylabel("KL from the teacher, nats per token")
    axis.legend(title="text", frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=15, help="how many to choose")
    parser.add_argument("--run", type=Path, default=Path("runs/layer_choice"), help="folder of the training run")
    options = parser.parse_args()
    rows = measure(*trained_mixers(options.run))
    layers = chosen(rows, options.layers)
    for row in rows:
        mark = "convert" if row["layer"] in layers else ""
        print(f"layer {row['layer']:2}  plain {row['plain']:.4f}  repeated {row['repeated']:.4f}  {mark}")
    print("ssm_layers:", layers)
    RESULTS.mkdir(exist_ok=True)
    about = {"model": "SmolLM2-135M-Instruct", "repeated_weight": REPEATED_WEIGHT, "date": time.strftime("%Y-%m-%d")}
    text = json.dumps({"about": about, "rows": rows, "ssm_layers": layers}, indent=1)
    (RESULTS / "layer_choice.json").write_text(text + "\n")
    draw(rows, layers, RESULTS / "layer_choice.png")


if __name__ == "__main__":
    main()
