"""What plans say of memory beside what phases take, over families and sizes, in 1, 2 and 4 processes on a CPU.

Three steps of each phase (mixing, hidden, end_to_end) and of a distillation, float32, over gloo. A process goes through
all of them twice: first with a tiny model of the same family, so that what the libraries import and page in as late as
in a first step is there, then with the model that is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.models.sharding import LENGTH, MIB, measured, planned_parts  # noqa: E402
from benchmarks.pages import RESULTS, put_in_docs  # noqa: E402

PHASES = ("mixing", "hidden", "end_to_end", "distill")
ROWS = 4  # of a step, over all processes
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 256}
SIZES = {
    "5M": {"hidden_size": 160, "intermediate_size": 448, "num_hidden_layers": 8, "num_attention_heads": 4,
           "vocab_size": 8192},
    "20M": {"hidden_size": 320, "intermediate_size": 896, "num_hidden_layers": 10, "num_attention_heads": 5,
            "vocab_size": 16000},
    "100M": {"hidden_size": 640, "intermediate_size": 1792, "num_hidden_layers": 12, "num_attention_heads": 10,
             "vocab_size": 32000},
}  # fmt: skip
# of each family: its model_type, and what it has beside a size
FAMILIES = {
    "Llama": ("llama", {}),
    "Phi": ("phi", {}),
    "Qwen3-MoE": ("qwen3_moe", {"num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True}),
}
CASES = (
    *(("Llama", "5M", how, processes) for how, processes in (("whole", 1), ("whole", 2), ("parts", 2), ("parts", 4))),
    ("Llama", "20M", "whole", 1), ("Llama", "20M", "whole", 4), ("Llama", "20M", "parts", 2),
    *((family, "20M", how, processes) for family in ("Phi", "Qwen3-MoE") for how, processes in
      (("whole", 1), ("parts", 2))),
    ("Qwen3-MoE", "5M", "parts", 4), ("Llama", "100M", "whole", 1), ("Llama", "100M", "parts", 2),
)  # fmt: skip


def configuration(family: str, sizes: dict[str, int]):
    from transformers import AutoConfig

    kind, more = FAMILIES[family]
    heads = sizes["num_attention_heads"]
    given = {**sizes, **more, "num_key_value_heads": heads, "max_position_embeddings": LENGTH}
    if family == "Qwen3-MoE":
        given |= {"head_dim": sizes["hidden_size"] // heads, "moe_intermediate_size": sizes["intermediate_size"] // 2}
    if family == "Phi":
        given["intermediate_size"] = 4 * sizes["hidden_size"]
    return AutoConfig.for_model(kind, **given)


def save(family: str, sizes: dict[str, int], folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(configuration(family, sizes)).save_pretrained(folder)


def case(how: str, processes: int, tiny: str, folder: str) -> dict[str, float]:
    """One process's MiB at the peak of each phase."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if processes > 1:
        dist.init_process_group("gloo")
    for phase in PHASES:
        measured(tiny, phase, how, processes, ROWS, False)
    found = {phase: measured(folder, phase, how, processes, ROWS, False)["peak_mib"] for phase in PHASES}
    if processes > 1:
        dist.destroy_process_group()
    return found


def run_case(how: str, processes: int, tiny: Path, folder: Path) -> dict[str, float]:
    """The largest process's MiB at the peak of each phase."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    command = [sys.executable, __file__, "--case", how, str(processes), str(tiny), str(folder)]
    environment = {**os.environ, "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    # what is freed is given back at once, so that resident memory is what is held
    environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(processes)
    ]  # fmt: skip
    found = []
    for one in started:
        out, err = one.communicate()
        if one.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{err}")
        found.append(json.loads(out.splitlines()[-1]))
    return {phase: max(one[phase] for one in found) for phase in PHASES}


def table(rows: list[dict], about: dict) -> list[str]:
    """The documentation's table: planned over measured."""
    lines = ["| family | parameters | processes | models | " + " | ".join(PHASES) + " |"]
    lines.append("|---|---:|---:|---|" + "---:|" * len(PHASES))
    for row in rows:
        held = "whole" if row["how"] == "whole" else "in parts"
        shares = [f"{row['planned_mib'][p] / row['peak_mib'][p]:.2f} of {row['peak_mib'][p]:,.0f}" for p in PHASES]
        lines.append(
            f"| {row['family']} | {row['parameters'] / 1e6:.0f}M | {row['processes']} | {held} | "
            + " | ".join(shares)
            + " |"
        )
    told = (
        f"What the plan says, as a share of the MiB that the largest process took above the libraries: {ROWS} rows of "
        f"{LENGTH} tokens a step, float32. {about['machine']}, torch {about['torch']}, {about['date']}"
    )
    return [*lines, "", f"{told}. `python benchmarks/models/plans.py`"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="+", help="measure these cases alone, by their number from 0")
    parser.add_argument("--json", type=Path, default=RESULTS / "plans-cpu.json")
    parser.add_argument("--case", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        how, processes, tiny, folder = options.case
        print(json.dumps(case(how, int(processes), tiny, folder)))
        return
    import torch
    from transformers import AutoModelForCausalLM

    from mohawk.core.devices import _cpu_model

    rows = {}
    if options.only is not None and options.json.exists():
        rows = {row["case"]: row for row in json.loads(options.json.read_text())["rows"]}
    for i, (family, size, how, processes) in enumerate(CASES):
        if options.only is not None and i not in options.only:
            continue
        with tempfile.TemporaryDirectory() as folder:
            tiny, full = Path(folder, "tiny"), Path(folder, "full")
            save(family, TINY, tiny), save(family, SIZES[size], full)
            peaks = run_case(how, processes, tiny, full)
        config = configuration(family, SIZES[size])
        parts = {phase: planned_parts(config, phase, how, processes, ROWS, False) for phase in PHASES}
        with torch.device("meta"):
            parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        rows[i] = {
            "case": i, "family": family, "size": size, "parameters": parameters, "how": how, "processes": processes,
            "peak_mib": peaks, "planned_mib": {phase: sum(held.values()) / MIB for phase, held in parts.items()},
        }  # fmt: skip
        print(family, size, how, processes, *(
            f"{p} {rows[i]['planned_mib'][p]:.0f}/{peaks[p]:.0f}={rows[i]['planned_mib'][p] / peaks[p]:.2f}"
            for p in PHASES
        ), flush=True)  # fmt: skip
        about = {
            "what": "peak resident memory of a process above the libraries', and the plan's, MiB",
            "torch": torch.__version__, "machine": _cpu_model(), "cores": os.cpu_count(),
            "system": platform.platform(), "date": time.strftime("%Y-%m-%d"),
        }  # fmt: skip
        options.json.write_text(json.dumps({"about": about, "rows": [rows[i] for i in sorted(rows)]}, indent=1) + "\n")
    if options.json.parent == RESULTS:
        put_in_docs(options.json.stem, table([rows[i] for i in sorted(rows)], about))


if __name__ == "__main__":
    main()
