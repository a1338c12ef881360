"""The mixers that a student can have, each with what it is: read without torch, for recipes. Their classes are in
mixers.py, under the same names."""

MIXERS = {
    "mamba2": "Bamba's, for stock transformers",
    "discrete_mamba2": "the MOHAWK paper's",
    "gated_delta": "Qwen3.5's Gated DeltaNet",
    "kimi_delta": "Kimi Linear's Kimi Delta Attention",
}
