"""The plan's memory beside what stages of a pruning took on a CPU.

MEASURED: MiB of the largest process while a stage trains, of `mohawk prune` with the recipe below, in float32, a thread
a process, torch 2.13: VmHWM, with MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ at 64 KiB, less what the process
held besides its parameters while none trained (libraries and data: 49 MiB alone, 38 MiB beside another process). The
checkpoint that ends a stage is in it but for the healing in parts, whose checkpoint takes more than its steps.
"""

import pytest
from transformers import LlamaConfig

from mohawk.conversion.footprint import Hardware
from mohawk.pruning.plan import make_plan
from mohawk.pruning.recipe import PruneRecipe

STAGE = {"tokens": 2 * 4 * 64, "batch_size": 4, "sequence_length": 64}
MEASURED = {
    1: {"correct": 802, "mixing": 484, "hidden": 499, "heal": 752},
    2: {"mixing": 306, "hidden": 296, "heal": 476},
}


@pytest.mark.parametrize("processes", MEASURED)
def test_it_is_within_a_seventh_of_what_was_measured(processes):
    config = LlamaConfig(
        vocab_size=16000, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8
    )
    recipe = PruneRecipe.from_dict({
        "teacher": {"model": "some/model", "dtype": "float32"}, "data": {"train": ["text"]}, "device": "cpu",
        "precision": "float32", "prune": {"layers": 6}, "convert": {"mixing": STAGE, "hidden": STAGE},
        "correct": STAGE | {"name": "correct"}, "heal": STAGE | {"name": "heal"},
        "sharding": {"kind": "full" if processes > 1 else "none"},
    })  # fmt: skip
    plan = make_plan(recipe, config, hardware=Hardware(processes, 2**40))
    planned = {need.name: need.memory / 2**20 for need in plan.needs}
    for name, measured in MEASURED[processes].items():
        assert planned[name] == pytest.approx(measured, rel=0.15), name
