"""Peak memory and time of attention distillation: strip by strip, against every layer's matrices returned at once.

Each case is a process of its own: a random student of 6 layers and 9 heads (width 576, SmolLM2-135M's) and a teacher of
12 layers with as many or other heads, one forward of both, the loss of 6 layer pairs, one backward. Ours is
`mohawk.losses.layers.attention_match`; eager is what one writes first: both models return their attentions. "Alone" is
both models' forwards and a backward from the student's last hidden states, which both contain.

    python benchmarks/models/attention_match.py [--quick] [--json FILE]
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.pages import RESULTS, put_in_docs  # noqa: E402

HIDDEN, HEADS, OTHER_HEADS, MLP, VOCAB, LAYERS = 576, 9, 12, 1536, 4096, 6
LENGTHS = (512, 2048)
CASES = (("kl", HEADS), ("mse", OTHER_HEADS))  # head by head, and means over heads
MIB = 2**20


def model(layers: int, heads: int, attention: str):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=MLP, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=3, tie_word_embeddings=True, initializer_range=0.1,
    )  # fmt: skip
    config._attn_implementation = attention
    return LlamaForCausalLM(config).eval()


def ours(student, teacher, match, ids):
    import torch

    from mohawk.losses.layers.attention_match import collect_attention

    with collect_attention(teacher, match.teacher_layers) as theirs, torch.no_grad():
        teacher.model(ids, use_cache=False)
    with collect_attention(student, match.student_layers) as mine:
        student.model(ids, use_cache=False)
    return match(mine, theirs)


def alone(student, teacher, match, ids):
    import torch

    with torch.no_grad():
        teacher.model(ids, use_cache=False)
    return student.model(ids, use_cache=False).last_hidden_state.square().mean()


def eager(student, teacher, match, ids):
    import torch

    with torch.no_grad():
        theirs = teacher.model(ids, use_cache=False, output_attentions=True).attentions
    mine = student.model(ids, use_cache=False, output_attentions=True).attentions
    losses = []
    for i, j in match.pairs:
        s, a = mine[i], theirs[j]
        if s.shape[1] != a.shape[1]:
            s, a = s.mean(1), a.mean(1)
        if match.loss == "mse":
            losses.append((s - a).square().mean())
        else:
            tiny = torch.finfo(s.dtype).tiny
            losses.append((a * (a.clamp(min=tiny).log() - s.clamp(min=tiny).log())).sum(-1).mean())
    return torch.stack(losses).mean()


def case(how: str, loss: str, heads: int, length: int) -> dict:
    """One step in this process; bytes above what the models themselves take."""
    import torch

    from mohawk.losses.layers.attention_match import AttentionMatch
    from mohawk.losses.layers.hidden_match import layer_map

    torch.manual_seed(0)
    attention = "eager" if how == "eager" else "sdpa"
    teacher = model(2 * LAYERS, heads, attention).requires_grad_(False)
    student = model(LAYERS, HEADS, attention)
    match = AttentionMatch(layer_map("uniform", LAYERS, 2 * LAYERS), loss=loss)
    step = {"ours": ours, "eager": eager, "alone": alone}[how]
    ids = torch.randint(VOCAB, (1, length))
    step(student, teacher, match, ids[:, :32]).backward()  # the gradients' memory exists from here on
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    start = time.perf_counter()
    value = step(student, teacher, match, ids)
    value.backward()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return {
        "how": how, "loss": loss, "heads": [HEADS, heads], "length": length, "value": value.item(),
        "seconds": seconds, "peak_mib": peak / MIB,
    }  # fmt: skip


def table(result: dict) -> list[str]:
    """Peaks alone: a step's seconds are no timing."""
    lines = [
        "| loss | heads of student and teacher | tokens | both models alone | with the loss | matrices returned |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    cases: dict[tuple, dict[str, float]] = {}
    for row in result["rows"]:
        cases.setdefault((row["loss"], *row["heads"], row["length"]), {})[row["how"]] = row["peak_mib"]
    for (loss, student, teacher, length), peaks in cases.items():
        cells = " | ".join(f"{peaks[how]:,.0f} MiB" for how in ("alone", "ours", "eager"))
        lines.append(f"| `{loss}` | {student}, {teacher} | {length:,} | {cells} |")
    about = result["about"]
    machine = f"{about['machine']}, " if about["machine"] else ""
    return [
        *lines,
        "",
        f"Peak above the models in one step, both passes: {about['pairs']} layer pairs, width {about['hidden_size']}, "
        f"one row, float32. {machine}{about['threads']} thread, torch {about['torch']}, {about['date']}. "
        "`python benchmarks/models/attention_match.py`",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a short length only")
    parser.add_argument("--json", type=Path, default=RESULTS / "attention_match.json")
    parser.add_argument("--case", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        how, loss, heads, length = options.case
        print(json.dumps(case(how, loss, int(heads), int(length))))
        return
    rows = []
    print(f"{'loss':4} {'heads':>7} {'length':>6} {'alone':>12} {'ours':>12} {'eager':>12}   seconds, each")
    for length in LENGTHS[:1] if options.quick else LENGTHS:
        for loss, heads in CASES:
            found = []
            for how in ("alone", "ours", "eager"):
                command = [sys.executable, __file__, "--case", how, loss, str(heads), str(length)]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
                found.append(json.loads(done.stdout.splitlines()[-1]))
            rows += found
            _, mine, theirs = found
            if abs(mine["value"] - theirs["value"]) > 1e-3 * abs(theirs["value"]):
                sys.exit(f"the two disagree: {mine} {theirs}")
            memory = " ".join(f"{one['peak_mib']:8.0f} MiB" for one in found)
            seconds = " ".join(f"{one['seconds']:.1f}" for one in found)
            print(f"{loss:4} {HEADS:3}/{heads:3} {length:6} {memory}   {seconds}", flush=True)
    import torch
    import transformers

    options.json.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "what": "peak resident memory above the models in one step, MiB, and its seconds (one step, not a timing)",
        "batch": 1, "hidden_size": HIDDEN, "layers": [LAYERS, 2 * LAYERS], "pairs": LAYERS,
        "torch": torch.__version__, "transformers": transformers.__version__,
        "machine": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    result = {"about": about, "rows": rows}
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.json == RESULTS / "attention_match.json" and not options.quick:
        put_in_docs("attention_match", table(result))


if __name__ == "__main__":
    main()
