"""Encoders: a small BERT, trained here on real text, and what each way of distilling it leaves at equal tokens.

The package registry has no BERT with its head for masked words, so one of four layers is trained from scratch on the
State of the Union addresses for a few minutes, and then, with a new head, to tell the century's third that a paragraph
is from. Students are its every second layer (DistilBERT's start), or random weights of that shape. Runs are plain
`mohawk distill` runs and resume; table and JSON go to benchmarks/results/.

    python benchmarks/models/encoders.py [--teacher-tokens 1500000] [--tokens 131072]
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.pages import RESULTS, made_by  # noqa: E402

VOCABULARY, WIDTH, LAYERS, HEADS, LENGTH, BATCH = 1024, 128, 4, 4, 64, 16
PERIODS = {"to 1860": 1860, "1861 to 1940": 1940, "since 1941": 3000}
CHECKPOINT = {"batch_size": BATCH, "sequence_length": LENGTH, "warmup": 0.1, "decay": 0.5, "learning_rate": 1e-3}
HIDDEN = {"layers": [[1, 3]], "loss": "cosine"}
EVERY = {"layers": "every_second"}
SCRATCH = {**EVERY, "scratch": True}
# name -> the student, and the stages with their shares of the tokens
MASKED = {
    "random weights, cross entropy": (SCRATCH, [(1, {"kd_weight": 0, "ce_weight": 1})]),
    "every second layer, cross entropy": (EVERY, [(1, {"kd_weight": 0, "ce_weight": 1})]),
    "forward KL at masked words": (EVERY, [(1, {})]),
    "DistilBERT: KL everywhere, words, cosine": (
        EVERY, [(1, {"temperature": 2, "kd_weight": 5, "kd_on": "all", "ce_weight": 2, "hidden": HIDDEN})],
    ),
    "TinyBERT: layers, then KL": (
        EVERY, [(0.5, {"kd_weight": 0, "hidden": {"embeddings": True}, "attention": {"metric": "scores"}}), (0.5, {})],
    ),
    "MiniLM v2: relations, then KL": (EVERY, [(0.5, {"kd_weight": 0, "relations": {"heads": 8}}), (0.5, {})]),
}  # fmt: skip
CLASSES = {
    "every second layer, cross entropy": (EVERY, [(1, {"kd_weight": 0, "ce_weight": 1})]),
    "forward KL": (EVERY, [(1, {})]),
    "TinyBERT: layers, then KL": MASKED["TinyBERT: layers, then KL"],
}


def tokenizer_of(files: list[Path]):
    """WordPiece of VOCABULARY pieces, BERT's kind."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizerFast

    made = BertWordPieceTokenizer(lowercase=True)
    made.train([str(path) for path in files], vocab_size=VOCABULARY, show_progress=False)
    return BertTokenizerFast(tokenizer_object=made._tokenizer, model_max_length=LENGTH)


def write_rows(files: list[Path], target: Path) -> None:
    """Paragraphs with the period that they are from, as many of each."""
    import random

    by_period: dict[str, list[str]] = {period: [] for period in PERIODS}
    for path in files:
        period = next(name for name, last in PERIODS.items() if int(path.name[:4]) <= last)
        blocks = path.read_text(encoding="utf-8").split("\n")
        by_period[period] += [block.strip() for block in blocks if 100 < len(block) < 600]
    draw, least = random.Random(0), min(1500, *map(len, by_period.values()))
    rows = [{"text": text, "label": name} for name, of in by_period.items() for text in draw.sample(of, least)]
    draw.shuffle(rows)
    target.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run(teacher: str, student, stages, task: str, data: list[str], tokens: float, output: Path) -> dict:
    """A distillation's results."""
    from mohawk.distillation.recipe import DistillRecipe
    from mohawk.distillation.run import distill

    made = [
        {**CHECKPOINT, "name": f"stage-{i}", "tokens": int(share * tokens), **settings}
        for i, (share, settings) in enumerate(stages)
    ]
    if not (output / "results.json").is_file():
        recipe = DistillRecipe.from_dict(
            {
                "task": task, "teacher": teacher, "student": student, "stages": made, "device": "cpu",
                "data": {"train": data, "validation_share": 0.05}, "output": str(output),
                "evaluation": {"sequence_length": LENGTH, "tokens": 16384, "batch_size": 32},
            }
        )  # fmt: skip
        distill(recipe)
    return json.loads((output / "results.json").read_text(encoding="utf-8"))


def make_teachers(folder: Path, files: list[Path], rows: Path, tokens: float) -> tuple[str, str]:
    """(the one of masked words, the one of classes), each trained by its labels alone in the same trainer."""
    import torch
    from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

    from mohawk.core.folders import write_whole

    shape = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    shape |= {"intermediate_size": 4 * WIDTH, "max_position_embeddings": LENGTH, "vocab_size": VOCABULARY}
    tokenizer, made = tokenizer_of(files), folder / "untrained"
    if not made.is_dir():
        torch.manual_seed(0)
        with write_whole(made) as beside:
            BertForMaskedLM(BertConfig(**shape)).save_pretrained(beside)
            tokenizer.save_pretrained(beside)
    labels = [(1, {"kd_weight": 0, "ce_weight": 1})]
    given = f"{files[0].parent}/*.txt"
    run(str(made), str(made), labels, "masked_lm", [given], tokens, folder / "masked")
    words = folder / "masked" / "student"
    shaped = folder / "classes-untrained"
    if not shaped.is_dir():
        names = dict(enumerate(PERIODS))
        config = BertConfig(**shape, id2label=names, label2id={name: i for i, name in names.items()})
        torch.manual_seed(0)
        model = BertForSequenceClassification(config)
        body = {k: v for k, v in BertForMaskedLM.from_pretrained(words).state_dict().items() if k.startswith("bert.")}
        model.load_state_dict(body, strict=False)
        with write_whole(shaped) as beside:
            model.save_pretrained(beside)
            tokenizer.save_pretrained(beside)
    run(str(shaped), str(shaped), labels, "classification", [str(rows)], tokens / 4, folder / "classes")
    return str(words), str(folder / "classes" / "student")


def last(results: dict) -> dict:
    return list(results["evaluation"].values())[-1]["held_out"]


def table(found: dict[str, dict[str, dict]], tokens: dict[str, float]) -> list[str]:
    lines = []
    for task, runs in found.items():
        first = last(next(iter(runs.values())))
        if task == "masked_lm":
            about = f"perplexity of masked words {first['teacher_perplexity']:.2f}"
            header = ["perplexity", "ratio", "KL (nats)", "same word"]
            keys = ["student_perplexity", "perplexity_ratio", "kl", "top1_agreement"]
        else:
            about = ", ".join(
                f"{name} {first[f'teacher_{key}']:.3f}"
                for name, key in (("accuracy", "accuracy"), ("F1", "f1"), ("ROC-AUC", "roc_auc"))
            )
            header = ["accuracy", "F1", "ROC-AUC", "KL (nats)"]
            keys = ["student_accuracy", "student_f1", "student_roc_auc", "kl"]
        lines += [
            f"**{task}**, {tokens[task]:,.0f} training tokens a run; the teacher's {about}, on "
            f"{first['tokens']:,} held-out {'words' if task == 'masked_lm' else 'paragraphs'}", "",
            f"| student | {' | '.join(header)} |", "|---" * (len(header) + 1) + "|",
        ]  # fmt: skip
        for name, results in runs.items():
            cells = [f"{last(results)[key]:.3f}" for key in keys]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher-tokens", type=float, default=1.5e6, help="training tokens of the teacher")
    parser.add_argument("--tokens", type=float, default=131072, help="training tokens of each run")
    parser.add_argument("--runs", type=Path, default=Path("runs/encoders"), help="folder of the teachers and the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of table and JSON")
    options = parser.parse_args()
    from mohawk.demo import fetch

    begin, files = time.process_time(), fetch.state_of_the_union()
    options.runs.mkdir(parents=True, exist_ok=True)
    rows = options.runs / "paragraphs.jsonl"
    if not rows.is_file():
        write_rows(files, rows)
    words, classes = make_teachers(options.runs / "teachers", files, rows, options.teacher_tokens)
    budgets = {"masked_lm": options.tokens, "classification": options.tokens / 2}
    found: dict[str, dict[str, dict]] = {}
    for task, of, teacher, data in (
        ("masked_lm", MASKED, words, f"{files[0].parent}/*.txt"),
        ("classification", CLASSES, classes, str(rows)),
    ):
        for i, (name, (student, stages)) in enumerate(of.items()):
            output = options.runs / f"{task}-{i}"
            found.setdefault(task, {})[name] = run(teacher, student, stages, task, [data], budgets[task], output)
    text = [
        f"A BERT of {LAYERS} layers, width {WIDTH}, {VOCABULARY:,} word pieces, trained here on "
        f"{options.teacher_tokens:,.0f} tokens of State of the Union addresses, and on a quarter as many to tell "
        f"which of {len(PERIODS)} periods a paragraph is from; students of {LAYERS // 2} layers; one seed and rate.",
        "", *table(found, budgets),
    ]  # fmt: skip
    first = next(iter(found["masked_lm"].values()))
    command = f"models/encoders.py --teacher-tokens {options.teacher_tokens:.0f} --tokens {options.tokens:.0f}"
    text.append(made_by(first["machine"], command))
    print("\n".join(text))
    seconds = math.ceil(time.process_time() - begin)
    kept = {task: {name: last(results) for name, results in runs.items()} for task, runs in found.items()}
    about = {"tokens": budgets, "teacher_tokens": options.teacher_tokens, "cpu_seconds": seconds}
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "encoders.json").write_text(json.dumps({"about": about, "runs": kept}, indent=1) + "\n")
    (options.results / "encoders.md").write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
