"""What a conversion needs of 1B to 70B parameters on 8 to 512 devices, from `mohawk convert --dry-run`'s own plan."""

from __future__ import annotations

from typing import Any

HEAD = """\
# Plans from 1B to 70B

<!-- Written by docs/generate.py from mohawk/conversion/footprint.py; edit there. -->

What the plan of `mohawk convert RECIPE --dry-run --processes N --device-memory 80GB` says of Llama's and Qwen's sizes:
every second layer becomes a Mamba-2 mixer, the teacher is in bfloat16, sequences have 2,048 tokens, the budgets are the
MOHAWK paper's (80M, 160M and 2.76B tokens), all of the student trains in phase 3. A step has 16 rows in phases 1 and 2
and 256 in phase 3, or one for each device where there are more. **These are plans: none of these runs was made.** What
the plan says of memory was within 15% of runs of a 100M model on a CPU ([the table](distributed.md)); speeds are at 40%
of a device's 989 TFLOP/s, which kernels and networks may not reach.

"""
SIZES: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": {"model_type": "llama", "num_hidden_layers": 16, "hidden_size": 2048, "intermediate_size": 8192,
                     "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
                     "tie_word_embeddings": True},
    "Llama-3.1-8B": {"model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336,
                     "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
    "Qwen2.5-32B": {"model_type": "qwen2", "num_hidden_layers": 64, "hidden_size": 5120, "intermediate_size": 27648,
                    "num_attention_heads": 40, "num_key_value_heads": 8, "vocab_size": 152064},
    "Llama-3.3-70B": {"model_type": "llama", "num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672,
                      "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip
DEVICES = (8, 64, 512)
MEMORY, FLOPS = 80 * 10**9, 989e12
ROWS = {"mixing": 16, "hidden": 16, "end_to_end": 256}  # of a step, or one for each device


def plans() -> str:
    """The page."""
    from transformers import AutoConfig

    from mohawk.conversion.footprint import Hardware
    from mohawk.conversion.plan import make_plan
    from mohawk.conversion.recipe import Recipe

    lines = ["| teacher | devices | phase | models are | GB of 80 | fits | tokens a second | device-hours |"]
    lines.append("|---|---:|---|---|---:|---|---:|---:|")
    for name, size in SIZES.items():
        config = AutoConfig.for_model(**size)
        for devices in DEVICES:
            phases = {}
            for phase, rows in ROWS.items():
                rows, at_once = max(rows, devices), 4 if size["hidden_size"] < 5000 else 2
                phases[phase] = {"batch_size": at_once, "gradient_accumulation": rows // at_once}
            recipe = Recipe.from_dict(
                {
                    "teacher": {"model": name, "dtype": "bfloat16"}, "data": {"train": ["text"]}, "phases": phases,
                    "device": "cpu",
                }
            )  # fmt: skip
            hardware = Hardware(devices, MEMORY, FLOPS)
            for phase in make_plan(recipe, config, hardware).phases:
                rate = hardware.flops * hardware.utilisation / phase.operations
                lines.append(
                    f"| {name} | {devices} | {phase.name} | {phase.strategy} | {phase.memory / 1e9:.1f} | "
                    f"{'yes' if phase.memory <= MEMORY else 'no'} | {rate * devices:,.0f} | "
                    f"{phase.tokens / rate / 3600:,.1f} |"
                )
    return HEAD + "\n".join(lines) + "\n"
