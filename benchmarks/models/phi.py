"""MOHAWK on Phi's architecture: a small Phi, trained here on real text, and what each phase adds on it.

No Phi checkpoint can be had from the package registry, so a Phi of four layers is trained from scratch on the State of
the Union addresses for a few minutes. Its vocabulary is small: tokens are pieces of words, which only attention puts
together, so that a model needs its attention early in its training (the results say what KL random mixers in its place
cost, and what the model gains from reading a passage twice). Every layer's attention then becomes discrete Mamba-2, as
in recipes/phi-mamba.yaml, by phase 3 alone, phases 2 and 3, and all three, each with the same number of training tokens
in all, from attention's weights and from random mixers, with several seeds of mixers and of the order of the text, and
with several learning rates of phase 3, of which each schedule's best one counts. Runs are plain `mohawk convert` runs
and resume; table, JSON and plot go to benchmarks/results/.

    python benchmarks/models/phi.py [--teacher-tokens 2000000] [--tokens 65536] [--seeds 2] [--rates 3e-3 1e-3 3e-4]
"""

import argparse
import itertools
import json
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.models.ablation import INITS, SCHEDULES  # noqa: E402
from benchmarks.pages import RESULTS, made_by, put_in_docs  # noqa: E402

VOCABULARY, WIDTH, LAYERS, HEADS, LENGTH = 512, 128, 4, 4, 256
BATCH = 8  # rows of LENGTH tokens in a step of the teacher's training
ROWS = {"mixing": 1, "hidden": 2, "end_to_end": 4}  # of a student's step: few, so that a short phase has steps enough
LEARNING_RATES = {"mixing": 5e-3, "hidden": 2e-3}
# Phase 3's, of which each schedule is given its best one: what phase 3 alone needs undoes some of what phase 2 reached
LAST_RATES = (3e-3, 1e-3, 3e-4)


def texts() -> tuple[list[str], list[str]]:
    """(patterns to train on, files of another source to evaluate on)."""
    from mohawk.demo import fetch

    return [f"{fetch.state_of_the_union()[0].parent}/*.txt"], [str(path) for path in fetch.proceedings()]


def train_tokenizer(patterns: list[str]):
    """Byte-level BPE of VOCABULARY tokens, the kind Phi has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    files = [str(path) for pattern in patterns for path in Path(pattern).parent.glob(Path(pattern).name)]
    backend.train(sorted(files), trainer)
    ends = dict(bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    return PreTrainedTokenizerFast(tokenizer_object=backend, **ends)


def train_teacher(folder: Path, tokens: float) -> None:
    """A Phi trained on so many tokens, saved with its tokenizer and what its training took."""
    import torch
    from transformers import PhiConfig, PhiForCausalLM

    from mohawk.core.folders import write_whole
    from mohawk.core.precision import autocast_dtype
    from mohawk.data.packing import PackedDataset, collate, load_data

    train, _ = texts()
    tokenizer = train_tokenizer(train)
    data = load_data(train, tokenizer, validation_share=0.02)  # the share that recipe_for holds out too
    rows = PackedDataset(data.train, LENGTH, tokens=1e9, seed=1)
    torch.manual_seed(0)
    end = tokenizer.eos_token_id
    config = PhiConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, max_position_embeddings=2048, bos_token_id=end, eos_token_id=end,
    )  # fmt: skip
    model = PhiForCausalLM(config).train()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    dtype = autocast_dtype("auto", torch.device("cpu"))
    steps, recent = math.ceil(tokens / (BATCH * LENGTH)), []
    for step in range(steps):
        for group in optimizer.param_groups:  # warmup over the first 50 steps, linear decay over the second half
            group["lr"] = 2e-3 * min(1, (step + 1) / 50, 2 * (1 - step / steps))
        batch = collate([rows[i] for i in range(step * BATCH, (step + 1) * BATCH)])
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            loss = model(
                batch["input_ids"], position_ids=batch["position_ids"], labels=batch["labels"], use_cache=False
            ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent = [*recent[-19:], loss.item()]
        if (step + 1) % 20 == 0:
            print(f"teacher: step {step + 1} of {steps}, loss {sum(recent) / len(recent):.3f}", flush=True)
    about = {"steps": steps, "tokens": steps * BATCH * LENGTH, "loss": sum(recent) / len(recent)}
    about["readings"] = loss_by_reading(model.eval(), data.held_out)
    with write_whole(folder, replace=True) as beside:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        (beside / "training.json").write_text(json.dumps(about))


def loss_by_reading(model, held_out, passages: int = 16) -> list[float]:
    """Nats a token on passages of half a row, read for the first and, right after, for the second time."""
    import torch

    from mohawk.data.packing import PackedDataset

    half, losses = LENGTH // 2, []
    rows = PackedDataset(held_out, half, tokens=passages * half, seed=0)
    for i in range(min(passages, len(rows))):
        ids = torch.as_tensor(rows[i]["input_ids"]).repeat(2)[None]
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[0, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
    mean = torch.stack(losses).mean(0)
    return [mean[: half - 1].mean().item(), mean[half:].mean().item()]


def recipe_for(
    teacher: Path, init: str, schedule: dict[str, float], tokens: float, last_rate: float, seed: int, output: Path
):
    """The shipped recipe's student and phases at this teacher's size, with this text and these budgets."""
    from mohawk.conversion.recipe import Recipe
    from mohawk.schema.files import shipped

    train, evaluation = texts()
    phases: dict[str, dict | None] = {}
    paper = Recipe.load(shipped("phi-mamba"))
    for name, phase in paper.phases.active():
        budget, rate = int(tokens * schedule.get(name, 0)), LEARNING_RATES.get(name, last_rate)
        small = dict(
            tokens=budget, batch_size=ROWS[name], sequence_length=LENGTH, learning_rate=rate,
            gradient_accumulation=1,
        )  # fmt: skip
        phases[name] = {**phase.model_dump(mode="json"), **small} if budget else None
    return Recipe.from_dict(
        {
            "teacher": str(teacher),
            "student": {**paper.student.model_dump(mode="json"), "init": init},
            "data": {"train": train, "evaluation": evaluation, "validation_share": 0.02},
            "phases": phases,
            "evaluation": {"sequence_length": LENGTH, "contexts": [256], "decode_tokens": 2, "tokens": 8192},
            "seed": seed,
            "output": str(output),
        }
    )


def row(init: str, name: str, last_rate: float, seed: int, run: Path) -> dict:
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    stages = list(results["evaluation"].values())
    return {
        "init": init,
        "phases": name,
        "last_rate": last_rate,
        "seed": seed,
        "texts": {
            text: {**{key: stages[-1][text][key] for key in found}, "kl_before": stages[0][text]["kl"]}
            for text, found in stages[-1].items()
        },
        "tokens": {phase: found["tokens"] for phase, found in results["phases"].items()},
        "machine": results["machine"],
    }  # fmt: skip


def mean_of(rows: list[dict], init: str, name: str, text: str, key: str) -> tuple[float, float]:
    """Over the seeds: the mean, and half of the way from the least to the most."""
    values = [float(r["texts"][text][key]) for r in rows if (r["init"], r["phases"]) == (init, name)]
    return sum(values) / len(values), (max(values) - min(values)) / 2


def best(rows: list[dict]) -> list[dict]:
    """Of each start and schedule the runs with the rate of phase 3 that leaves less KL on held-out addresses."""
    kept = []
    for init in INITS:
        for name in SCHEDULES:
            own = {
                rate: [r for r in rows if (r["init"], r["phases"], r["last_rate"]) == (init, name, rate)]
                for rate in {r["last_rate"] for r in rows}
            }
            means = {rate: mean_of(found, init, name, "held_out", "kl")[0] for rate, found in own.items() if found}
            if means:
                kept += own[min(means, key=means.get)]
    return kept


def table(rows: list[dict], teacher: dict, tokens: float) -> str:
    of = {text: rows[0]["texts"][text]["teacher_perplexity"] for text in rows[0]["texts"]}
    perplexities = ", ".join(f"{value:.2f} on {text.replace('_', '-')} text" for text, value in of.items())
    first, second = teacher["readings"]
    seeds = sorted({r["seed"] for r in rows})
    tried = ", ".join(f"{rate:g}" for rate in sorted({r["last_rate"] for r in rows}))
    rows = best(rows)
    rates = {(r["init"], r["phases"]): r["last_rate"] for r in rows}
    lines = [
        f"A Phi of {LAYERS} layers, width {WIDTH}, a vocabulary of {VOCABULARY}, trained here on {teacher['tokens']:,} "
        f"tokens of State of the Union addresses (perplexity {perplexities}; {first:.2f} nats a token of a held-out "
        f"passage, {second:.2f} when it comes again); all layers become discrete_mamba2, {tokens:,.0f} training tokens "
        f"a run, phase 3 at the best of the rates {tried}. Means over seeds {', '.join(map(str, seeds))}, ± "
        "half their range.",
        "",
        "| init | phases | phase 3's rate | held-out addresses: KL (nats) | perplexity ratio | KL before | "
        "another source: KL (nats) | perplexity ratio | KL before |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for init in INITS:
        for name in SCHEDULES:
            if (init, name) not in rates:
                continue
            cells = []
            for text in ("held_out", "evaluation"):
                kl, spread = mean_of(rows, init, name, text, "kl")
                ratio, _ = mean_of(rows, init, name, text, "perplexity_ratio")
                before, _ = mean_of(rows, init, name, text, "kl_before")
                cells.append(f"{kl:.4f} ± {spread:.4f} | {ratio:.3f} | {before:.2f}")
            lines.append(f"| {init} | {name} | {rates[init, name]:g} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(verdict(rows, init) for init in INITS)]) + "\n"


def verdict(rows: list[dict], init: str) -> str:
    """Whether more phases were better, in words, from the numbers."""
    own: dict[int, dict[str, float]] = {}
    for r in rows:
        if r["init"] == init:
            own.setdefault(r["seed"], {})[r["phases"]] = r["texts"]["held_out"]["kl"]
    whole = {seed: by_name for seed, by_name in own.items() if len(by_name) == len(SCHEDULES)}
    if not whole:
        return f"From {init} initialisation: not all runs are done."
    means = {name: sum(by_name[name] for by_name in whole.values()) / len(whole) for name in SCHEDULES}
    said = " < ".join(f"{name} ({means[name]:.4f})" for name in sorted(means, key=means.get))
    paper = ["1-2-3", "2-3", "3"]
    same = sorted(means, key=means.get) == paper
    found = "the order of the paper and of benchmarks/models/ablation.py" if same else "not the order of the paper"
    times = sum(sorted(by_name, key=by_name.get) == paper for by_name in whole.values())
    return (
        f"From {init} initialisation, KL on held-out addresses, best first: {said}: {found}, which {times} of "
        f"{len(whole)} seeds have."
    )


def draw(rows: list[dict], target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    titles = {"held_out": "held-out addresses", "evaluation": "text of another source"}
    for axis, (text, title) in zip(axes, titles.items(), strict=True):
        for offset, init in enumerate(INITS):
            found = [mean_of(best(rows), init, name, text, "kl") for name in SCHEDULES]
            x = [i + 0.38 * (offset - 0.5) for i in range(len(found))]
            values, spread = zip(*found, strict=True)
            bars = axis.bar(x, values, yerr=spread, capsize=3, width=0.36, label=f"{init} initialisation")
            axis.bar_label(bars, fmt="%.3f", fontsize=8)
        axis.set_xticks(range(len(SCHEDULES)), [f"phase{'s' * (len(name) > 1)} {name}" for name in SCHEDULES])
        axis.set_title(title)
        axis.margins(y=0.2)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("KL(teacher ‖ student), nats per token")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle("A small Phi: the same tokens, with and without phases 1 and 2")
    figure.savefig(target, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher-tokens", type=float, default=2e6, help="training tokens of the teacher")
    parser.add_argument("--tokens", type=float, default=65536, help="training tokens of each run")
    parser.add_argument("--seeds", type=int, default=2, help="how many, from 0 on")
    parser.add_argument("--rates", type=float, nargs="+", default=LAST_RATES, help="of phase 3's learning")
    parser.add_argument("--runs", type=Path, default=Path("runs/phi"), help="folder of the teacher and the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of table, JSON and plot")
    options = parser.parse_args()
    from mohawk.conversion.run import convert

    teacher = options.runs / "teacher"
    if not (teacher / "training.json").is_file():
        train_teacher(teacher, options.teacher_tokens)
    about = json.loads((teacher / "training.json").read_text())
    rows = []
    for seed in range(options.seeds):
        for init in INITS:
            for name, rate in itertools.product(SCHEDULES, options.rates):
                run = options.runs / f"{init}-{name}-rate-{rate:g}-seed-{seed}"
                if not (run / "results.json").is_file():
                    convert(recipe_for(teacher, init, SCHEDULES[name], options.tokens, rate, seed, run))
                rows.append(row(init, name, rate, seed, run))
                print(table(rows, about, options.tokens), flush=True)
    options.results.mkdir(parents=True, exist_ok=True)
    budgets = f"--teacher-tokens {options.teacher_tokens:.0f} --tokens {options.tokens:.0f} --seeds {options.seeds}"
    budgets += f" --rates {' '.join(f'{rate:g}' for rate in options.rates)}"
    found = {"about": {"tokens": options.tokens, "teacher": about, "date": time.strftime("%Y-%m-%d")}, "rows": rows}
    (options.results / "phi.json").write_text(json.dumps(found, indent=1) + "\n")
    text = f"{table(rows, about, options.tokens)}\n{made_by(rows[0]['machine'], f'models/phi.py {budgets}')}\n"
    (options.results / "phi.md").write_text(text)
    if options.results == RESULTS:
        put_in_docs("phi", text.splitlines())
    draw(rows, options.results / "phi.png")


if __name__ == "__main__":
    main()
