"""A step of phases 2 and 3 and of a distillation on 1, 2 and 4 processes: memory and time of each.

A 100M model, float32, over gloo on this machine's cores; its student has a mixer in every second layer or, distilled,
every second layer alone. Three ways: models whole on each process (data parallelism), in parts (`sharding.kind: full`),
and as accelerate's own FSDP2 has it for phase 3: the student in parts, the teacher whole, as it prepares one model.
Beside the peak stands what the plan says of it.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import os
import platform
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.pages import RESULTS, put_in_docs  # noqa: E402

MIB = 2**20
SIZES = {"hidden_size": 640, "intermediate_size": 1792, "num_hidden_layers": 12, "num_attention_heads": 10}
QUICK = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2}
VOCAB, LENGTH = 32000, 256
ROWS = 4  # of a step, over all processes
STEPS = 3
PHASES = ("hidden", "end_to_end", "distill")
TINY_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
# environment variables: the folders of the teachers that all cases read
TEACHER, TINY = "MOHAWK_BENCHMARK_TEACHER", "MOHAWK_BENCHMARK_TINY_TEACHER"


def _rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def case(phase: str, how: str, processes: int, rows: int, recompute: bool) -> dict:
    """One process's part of a case: bytes at the peak above the libraries, seconds of a step, the loss."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if processes > 1:
        dist.init_process_group("gloo")
    # once with a tiny model, so that the libraries are there: what they import and page in as late as in a first phase,
    # 25 MiB and more, is theirs, whatever the model
    measured(os.environ[TINY], phase, how, processes, rows, recompute)
    return measured(os.environ[TEACHER], phase, how, processes, rows, recompute)


def measured(folder: str, phase: str, how: str, processes: int, rows: int, recompute: bool) -> dict:
    """As `case`, of the teacher in a folder."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from mohawk.core.collectives import sum_gradients, total
    from mohawk.distillation.build import shaped, shaped_in_parts
    from mohawk.loading.models import load_teacher
    from mohawk.losses.distiller import KnowledgeDistiller
    from mohawk.models.from_teacher import hybrid_from_teacher
    from mohawk.models.sharding import reshard, shard
    from mohawk.training.optimizer import sharded_apart

    rank = int(os.environ.get("RANK", "0"))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    start = _rss()
    if how == "parts" and processes > 1:
        mesh = init_device_mesh("cpu", (processes,))
        teacher = load_teacher(folder, spread=lambda model: shard(model, mesh, trains=False))
        torch.manual_seed(0)
        spread = lambda model: shard(model, mesh)  # noqa: E731
        if phase == "distill":
            student = shaped_in_parts(distilled(), teacher, 0, spread)
        else:
            student = hybrid_from_teacher(teacher, spread=spread)
    else:
        teacher = load_teacher(folder)
        torch.manual_seed(0)
        student = shaped(distilled(), teacher, 0) if phase == "distill" else hybrid_from_teacher(teacher)
    student.requires_grad_(True).train()
    if recompute:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if how == "accelerate" and processes > 1:
        student, optimizer = _accelerates(student, torch.optim.AdamW(student.parameters(), fused=True))
        objective = KnowledgeDistiller(teacher, student)
        parameters = [p for p in student.parameters() if p.requires_grad]
    else:
        objective = objective_of(phase, student, teacher)
        reshard(student)
        parameters = [p for p in student.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(sharded_apart([{"params": parameters}]), fused=True)
    ids = torch.randint(teacher.config.vocab_size, (rows, LENGTH), generator=torch.Generator().manual_seed(1))
    mine = ids[rank * rows // processes : (rank + 1) * rows // processes]
    batch = {"input_ids": mine, "position_ids": torch.arange(LENGTH).repeat(len(mine), 1), "labels": mine}
    batch["segment_ids"] = torch.zeros_like(mine)
    times, loss = [], torch.zeros(())
    for step in range(STEPS):
        if step == 1:
            Path("/proc/self/clear_refs").write_text("5")  # the peak from here on, in which all moments exist
        if processes > 1:
            dist.barrier()
        begin, loss = time.perf_counter(), torch.zeros(())
        if how == "accelerate" or phase == "distill":
            given = {name: batch[name] for name in ("input_ids", "labels")}
            losses = [("kl", objective.loss(given))]
        else:
            losses = objective.losses(**batch)
        for _, part in losses:
            (part / processes).backward()
            loss = loss + part.detach() / processes
        sum_gradients(parameters)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - begin)
    return {"peak_mib": (_peak() - start) / MIB, "seconds": statistics.median(times[1:]), "loss": float(total(loss))}


def distilled():
    from mohawk.distillation.recipe import DistillStudent

    return DistillStudent(layers="every_second")


def objective_of(phase: str, student, teacher):
    from mohawk.conversion.objectives import EndToEndObjective, HiddenObjective, MixingObjective
    from mohawk.losses.distiller import KnowledgeDistiller

    if phase == "distill":
        return KnowledgeDistiller(teacher, student)
    if phase == "end_to_end":
        return EndToEndObjective(student, teacher, "all")
    return (MixingObjective if phase == "mixing" else HiddenObjective)(student, teacher)


def _accelerates(student, optimizer):
    """Student and optimizer as accelerate's FSDP2 plugin prepares them, told that gloo is a device's backend."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    AcceleratorState._reset_state(reset_partial_state=True)  # of the tiny model
    PartialState._prepare_backend = lambda self, *_, **__: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", __import__("torch").device("cpu"))
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False,
        transformer_cls_names_to_wrap=[type(student.model.layers[0]).__name__],
    )  # fmt: skip
    student, optimizer = Accelerator(fsdp_plugin=plugin).prepare(student, optimizer)
    for module in student.modules():
        if hasattr(module, "set_gradient_divide_factor"):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return student, optimizer


def planned(phase: str, how: str, processes: int, rows: int, quick: bool, recompute: bool) -> float:
    """MiB of one process, as the plan has them."""
    from transformers import LlamaConfig

    config = LlamaConfig(vocab_size=VOCAB, max_position_embeddings=LENGTH, **(QUICK if quick else SIZES))
    return sum(planned_parts(config, phase, how, processes, rows, recompute).values()) / MIB


def planned_parts(config, phase: str, how: str, processes: int, rows: int, recompute: bool) -> dict[str, int]:
    """Bytes of one process by what they are of, of a teacher's configuration."""
    import types

    import torch
    from transformers import AutoModelForCausalLM

    from mohawk.conversion.footprint import Strategy, footprint
    from mohawk.distillation.build import shaped
    from mohawk.distillation.footprint import stage_footprint
    from mohawk.models.from_teacher import hybrid_from_teacher

    with torch.device("meta"):
        teacher = AutoModelForCausalLM.from_config(config)
        student = shaped(distilled(), teacher, 0) if phase == "distill" else hybrid_from_teacher(teacher)
    asked = types.SimpleNamespace(batch_size=rows, rows=rows, sequence_length=LENGTH, match="block_output")
    trained = sum(p.numel() for _, p in objective_of(phase, student, teacher).trained())
    given = {"itemsize": 4, "strategy": Strategy(processes if how == "parts" else 1, recompute), "processes": processes}
    if phase == "distill":
        return stage_footprint(asked, student, [(teacher, 4)], trained, **given)
    return footprint(phase, asked, student, teacher, trained, teacher_bytes=4, **given)


def _is_busy() -> bool:
    """Whether other work takes a tenth of the machine or more."""

    def ticks() -> list[int]:
        return [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:8]]

    before = ticks()
    time.sleep(1)
    passed = [now - then for now, then in zip(ticks(), before, strict=True)]
    return passed[3] < 0.9 * sum(passed)


def run_case(phase: str, how: str, processes: int, rows: int, quick: bool, recompute: bool) -> dict:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    command = [sys.executable, __file__, "--case", phase, how, str(processes), str(rows), str(recompute)]
    environment = {**os.environ, "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    # what is freed is given back at once, so that resident memory is what is held
    environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    busy = _is_busy()
    started = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(processes)
    ]  # fmt: skip
    found = []
    for one in started:
        out, err = one.communicate()
        if one.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{err}")
        found.append(json.loads(out.splitlines()[-1]))
    return {
        "phase": phase, "how": how, "processes": processes, "recompute": recompute,
        "peak_mib": max(one["peak_mib"] for one in found),
        "seconds": None if busy else max(one["seconds"] for one in found), "loss": found[0]["loss"],
        "planned_mib": None if how == "accelerate" else planned(phase, how, processes, rows, quick, recompute),
    }  # fmt: skip


def table(rows: list[dict], about: dict) -> list[str]:
    """The documentation's table."""
    names = {"whole": "whole", "parts": "in parts", "accelerate": "accelerate's FSDP2"}
    lines = ["| phase | processes | models | peak of a process | planned | of one process | a step |"]
    lines.append("|---|---:|---|---:|---:|---:|---:|")
    for row in rows:
        first = next(one for one in rows if one["phase"] == row["phase"] and one["processes"] == 1)
        how = names[row["how"]] + (", activation checkpointing" if row["recompute"] else "")
        plan = "" if row["planned_mib"] is None else f"{row['planned_mib']:,.0f} MiB"
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.2f} s"
        lines.append(
            f"| {row['phase']} | {row['processes']} | {how} | {row['peak_mib']:,.0f} MiB | {plan} | "
            f"{row['peak_mib'] / first['peak_mib']:.2f} | {seconds} |"
        )
    told = (
        f"{about['parameters'] / 1e6:.0f}M parameters, {ROWS} rows of {LENGTH} tokens a step over all processes, "
        "a student with a mixer in every second layer (distill: of every second layer alone), "
        "float32, a thread a process: with more processes than cores a step's time says little, and it is left "
        "out where the machine had other work. Peak: resident memory "
        f"above the libraries'. {about['machine']}, {about['cores']} cores, torch {about['torch']}, {about['date']}"
    )
    return [*lines, "", f"{told}. `python benchmarks/models/sharding.py`"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model")
    parser.add_argument("--phase", choices=PHASES, help="measure this one alone; what the file has of others stays")
    parser.add_argument("--json", type=Path, default=RESULTS / "sharding-cpu.json")
    parser.add_argument("--case", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        phase, how, processes, rows, recompute = options.case
        print(json.dumps(case(phase, how, int(processes), int(rows), recompute == "True")))
        return
    rows, phases = [], PHASES if options.phase is None else (options.phase,)
    if len(phases) < len(PHASES):  # plans change without a measurement
        rows = [row for row in json.loads(options.json.read_text())["rows"] if row["phase"] not in phases]
        for row in rows:
            asked = row["phase"], row["how"], row["processes"], ROWS, options.quick, row["recompute"]
            row["planned_mib"] = row["planned_mib"] and planned(*asked)
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {TEACHER: f"{folder}/teacher", TINY: f"{folder}/tiny"}
        save_teacher(os.environ[TEACHER], QUICK if options.quick else SIZES, VOCAB)
        save_teacher(os.environ[TINY], TINY_SIZES, 256)
        measure(rows, options.quick, phases)
    rows.sort(key=lambda row: PHASES.index(row["phase"]))
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from mohawk.core.devices import _cpu_model

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **(QUICK if options.quick else SIZES)))
    about = {
        "what": "peak resident memory of a process above the libraries', MiB; median of 2 steps, seconds",
        "parameters": sum(p.numel() for p in model.parameters()), "torch": torch.__version__, "machine": _cpu_model(),
        "cores": os.cpu_count(), "system": platform.platform(), "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    if options.json.parent == RESULTS and not options.quick:
        put_in_docs(options.json.stem, table(rows, about))


def save_teacher(folder: str, sizes: dict[str, int], words: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=words, max_position_embeddings=LENGTH, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)


def measure(rows: list[dict], quick: bool, phases: Sequence[str]) -> None:
    """Every case, one after the other, into `rows`."""
    for phase in phases:
        ways = [("whole", 1, False), ("whole", 2, False), ("parts", 2, False), ("whole", 4, False), ("parts", 4, False)]
        if phase == "end_to_end":
            ways.insert(1, ("whole", 1, True))
            ways[4:4] = [("accelerate", 2, False)]
            ways += [("accelerate", 4, False), ("parts", 4, True)]
        if phase == "distill":
            ways[1:1] = [("whole", 1, True)]
            ways.insert(4, ("parts", 2, True))
        for how, processes, recompute in ways:
            rows.append(run_case(phase, how, processes, ROWS, quick, recompute))
            row = rows[-1]
            plan = "" if row["planned_mib"] is None else f"{row['planned_mib']:7.0f} MiB planned"
            print(
                f"{phase:10} {how:10} x{processes} {'recompute' if recompute else '':9} {row['peak_mib']:7.0f} MiB "
                f"{plan:20} {row['seconds'] or math.nan:6.2f} s  loss {row['loss']:.6f}", flush=True,
            )  # fmt: skip
        losses = [row["loss"] for row in rows if row["phase"] == phase]
        if max(losses) - min(losses) > 1e-5 * abs(losses[0]):
            sys.exit(f"the ways disagree: {losses}")


if __name__ == "__main__":
    main()
