"""Time and state per generated token at growing contexts: the teacher, a hybrid and a pure state-space student.

SmolLM2-135M-Instruct, the demo's hybrid of it (15 of 30 layers are attention) and a student without attention, one
sequence, float32. The context is random tokens, prefilled in chunks, up to each length in turn; then single steps are
timed. Students are as `hybrid_from_teacher` makes them: training changes what they say, not how long they take. What
attention costs shows as growth: time per 1,000 tokens of context and attention layer, which is the same in teacher and
hybrid, and none in the pure student.

    python benchmarks/models/decode.py [--contexts 1024 4096 16384] [--steps 24]
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.pages import RESULTS, made_by, put_in_docs  # noqa: E402

CHUNK = 512
MIB = 2**20


def models(mixer: str):
    """(name, attention layers, model), one at a time, so that only one student lives beside the teacher."""
    from mohawk.conversion.recipe import Recipe
    from mohawk.demo import fetch
    from mohawk.loading.models import load_teacher
    from mohawk.models.from_teacher import hybrid_from_teacher
    from mohawk.schema.files import shipped

    teacher = load_teacher(fetch.smollm2())
    depth = teacher.config.num_hidden_layers
    yield "teacher", depth, teacher
    hybrid = Recipe.load(shipped("demo")).student.ssm_layers
    for name, layers in (("hybrid", hybrid), ("pure", "all")):
        student = hybrid_from_teacher(teacher, layers, mixer).eval()
        yield name, depth - len(student.config.ssm_layers), student


def measure(model, contexts: list[int], steps: int) -> list[dict]:
    """For each context, ascending: milliseconds of single steps after it, and the cache's bytes."""
    import torch

    from mohawk.measures.compare import cache_bytes
    from mohawk.models.call import CACHE

    generator = torch.Generator().manual_seed(0)
    cache, seen, rows = None, 0, []

    def run(ids):
        nonlocal cache, seen
        positions = torch.arange(seen, seen + ids.shape[1])[None]
        out = model(ids, position_ids=positions, use_cache=True, logits_to_keep=1, **{CACHE: cache})
        cache, seen = out[CACHE], seen + ids.shape[1]
        return out.logits[:, -1:].argmax(-1)

    for context in contexts:
        begin, start = time.perf_counter(), seen
        while seen < context:
            token = run(torch.randint(model.config.vocab_size, (1, min(CHUNK, context - seen)), generator=generator))
        prefill = (context - start) / (time.perf_counter() - begin)
        size, times = cache_bytes(cache), []
        for _ in range(steps + 2):
            begin = time.perf_counter()
            token = run(token)
            times.append(1000 * (time.perf_counter() - begin))
        lower, median, upper = statistics.quantiles(times[2:], n=4)  # the first steps warm up
        rows.append({
            "context": context, "ms_per_token": median, "ms_quartiles": [lower, upper], "state_bytes": size,
            "prefill_tokens_per_s": prefill,
        })  # fmt: skip
    return rows


def growth(rows: list[dict], attention_layers: int) -> float:
    """Microseconds a token and attention layer takes longer per 1,000 tokens of context (least squares)."""
    x = [r["context"] / 1000 for r in rows]
    slope = statistics.linear_regression(x, [r["ms_per_token"] for r in rows]).slope
    return 1000 * slope / max(attention_layers, 1)


def table(found: list[dict]) -> list[str]:
    contexts = [r["context"] for r in found[0]["rows"]]
    heads = [f"{c:,}" for c in contexts]
    lines = [
        "| model | attention layers | " + " | ".join(f"ms per token at {c}" for c in heads) + " | growth per attention "
        "layer and 1,000 tokens | " + " | ".join(f"state at {c}" for c in heads) + " |",
        "|---|---:|" + "---:|" * (2 * len(contexts) + 1),
    ]
    for f in found:
        slope = f"{f['growth_us']:.1f} µs" if f["attention_layers"] else f"none ({f['growth_us']:+.1f} µs in all)"
        times = " | ".join(f"{r['ms_per_token']:.1f}" for r in f["rows"])
        sizes = " | ".join(f"{r['state_bytes'] / MIB:.1f} MiB" for r in f["rows"])
        lines.append(f"| {f['model']} | {f['attention_layers']} | {times} | {slope} | {sizes} |")
    return lines


def draw(found: list[dict], target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (time_axis, size_axis) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for f in found:
        x = [r["context"] for r in f["rows"]]
        label = f"{f['model']}: {f['attention_layers']} attention layers"
        line = time_axis.plot(x, [r["ms_per_token"] for r in f["rows"]], marker="o", label=label)[0]
        low, high = zip(*(r["ms_quartiles"] for r in f["rows"]), strict=True)
        time_axis.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        size_axis.plot(x, [r["state_bytes"] / MIB for r in f["rows"]], marker="o")
    for axis, what in ((time_axis, "ms per token, median and quartiles"), (size_axis, "state, MiB")):
        axis.set(xlabel="context, tokens", ylabel=what, ylim=(0, None))
        axis.set_xticks([r["context"] for r in found[0]["rows"]], [f"{r['context']:,}" for r in found[0]["rows"]])
        axis.spines[["top", "right"]].set_visible(False)
    time_axis.legend(frameon=False)
    figure.savefig(target, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 16384], help="in tokens, ascending")
    parser.add_argument("--steps", type=int, default=24, help="timed single steps at each context")
    parser.add_argument("--mixer", choices=("mamba2", "discrete_mamba2"), default="mamba2")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the table, its JSON and the plot")
    options = parser.parse_args()
    if sorted(set(options.contexts)) != options.contexts or len(options.contexts) < 2:
        parser.error(f"--contexts: got {options.contexts}; give two or more lengths, ascending")
    import torch

    from mohawk.core.devices import machine

    found = []
    with torch.inference_mode():
        for name, attention_layers, model in models(options.mixer):
            rows = measure(model, options.contexts, options.steps)
            found.append({
                "model": name, "attention_layers": attention_layers, "growth_us": growth(rows, attention_layers),
                "parameters": sum(p.numel() for p in model.parameters()), "rows": rows,
            })  # fmt: skip
            print("\n".join(table(found)), flush=True)
    options.results.mkdir(parents=True, exist_ok=True)
    about = {"machine": machine(torch.device("cpu")), "mixer": options.mixer, "steps": options.steps,
             "chunk": CHUNK, "date": time.strftime("%Y-%m-%d")}  # fmt: skip
    lines = table(found)
    (options.results / "decode.json").write_text(json.dumps({"about": about, "models": found}, indent=1) + "\n")
    (options.results / "decode.md").write_text("\n".join(lines) + "\n")
    draw(found, options.results / "decode.png")
    if options.results == RESULTS:
        told = made_by(about["machine"], "models/decode.py")
        put_in_docs("decode", [*lines, "", told, "", "![decoding](benchmarks/results/decode.png)"])


if __name__ == "__main__":
    main()
