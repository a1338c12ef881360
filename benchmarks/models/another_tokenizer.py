"""A teacher with another tokenizer: SmolLM2-135M-Instruct teaches a small Llama whose vocabulary is trained here.

The student has random weights and 4,096 tokens of its own, trained with `tokenizers` on State of the Union addresses.
It learns from pieces of addresses by cross entropy alone, or with `align: spans` or `align: uld` beside it at a weight
of 1, each at the better of two learning rates; all see the same rows, equally often. Bits per byte are of other
addresses.
The teacher's top 128 are cached once, as `mohawk cache` does.

    nice -n 5 python benchmarks/models/another_tokenizer.py [--bytes 400000] [--passes 3] [--threads 1]
"""

import argparse
import json
import math
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.pages import RESULTS, made_by, put_in_docs  # noqa: E402

ENTRIES, LENGTH, ROWS, K = 4096, 256, 8, 128
PIECE = 4000  # characters of an address that are a document
RATES = (1e-3, 3e-3)
SHAPE = {
    "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 1024, "tie_word_embeddings": True,
}  # fmt: skip
WAYS = {"cross entropy alone": None, "and spans": "spans", "and uld": "uld"}


def pieces(wanted: int, held_out: int) -> tuple[list[str], list[str]]:
    """Documents to train on and to measure on, of different addresses, of about so many bytes."""
    from mohawk.demo import fetch

    paths = fetch.state_of_the_union()
    random.Random(0).shuffle(paths)
    found: list[list[str]] = [[], []]
    for side, most in ((1, held_out), (0, wanted)):
        while paths and sum(map(len, found[side])) < most:
            text = paths.pop().read_text(encoding="utf-8")
            found[side] += [text[i : i + PIECE] for i in range(0, len(text), PIECE)]
    return tuple(found)


def vocabulary(texts: list[str]):
    """A byte-level BPE of our own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=ENTRIES, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def packed(texts: list[str], tokenizer, folder: Path):
    """Rows of some documents."""
    from mohawk.data.packing import PackedDataset, load_data

    folder.mkdir()
    file = folder / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    data = load_data([{"source": str(file)}], tokenizer, validation_share=0, cache=folder / "tokens")
    return PackedDataset(data.train, LENGTH, seed=0)


def trained(rows, teacher, tokenizer, held_out, rate: float, passes: int) -> dict:
    """One student's bits per byte, and its loss at the end."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from mohawk import KnowledgeDistiller
    from mohawk.data.packing import collate
    from mohawk.measures.alone import alone

    torch.manual_seed(0)
    student = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SHAPE))
    distiller = KnowledgeDistiller(teacher, student, kd_weight=0.0 if teacher is None else 1.0, ce_weight=1.0)
    optimizer = torch.optim.AdamW(student.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    order = [i for k in range(passes) for i in random.Random(k).sample(range(len(rows)), len(rows))]
    steps = len(order) // ROWS
    begin, tokens = time.process_time(), 0
    for step in range(steps):
        batch = collate([rows[i] for i in order[step * ROWS : (step + 1) * ROWS]])
        for group in optimizer.param_groups:  # a tenth to warm up, then down to nothing as a cosine
            warm = min(1.0, (step + 1) / max(1, steps // 10))
            group["lr"] = rate * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss = distiller.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        tokens += batch["input_ids"].numel()
    found = alone(student, held_out)
    return {
        "learning_rate": rate, "steps": steps, "tokens": tokens, "cpu_seconds": time.process_time() - begin,
        "bits_per_byte": found.bits_per_byte, "perplexity": found.student_perplexity,
        "accuracy": found.student_accuracy, **distiller.measured(), "parameters": student.num_parameters(),
    }  # fmt: skip


def tables(result: dict) -> list[str]:
    best = {way: min(runs, key=lambda run: run["bits_per_byte"]) for way, runs in result["runs"].items()}
    base = best["cross entropy alone"]["bits_per_byte"]
    about = result["about"]
    lines = [
        f"{about['parameters']:,} parameters, {about['tokens']:,} tokens, {about['rows']} rows of {LENGTH}, "
        f"{about['passes']} times; the teacher's own bits per byte there: {about['teacher_bits_per_byte']:.3f}",
        "",
        "| | learning rate | bits per byte | beside cross entropy alone | the other rate's | CPU seconds |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for way, run in best.items():
        other = max(result["runs"][way], key=lambda one: one["bits_per_byte"])["bits_per_byte"]
        beside = "-" if way == "cross entropy alone" else f"{100 * (run['bits_per_byte'] / base - 1):+.1f} %"
        cells = [way, f"{run['learning_rate']:g}", f"{run['bits_per_byte']:.4f}", beside, f"{other:.4f}"]
        lines.append(f"| {' | '.join(cells)} | {run['cpu_seconds']:.0f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=400_000, help="of text to train on")
    parser.add_argument("--held-out", type=int, default=60_000, help="bytes that are measured on")
    parser.add_argument("--passes", type=int, default=3, help="over the text")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the table and its JSON")
    options = parser.parse_args()
    import torch

    from mohawk.core.devices import machine
    from mohawk.data.aligned_rows import AlignedRows, TeacherRows, TokenAligner
    from mohawk.demo import fetch
    from mohawk.loading.models import load_teacher, load_tokenizer
    from mohawk.measures.alone import text_rows
    from mohawk.teacher_cache.reader import CachedRows
    from mohawk.teacher_cache.writer import write_cache
    from mohawk.teacher_models import AlignedTeacher, CachedTeacher

    torch.set_num_threads(options.threads)
    train, held = pieces(options.bytes, options.held_out)
    theirs, tokenizer = load_tokenizer(fetch.smollm2()), vocabulary(train)
    teacher = load_teacher(fetch.smollm2())
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rows, held_rows = packed(train, tokenizer, folder / "train"), packed(held, tokenizer, folder / "held")
        held_out = text_rows(
            held_rows, tokenizer, teacher=teacher, teacher_tokenizer=theirs, autocast=torch.bfloat16, batch_size=ROWS
        )
        of_teacher = TeacherRows(rows, TokenAligner(tokenizer, theirs))
        begin = time.process_time()
        cache = write_cache(folder / "cache", teacher, of_teacher, k=K, batch_size=ROWS, autocast=torch.bfloat16)
        cached = {"cache_cpu_seconds": time.process_time() - begin, "teacher_row": of_teacher.length}
        del teacher
        aligned = AlignedRows(rows, CachedRows(of_teacher, cache))
        runs: dict[str, list[dict]] = {}
        for way, align in WAYS.items():
            for rate in RATES:
                asked = None if align is None else AlignedTeacher(CachedTeacher(cache), theirs, tokenizer, align=align)
                given = rows if align is None else aligned
                runs.setdefault(way, []).append(trained(given, asked, tokenizer, held_out, rate, options.passes))
                print(way, json.dumps(runs[way][-1]), flush=True)
    one = runs["cross entropy alone"][0]
    result = {"runs": runs}
    result["about"] = {
        "machine": machine(torch.device("cpu")), "threads": options.threads, "passes": options.passes,
        "bytes": options.bytes, "rows": len(rows), "tokens": one["tokens"], "parameters": one["parameters"],
        "teacher_bits_per_byte": held_out.teacher_bits_per_byte, "date": time.strftime("%Y-%m-%d"), **cached,
    }  # fmt: skip
    lines = tables(result)
    print("\n".join(lines))
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "another_tokenizer.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.results / "another_tokenizer.md").write_text("\n".join(lines) + "\n")
    if options.results == RESULTS:
        put_in_docs(
            "another_tokenizer", [*lines, "", made_by(result["about"]["machine"], "models/another_tokenizer.py")]
        )


if __name__ == "__main__":
    main()
