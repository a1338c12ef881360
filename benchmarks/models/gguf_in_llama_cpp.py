"""A student as GGUF files in llama.cpp: size, memory to write, and how far its answers are from the student's.

Each file is written as `mohawk export --to gguf` writes it, and asked token by token beside the student in float32:

    pip install llama-cpp-python                            # compiles llama.cpp
    python benchmarks/models/gguf_in_llama_cpp.py STUDENT_FOLDER
    python benchmarks/models/gguf_in_llama_cpp.py --demo    # SmolLM2, every second layer a mixer, not trained

Writes benchmarks/results/gguf.json and .md, a table for docs/export.md.
"""

import argparse
import json
import platform
import re
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.pages import RESULTS, put_in_docs  # noqa: E402

TOKENS, NEW = 256, 32
TEXT = (
    "Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in Liberty, "
    "and dedicated to the proposition that all men are created equal. Now we are engaged in a great civil war, testing "
    "whether that nation, or any nation so conceived and so dedicated, can long endure. "
)
PROMPTS = ("The most important thing about the state of the nation is", TEXT[: TEXT.index(" a great")])


def demo_student():
    """SmolLM2 with every second layer a mixer whose gate has no bias. Not trained."""
    from mohawk.demo import fetch
    from mohawk.loading.models import load_teacher, load_tokenizer
    from mohawk.models.from_teacher import hybrid_from_teacher

    teacher = str(fetch.smollm2())
    return hybrid_from_teacher(load_teacher(teacher), "every_second", gate="output"), load_tokenizer(teacher)


def cpu() -> str:
    """What it is called."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    return found.group(1) if found else platform.machine()


class Watched:
    """The most memory that this process held in the block, beyond what it held before: `mib`."""

    def __enter__(self):
        self.before = self.most = self._now()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()
        self.mib = (self.most - self.before) / 2**20

    def _watch(self):
        while not self.done.wait(0.002):
            self.most = max(self.most, self._now())

    def _now(self):
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def load(path: Path, threads: int):
    import llama_cpp

    return llama_cpp.Llama(
        str(path), n_ctx=TOKENS + NEW, logits_all=True, n_gpu_layers=0, flash_attn=False, verbose=False,
        type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32, n_threads=threads, n_threads_batch=threads,
    )  # fmt: skip


def greedy(model, prompt: list[int]) -> list[int]:
    """llama.cpp's tokens."""
    model.reset()
    model.eval(prompt)
    tokens = []
    for _ in range(NEW):
        tokens.append(int(model.scores[model.n_tokens - 1].argmax()))
        model.eval(tokens[-1:])
    return tokens


def measured(student, tokenizer, outtype: str, threads: int) -> dict:
    """One file."""
    from mohawk.models.formats.gguf import write_gguf

    ids = tokenizer(TEXT * 10)["input_ids"][:TOKENS]
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "student.gguf"
        with Watched() as watched:
            write_gguf(student, path, outtype, tokenizer=tokenizer)
        model = load(path, threads)
        size = path.stat().st_size
        assert model.tokenize((TEXT * 10).encode(), add_bos=True, special=True)[:TOKENS] == ids
        model.eval(ids)
        logits = torch.from_numpy(np.array(model.scores[:TOKENS], dtype=np.float32))
        with torch.inference_mode():
            expected = student(torch.tensor([ids]), use_cache=False).logits[0].float()
        p, q = expected.double().log_softmax(-1), logits.double().log_softmax(-1)
        same = []
        for prompt in PROMPTS:
            start = tokenizer(prompt)["input_ids"]
            tokens = greedy(model, start)
            with torch.inference_mode():
                own = student.generate(
                    torch.tensor([start]), do_sample=False, min_new_tokens=NEW, max_new_tokens=NEW, pad_token_id=0
                )[0, len(start) :].tolist()
            same.append(next((i for i, (a, b) in enumerate(zip(own, tokens, strict=True)) if a != b), NEW))
    return {
        "outtype": outtype,
        "mib": size / 2**20,
        "memory_to_write_mib": watched.mib,
        "largest_logit": float(expected.abs().max()),
        "max_difference": float((logits - expected).abs().max()),
        "kl": float((p.exp() * (p - q)).sum(-1).mean()),
        "same_choice": float((p.argmax(-1) == q.argmax(-1)).float().mean()),
        "same_tokens": same,
        "of": NEW,
    }


def table(found: dict) -> list[str]:
    """Lines of Markdown."""
    about = found["about"]
    lines = [
        f"{about['student']}: {about['parameters'] / 1e6:,.0f}M parameters, mixers in {about['mixers']} of "
        f"{about['layers']} layers; {TOKENS} tokens of text, and {NEW} greedy ones after two prompts. "
        f"llama-cpp-python {about['llama_cpp_python']} on {about['machine']}, transformers {about['transformers']}.",
        "",
        "| file | MiB | MiB of memory to write it | largest difference of logits | KL, nats | same top token | "
        "same greedy tokens |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in found["rows"]:
        cells = [
            row["outtype"], f"{row['mib']:,.0f}", f"{row['memory_to_write_mib']:,.0f}",
            f"{row['max_difference']:.1e} of {row['largest_logit']:.0f}", f"{row['kl']:.1e}",
            f"{row['same_choice']:.1%}", f"{' and '.join(map(str, row['same_tokens']))} of {row['of']}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", type=Path, nargs="?", help="a student's folder")
    parser.add_argument("--demo", action="store_true", help="SmolLM2, every second layer a mixer, not trained")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if (options.student is None) != options.demo:
        parser.error("give a student's folder, or --demo")

    from importlib.metadata import version

    import llama_cpp

    from mohawk.loading.models import load_teacher, load_tokenizer
    from mohawk.models.formats.gguf import OUTTYPES

    if options.demo:
        student, tokenizer = demo_student()
    else:
        student, tokenizer = load_teacher(options.student), load_tokenizer(options.student)
    torch.set_num_threads(options.threads)
    rows = []
    for outtype in OUTTYPES:
        rows.append(measured(student, tokenizer, outtype, options.threads))
        print(rows[-1], flush=True)
    about = {
        "student": "SmolLM2-135M-Instruct, not trained" if options.demo else options.student.name,
        "parameters": student.num_parameters(),
        "mixers": len(student.config.ssm_layers),
        "layers": len(student.config.layer_types),
        "threads": options.threads,
        "machine": cpu(),
        "llama_cpp_python": llama_cpp.__version__,
        **{name: version(name) for name in ("gguf", "transformers", "torch")},
    }
    found = {"about": about, "rows": rows}
    (RESULTS / "gguf.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    put_in_docs("gguf", table(found))


if __name__ == "__main__":
    main()
