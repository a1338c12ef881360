"""Which method of distillation does most with the same tokens, each at its best of some learning rates?

A small Llama, trained here on State of the Union addresses, teaches students that start far from it (its every second
layer, whose logits are scaled until it is confidently wrong) and near it (all its layers but one). Each method is run
at three learning rates with seed 0, and at more while the best lies at the end of the grid; the best, by the KL on
held-out text, is run with two more seeds, and the table is of other addresses. A seed changes the order of the rows.

Runs are ordinary `mohawk distill` runs, stop and resume like one, and what is done is not done again; table, JSON and
plot go to benchmarks/results/, where rows of methods that are not asked for stay as they are.

    nice -n 10 python benchmarks/models/distillation_rates.py [--tokens 32768] [--methods ...] [--runs DIR]
"""

import argparse
import json
import math
import random
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.models.distillation import METHODS, ONLY_CE, TEXTS  # noqa: E402
from benchmarks.pages import RESULTS, made_by, put_in_docs  # noqa: E402

STARTS = {"far": 10.0, "near": 0.4}  # the KL that each start comes as close to as it can
VOCABULARY, LENGTH, ROWS = 2048, 128, 4
SHAPE = {
    "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 512, "tie_word_embeddings": True, "vocab_size": VOCABULARY,
}  # fmt: skip
RATES, STEP, EXTENSIONS, SEEDS = (3e-4, 1e-3, 3e-3), 3.0, 2, (0, 1, 2)
SMALL = [name for name, stage in METHODS.items() if "cache" not in stage and "scratch" not in stage]


def small_data(folder: Path) -> tuple[dict, list[Path]]:
    """The section of a recipe, and the addresses that are trained on: every sixth is the text of another source."""
    from mohawk.demo import fetch

    paths = sorted(fetch.state_of_the_union())
    random.Random(0).shuffle(paths)
    sides = {"evaluation": paths[::6], "train": [path for i, path in enumerate(paths) if i % 6]}
    folder.mkdir(parents=True, exist_ok=True)
    section: dict = {"validation_share": 0.05, "cache": str(folder / "tokens")}
    for side, files in sides.items():
        target = folder / f"{side}.jsonl"
        text = (file.read_text(encoding="utf-8") for file in files)
        pieces = (part[i : i + 4000] for part in text for i in range(0, len(part), 4000))
        target.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces), encoding="utf-8")
        section[side] = [str(target)]
    return section, sides["train"]


def small_recipe(teacher: str, student, data: dict, stage: dict, tokens: int, seed: int, output: Path):
    from mohawk.distillation.recipe import DistillRecipe

    return DistillRecipe.from_dict(
        {
            "teacher": teacher, "student": student, "data": data, "device": "cpu", "precision": "float32",
            "stages": [
                {
                    "tokens": tokens, "batch_size": ROWS, "sequence_length": LENGTH, "decay": 0.3, "save_every": 10**6,
                    "log_every": 10, **stage,
                }
            ],
            "evaluation": {
                "sequence_length": LENGTH, "batch_size": 16, "tokens": 8192, "contexts": [64], "decode_tokens": 2,
                "continuation_tokens": 2, "longest": None,
            },
            "seed": seed, "output": str(output),
        }
    )  # fmt: skip


def done(recipe) -> dict:
    """What a run found, which is run if it was not."""
    from mohawk.distillation.run import distill

    if not (Path(recipe.output) / "results.json").is_file():
        distill(recipe)
    return json.loads((Path(recipe.output) / "results.json").read_text(encoding="utf-8"))


def make_teacher(folder: Path, data: dict, files: list[Path], tokens: int) -> str:
    """A Llama of SHAPE with a byte-level BPE of its own, trained by cross entropy alone in the same trainer."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from mohawk.core.folders import write_whole

    made = folder / "untrained"
    if not made.is_dir():
        backend = ByteLevelBPETokenizer()
        backend.train([str(file) for file in files], VOCABULARY, special_tokens=["<end>"], show_progress=False)
        torch.manual_seed(0)
        with write_whole(made) as beside:
            LlamaForCausalLM(LlamaConfig(**SHAPE, bos_token_id=0, eos_token_id=0)).save_pretrained(beside)
            tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend._tokenizer, eos_token="<end>")
            tokenizer.save_pretrained(beside)
    stage = {**ONLY_CE, "learning_rate": 3e-3}
    done(small_recipe(str(made), str(made), data, stage, tokens, 0, folder / "trained"))
    return str(folder / "trained" / "student")


def make_start(start: str, teacher: str, data: dict, folder: Path) -> dict:
    """Writes the student of a start, once. What is told of it: layers, logits' scale, and KL on some training rows.

    far: the factor of the logits that brings the KL of every second layer to STARTS, by halving.
    near: the layer to leave out whose absence is nearest to it.
    """
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    from mohawk.core.folders import write_whole

    if (folder / "start.json").is_file():
        return json.loads((folder / "start.json").read_text(encoding="utf-8"))
    whole, tokenizer = LlamaForCausalLM.from_pretrained(teacher).eval(), AutoTokenizer.from_pretrained(teacher)
    with open(data["train"][0], encoding="utf-8") as file:
        rows = [tokenizer(json.loads(next(file))["text"])["input_ids"][:LENGTH] for _ in range(16)]
    ids = torch.tensor([row for row in rows if len(row) == LENGTH])  # the end of an address may be short

    @torch.no_grad()
    def logits(model) -> torch.Tensor:
        return model(ids).logits.double()

    theirs = logits(whole).log_softmax(-1)

    def kl(of: torch.Tensor) -> float:
        return (theirs.exp() * (theirs - of.log_softmax(-1))).sum(-1).mean().item()

    def cut(layers: list[int]):
        config = type(whole.config)(**{**whole.config.to_dict(), "num_hidden_layers": len(layers)})
        student = LlamaForCausalLM(config).eval()
        student.load_state_dict(whole.state_dict(), strict=False)
        for i, layer in enumerate(layers):
            student.model.layers[i].load_state_dict(whole.model.layers[layer].state_dict())
        return student

    count, scale = len(whole.model.layers), 1.0
    if start == "far":
        layers = list(range(0, count, 2))
        student = cut(layers)
        found, low, high = logits(student), 1.0, 64.0
        for _ in range(20):
            scale = math.sqrt(low * high)
            low, high = (low, scale) if kl(scale * found) > STARTS[start] else (scale, high)
        student.model.norm.weight.data *= scale
    else:
        ways = [[i for i in range(count) if i != left] for left in range(count)]
        layers = min(ways, key=lambda way: abs(kl(logits(cut(way))) - STARTS[start]))
        student = cut(layers)
    about = {"layers": layers, "scale": scale, "kl": kl(logits(student)), "parameters": student.num_parameters()}
    with write_whole(folder) as beside:
        student.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        (beside / "start.json").write_text(json.dumps(about), encoding="utf-8")
    return about


def best_rate(by_rate: dict[float, float]) -> float:
    """That of the lowest KL; where nothing is finite, the lowest rate."""
    return min(by_rate, key=lambda rate: (by_rate[rate] if math.isfinite(by_rate[rate]) else math.inf, rate))


def next_rate(by_rate: dict[float, float]) -> float | None:
    """The rate beyond the end of the grid at which the best lies; None where it lies within, or the grid is wide."""
    if len(by_rate) >= len(RATES) + EXTENSIONS:
        return None
    best = best_rate(by_rate)
    if best == max(by_rate):
        return float(f"{best * STEP:.0e}")
    return float(f"{best / STEP:.0e}") if best == min(by_rate) else None


def swept(method: str, run) -> dict:
    """A method's runs from a start. run(rate, seed) tells the KL and so on of TEXTS."""
    found = {(rate, 0): run(rate, 0) for rate in RATES}
    while True:
        held = {rate: float(texts["held_out"]["kl"]) for (rate, _), texts in found.items()}
        more = next_rate(held)
        if more is None:
            break
        found[more, 0] = run(more, 0)
    best = best_rate(held)
    found |= {(best, seed): run(best, seed) for seed in SEEDS[1:]}
    runs = [{"learning_rate": rate, "seed": seed, "texts": texts} for (rate, seed), texts in sorted(found.items())]
    return {"method": method, "learning_rate": best, "at_end": best in (min(held), max(held)), "runs": runs}


def spread(row: dict, key: str, text: str = "evaluation") -> tuple[float, float]:
    """Mean and standard deviation over the seeds at the best rate."""
    values = [float(r["texts"][text][key]) for r in row["runs"] if r["learning_rate"] == row["learning_rate"]]
    return statistics.fmean(values), statistics.stdev(values)


def swept_table(start: str, about: dict, rows: list[dict]) -> list[str]:
    told = about["starts"][start]
    scaled = f", logits times {told['scale']:.1f}" if told["scale"] != 1 else ""
    lines = [
        f"**{start.capitalize()}**: layers {', '.join(map(str, told['layers']))}{scaled}; KL {told['before']:.2f} "
        "before training",
        "",
        "| method | KL (nats) | perplexity ratio | same top token | learning rate |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        kl, ratio, top = (spread(row, key) for key in ("kl", "perplexity_ratio", "top1_agreement"))
        end = " (end of the grid)" if row["at_end"] else ""
        lines.append(
            f"| {row['method']} | {kl[0]:.3f} ± {kl[1]:.3f} | {ratio[0]:.3f} ± {ratio[1]:.3f} | {top[0]:.1%} ± "
            f"{top[1]:.1%} | {row['learning_rate']:g}{end} |"
        )
    return lines


def draw_rates(found: dict[str, list[dict]], target: Path) -> None:
    """A panel for each start: KL on the text of the table by learning rate, seed 0, a curve for each method."""
    from mohawk.runs.figures import log_axis, save, subplots

    figure, axes = subplots(1, len(found), width=6.2, height=4.6)
    for axis, (start, rows) in zip(axes[0], found.items(), strict=True):
        for i, row in enumerate(rows):
            runs = [r for r in row["runs"] if r["seed"] == 0]
            rates, kls = ([r["learning_rate"] for r in runs], [float(r["texts"]["evaluation"]["kl"]) for r in runs])
            colour = {"color": f"C{i % 10}", "marker": "osv^Dp*XP<"[i % 10]}
            axis.plot(rates, kls, linewidth=1.2, markersize=4, label=row["method"], **colour)
            best = rates.index(row["learning_rate"])
            axis.plot(rates[best], kls[best], markersize=9, linestyle="none", **colour)
        axis.set_xscale("log")
        log_axis(axis)
        axis.set_xlabel("learning rate (large: the one that held-out text chose)")
        axis.set_ylabel("mean KL(teacher ‖ student), nats per token")
        axis.set_title(f"{start} start")
    axes[0][-1].legend(fontsize=7.5)
    save(figure, target)


def sweep(options: argparse.Namespace) -> None:
    """All starts and methods, and what they leave: table, JSON and plot."""
    runs = options.runs / str(options.teacher_tokens)
    data, files = small_data(runs / "data")
    teacher = make_teacher(runs / "teacher", data, files, options.teacher_tokens)
    path = options.results / "distillation_rates.json"
    about = {"tokens": options.tokens, "teacher_tokens": options.teacher_tokens, "date": time.strftime("%Y-%m-%d")}
    about |= {"starts": {}, "teacher_parameters": 0}
    old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"about": {}, "starts": {}}
    fits = all(old["about"].get(key) == about[key] for key in ("tokens", "teacher_tokens"))
    found: dict[str, list[dict]] = {}
    lines: list[str] = []
    for start in STARTS:
        student = runs / f"{start}-start"
        about["starts"][start] = make_start(start, teacher, data, student)
        rows = {row["method"]: row for row in old["starts"].get(start, [])} if fits else {}
        last: dict = {}

        def run(method: str, rate: float, seed: int, start=start, student=student, last=last) -> dict:
            name = f"{method.replace(', ', '-').replace(' ', '-').replace('+', 'and')}-{rate:g}-{seed}"
            stage = {**METHODS[method], "learning_rate": rate}
            recipe = small_recipe(
                teacher, str(student), data, stage, options.tokens, seed, runs / start / str(options.tokens) / name
            )
            last.update(done(recipe))
            texts = list(last["evaluation"].values())[-1]
            print(start, name, {text: round(float(texts[text]["kl"]), 4) for text in TEXTS}, flush=True)
            return {text: texts[text] for text in TEXTS}

        for method in options.methods:
            rows[method] = swept(method, lambda rate, seed, method=method: run(method, rate, seed))
        about["starts"][start]["before"] = float(last["evaluation"]["before"]["evaluation"]["kl"])
        about |= {"machine": last["machine"], "teacher_parameters": last["parameters"]["teacher"]}
        found[start] = sorted(rows.values(), key=lambda row: SMALL.index(row["method"]))
        lines += [*swept_table(start, about, found[start]), ""]
    lines = [
        f"A Llama of {SHAPE['num_hidden_layers']} layers, width {SHAPE['hidden_size']} and {VOCABULARY:,} tokens "
        f"({about['teacher_parameters'] / 1e6:.1f}M parameters), trained here on {options.teacher_tokens:,} tokens; "
        f"{options.tokens:,} tokens a run. Mean ± standard deviation of {len(SEEDS)} seeds, on other addresses, at the "
        "rate that did best on held-out text with the first seed:",
        "", *lines,
        made_by(about["machine"], f"models/distillation_rates.py --tokens {options.tokens}"), "",
        "![KL by learning rate](distillation_rates.png)",
    ]  # fmt: skip
    print("\n".join(lines))
    options.results.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"about": about, "starts": found}, indent=1) + "\n", encoding="utf-8")
    draw_rates(found, options.results / "distillation_rates.png")
    if options.results == RESULTS:
        put_in_docs("distillation_rates", lines)
    else:
        (options.results / "distillation_rates.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32_768, help="that every method trains on")
    parser.add_argument("--teacher-tokens", type=int, default=1_000_000, help="that the teacher is trained on")
    parser.add_argument("--methods", nargs="+", choices=SMALL, default=SMALL)
    parser.add_argument("--runs", type=Path, default=Path("runs/distillation_rates"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the table, its JSON and the plot")
    sweep(parser.parse_args())


if __name__ == "__main__":
    main()
