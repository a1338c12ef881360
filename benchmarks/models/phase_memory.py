"""Peak memory and time of phases 1 and 2: layers streamed, against all layers' matrices and graphs alive at once.

Each case is a process of its own: a random Llama of SmolLM2-135M's width, half of its layers replaced, one training
step (losses and backward). Streamed is `mohawk.conversion.objectives`. Straightforward is what one writes first, and
what the method's authors published: the teacher returns every attention matrix (or hidden state), the student makes
every matrix (or output), the losses are summed and back-propagated once.

    python benchmarks/models/phase_memory.py [--quick] [--json FILE]
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.pages import RESULTS, put_in_docs  # noqa: E402

HIDDEN, HEADS, KV_HEADS, MLP, VOCAB, BATCH = 576, 9, 3, 1536, 4096, 4
DEPTHS, LENGTHS = (8, 24), (256, 512)
MIB = 2**20


def straightforward(phase: str, student, teacher, batch):
    """The sum of all layers' losses, everything alive until one backward."""
    import torch

    from mohawk.kernels.mixing.reference import dense_matrix

    ids, layers = batch["input_ids"], student.config.ssm_layers
    with torch.no_grad():
        out = teacher.model(ids, output_attentions=phase == "mixing", output_hidden_states=True)
    losses = []
    for i in layers:
        layer = student.model.layers[i]
        if phase == "mixing":
            mixing = layer.self_attn.mixing(layer.input_layernorm(out.hidden_states[i]))
            difference = dense_matrix(mixing) - out.attentions[i]
            losses.append(torch.linalg.matrix_norm(difference).mean())
        else:
            made = layer(out.hidden_states[i], position_embeddings=None)
            losses.append((made - out.hidden_states[i + 1]).norm(dim=-1).mean())
    sum(losses).div(len(layers)).backward()
    return sum(losses).item() / len(layers)


def streamed(phase: str, student, teacher, batch):
    from mohawk.conversion.objectives import HiddenObjective, MixingObjective

    objective = {"mixing": MixingObjective, "hidden": HiddenObjective}[phase](student, teacher)
    total = 0.0
    for _, loss in objective.losses(**batch):
        loss.backward()
        total += loss.item()
    return total


def case(phase: str, how: str, depth: int, length: int) -> dict:
    """One step in this process; bytes above what the models themselves take."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from mohawk.conversion.objectives import HiddenObjective, MixingObjective
    from mohawk.models.from_teacher import hybrid_from_teacher

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=MLP, num_hidden_layers=depth,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, tie_word_embeddings=True,
    )  # fmt: skip
    if how == "straightforward" and phase == "mixing":
        config._attn_implementation = "eager"
    teacher = LlamaForCausalLM(config).eval().requires_grad_(False)
    student = hybrid_from_teacher(teacher, "every_second" if phase == "mixing" else range(0, depth, 2))
    {"mixing": MixingObjective, "hidden": HiddenObjective}[phase](student, teacher)  # freezes what the phase freezes
    ids = torch.randint(VOCAB, (BATCH, length))
    batch = {
        "input_ids": ids,
        "position_ids": torch.arange(length).expand_as(ids),
        "segment_ids": torch.zeros_like(ids),
    }
    small = {name: value[:, :32] for name, value in batch.items()}
    step = {"streamed": streamed, "straightforward": straightforward}[how]
    step(phase, student, teacher, small)  # gradients and the libraries' own buffers exist from here on
    before = _rss()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        loss = step(phase, student, teacher, batch)
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return {
        "phase": phase, "how": how, "depth": depth, "length": length, "loss": loss, "seconds": seconds,
        "peak_mib": peak / MIB, "hidden_states_mib": (depth + 1) * BATCH * length * HIDDEN * 4 / MIB,
    }  # fmt: skip


def _rss() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def table(rows: list[dict], about: dict) -> list[str]:
    """The documentation's table."""
    lines = ["| phase | layers | length | streamed | all alive | ratio | hidden states | seconds | all alive | ratio |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for ours, theirs in zip(rows[::2], rows[1::2], strict=True):
        lines.append(
            f"| {ours['phase']} | {ours['depth']} | {ours['length']} | {ours['peak_mib']:.0f} MiB | "
            f"{theirs['peak_mib']:.0f} MiB | {theirs['peak_mib'] / max(ours['peak_mib'], 1e-9):.1f} | "
            f"{ours['hidden_states_mib']:.0f} MiB | {ours['seconds']:.2f} | {theirs['seconds']:.2f} | "
            f"{theirs['seconds'] / ours['seconds']:.1f} |"
        )
    told = "Peak above the models and time of one step; half of the layers replaced, batch 4, width 576, float32."
    machine = (
        f"{about['machine'] or platform.machine()}, {about['threads']} threads, torch {about['torch']}, {about['date']}"
    )
    return [*lines, "", f"{told} {machine}. `python benchmarks/models/phase_memory.py`"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small depths and lengths")
    parser.add_argument("--json", type=Path, default=RESULTS / "phase_memory.json")
    parser.add_argument("--case", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        phase, how, depth, length = options.case
        print(json.dumps(case(phase, how, int(depth), int(length))))
        return
    depths, lengths = ((2, 6), (64, 256)) if options.quick else (DEPTHS, LENGTHS)
    rows = []
    print(f"{'phase':8} {'depth':>5} {'length':>6} {'streamed':>12} {'all alive':>12} {'ratio':>6}   seconds, both")
    for phase in ("mixing", "hidden"):
        for length in lengths:
            for depth in depths:
                pair = []
                for how in ("streamed", "straightforward"):
                    command = [sys.executable, __file__, "--case", phase, how, str(depth), str(length)]
                    done = subprocess.run(command, capture_output=True, text=True)
                    if done.returncode:
                        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
                    pair.append(json.loads(done.stdout.splitlines()[-1]))
                rows += pair
                ours, theirs = pair
                if abs(ours["loss"] - theirs["loss"]) > 1e-3 * abs(theirs["loss"]):
                    sys.exit(f"the two disagree: {ours} {theirs}")
                print(
                    f"{phase:8} {depth:5} {length:6} {ours['peak_mib']:8.0f} MiB {theirs['peak_mib']:8.0f} MiB "
                    f"{theirs['peak_mib'] / max(ours['peak_mib'], 1e-9):6.1f}   {ours['seconds']:.1f} "
                    f"{theirs['seconds']:.1f}",
                    flush=True,
                )
    import torch
    import transformers

    options.json.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "what": "peak resident memory above the models in one step, MiB; median of 3 steps, seconds",
        "batch": BATCH, "hidden_size": HIDDEN,
        "torch": torch.__version__, "transformers": transformers.__version__, "machine": platform.processor(),
        "threads": torch.get_num_threads(), "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    options.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    if options.json.parent == RESULTS:
        put_in_docs("phase_memory", table(rows, about))


if __name__ == "__main__":
    main()
