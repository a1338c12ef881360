"""The configurations of the released layouts, read into ours and written back (see released.py).

A released option that our mixers' mathematics has no place for is refused by name.
"""

from typing import Any

from transformers import LlamaConfig, PhiConfig

from mohawk.models.families import decoder_shape
from mohawk.models.hybrid_config import SSM_LAYER, HybridConfig, attention_types

LAYOUTS = ("phi-mamba", "llamba", "mamba-in-llama")
MAMBA_CONFIG = "mamba_config.json"
NORM_EPS = 1e-5  # written into the released blocks' and output norms' code
ATTENTION = "full_attention"
# What the released mixers offer beyond our mixers' mathematics, at the one value that every released checkpoint has
DISCRETE_OPTIONS = {"activation": "identity", "bias": False, "conv_bias": True, "norm_cls": "none"}
GROUPED_OPTIONS = {
    "D_has_hdim": False, "rmsnorm": True, "norm_before_gate": False, "conv_bias": True, "dt_limit": (0.0, float("inf")),
}  # fmt: skip


def layout_of(config: HybridConfig) -> str:
    """The released layout that holds such a student. Raises ValueError, with the reason, where none does."""
    kind, base = config.base_config.model_type, config.base_config
    if config.mixer not in ("discrete_mamba2", "mamba2"):
        raise ValueError(f"{config.mixer_words} mixers are in no released layout; mamba2 or discrete_mamba2 alone are")
    if config.mixer == "discrete_mamba2":
        inner = config.mixer_num_heads * config.mixer_head_dim
        if config.mixer_bias or inner % config.hidden_size:
            raise ValueError("released discrete mixers have no bias and an inner width that the hidden size divides")
        if kind == "phi":
            return "phi-mamba"
        if kind == "llama" and config.is_pure_ssm:
            return "llamba"
        raise ValueError(f"discrete mixers were released in Phi hybrids and pure Llama models, not in a {kind} hybrid")
    shape = decoder_shape(base)
    sizes = (config.mixer_num_heads, config.mixer_num_groups, config.mixer_head_dim, config.mixer_state_size)
    if kind in ("llama", "mistral") and sizes == (shape.num_heads, shape.num_heads, shape.head_dim, shape.head_dim):
        return "mamba-in-llama"
    raise ValueError(
        f"a {kind} student of mamba2 mixers (heads, groups, head dim, state size: {sizes}) is in no released layout; "
        "MambaInLlama's are Llama or Mistral with the sizes of the attention they replace"
    )


def _check_options(given: dict[str, Any], allowed: dict[str, Any], where: str) -> None:
    for name, value in allowed.items():
        got = given.get(name, value)
        got = tuple(got) if isinstance(got, list) else got
        if got != value:
            raise ValueError(f"{where}.{name}: got {got!r}, but the mixers here compute only {value!r}")


def _padded(vocabulary: dict[str, Any]) -> int:
    multiple = vocabulary.get("pad_vocab_size_multiple", 1)
    return -(-vocabulary["vocab_size"] // multiple) * multiple


def _discrete(ssm: dict[str, Any], hidden_size: int, where: str) -> dict[str, Any]:
    """Our mixer options from a released `core_input` or `ssm_cfg`; absent keys have the released classes' defaults."""
    _check_options(ssm, DISCRETE_OPTIONS, where)
    heads = ssm.get("n_v_heads", 32)
    return dict(
        mixer="discrete_mamba2",
        mixer_num_heads=heads,
        mixer_head_dim=ssm.get("expand", 1) * hidden_size // heads,
        mixer_state_size=ssm.get("d_state", 64),
        mixer_num_groups=ssm.get("n_qk_heads", 32),
        mixer_conv_kernel=ssm.get("d_conv", 4),
    )


def read_phi_mamba(config: dict[str, Any]) -> HybridConfig:
    """Blocks follow each other in the file's order, each `n_layers` alike."""
    size, vocabulary = config["MixerModel"]["input"], config["LanguageModel"]["input"]
    hidden, mixers, attention, types = size["d_model"], [], {}, []
    dropout = 0.0
    for name, block in config.items():
        if not name.startswith("Block"):
            continue
        core = block["core_input"]
        if not block["BlockType"].endswith("phi_block"):
            raise ValueError(f"{name}.BlockType: got {block['BlockType']!r}; allowed: modules.phi_block")
        if block["CoreType"].endswith("phi_attention"):
            attention, kind = core, ATTENTION
        elif block["CoreType"].endswith("discrete_mamba2"):
            mixers.append(_discrete(core, hidden, f"{name}.core_input"))
            kind = SSM_LAYER
        else:
            raise ValueError(f"{name}.CoreType: got {block['CoreType']!r}; allowed: discrete_mamba2, phi_attention")
        types += [kind] * block["n_layers"]
        dropout = block.get("block_input", {}).get("resid_dropout", 0.0)
    if not mixers or any(mixer != mixers[0] for mixer in mixers):
        raise ValueError("the Mamba-2 blocks must be there and of one shape: a student's mixers are all alike")
    if len(types) != size["n_layer"]:
        raise ValueError(f"MixerModel.input.n_layer is {size['n_layer']}, but the blocks make {len(types)} layers")
    # the released attention is transformers' PhiAttention at that configuration's defaults, which are Phi-1.5's
    heads = attention.get("num_attention_heads", 32 if attention else mixers[0]["mixer_num_heads"])
    vocab_size = _padded(vocabulary)
    end = 50256 if vocab_size > 50256 else None  # Phi's <|endoftext|>; its own configuration names none
    base = PhiConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=len(types),
        num_attention_heads=heads,
        num_key_value_heads=attention.get("num_key_value_heads"),
        hidden_act="gelu_new",
        layer_norm_eps=NORM_EPS,
        resid_pdrop=dropout,
        tie_word_embeddings=False,
        bos_token_id=end,
        eos_token_id=end,
    )
    return HybridConfig(base_config=base, layer_types=types, **mixers[0])


def write_phi_mamba(config: HybridConfig) -> dict[str, Any]:
    written: dict[str, Any] = {
        "LanguageModel": {"input": {"vocab_size": config.vocab_size, "pad_vocab_size_multiple": 1}},
        "MixerModel": {
            "input": {"d_model": config.hidden_size, "n_layer": len(config.layer_types), "lm_head_prenorm": "layer"}
        },
    }
    start = 0
    while start < len(config.layer_types):
        ssm, stop = start in config.ssm_layers, start + 1
        while stop < len(config.layer_types) and (stop in config.ssm_layers) == ssm:
            stop += 1
        shape = decoder_shape(config.base_config)
        attention = {
            "attn_type": "eager",
            "num_attention_heads": shape.num_heads,
            "num_key_value_heads": shape.num_kv_heads,
        }
        written[f"Block{start}-{stop - 1}"] = {
            "n_layers": stop - start,
            "BlockType": "modules.phi_block",
            "block_input": {"resid_dropout": config.base_config.resid_pdrop},
            "CoreType": "modules.mixers." + ("discrete_mamba2" if ssm else "phi_attention"),
            "core_input": _write_discrete(config) if ssm else attention,
        }
        start = stop
    return written


def read_llamba(config: dict[str, Any]) -> HybridConfig:
    _check_options(config, {"norm_epsilon": NORM_EPS, "lm_head_bias": False}, "config.json")
    mixer = _discrete(config["ssm_cfg"], config["d_model"], "ssm_cfg")
    vocab_size, mlp = _padded({"pad_vocab_size_multiple": 8, **config}), config["mlp_cfg"]
    llama3 = vocab_size == 128256
    base = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=config["d_model"],
        intermediate_size=mlp["intermediate_size"],
        mlp_bias=mlp["bias"],
        hidden_act=mlp["act_fn"],
        num_hidden_layers=config["n_layer"],
        num_attention_heads=mixer["mixer_num_heads"],
        rms_norm_eps=NORM_EPS,
        tie_word_embeddings=config.get("tie_embeddings", False),
        # Llama 3's: begin of text; end of text, end of message, end of turn
        bos_token_id=128000 if llama3 else None,
        eos_token_id=[128001, 128008, 128009] if llama3 else None,
    )
    return HybridConfig(base_config=base, layer_types=[SSM_LAYER] * config["n_layer"], **mixer)


def write_llamba(config: HybridConfig) -> dict[str, Any]:
    base = config.base_config
    return {
        "model_type": "llamba",
        "vocab_size": config.vocab_size,
        "pad_vocab_size_multiple": 1,
        "tie_embeddings": config.tie_word_embeddings,
        "lm_head_bias": False,
        "d_model": config.hidden_size,
        "n_layer": len(config.layer_types),
        "resid_dropout": 0.0,
        "norm_epsilon": base.rms_norm_eps,
        "mlp_cfg": {"intermediate_size": base.intermediate_size, "bias": base.mlp_bias, "act_fn": base.hidden_act},
        "ssm_cfg": _write_discrete(config),
    }


def _write_discrete(config: HybridConfig) -> dict[str, Any]:
    return {
        "d_state": config.mixer_state_size,
        "n_v_heads": config.mixer_num_heads,
        "n_qk_heads": config.mixer_num_groups,
        "d_conv": config.mixer_conv_kernel,
        "conv_bias": True,
        "expand": config.mixer_num_heads * config.mixer_head_dim // config.hidden_size,
        "chunk_size": 128,
        "activation": "identity",
        "bias": False,
    }


def read_mamba_in_llama(base: Any, config: dict[str, Any]) -> HybridConfig:
    ssm, shape = config["ssm_cfg"], decoder_shape(base)
    _check_options(ssm, GROUPED_OPTIONS, "ssm_cfg")
    _check_options({"rms_norm_eps": base.rms_norm_eps}, {"rms_norm_eps": NORM_EPS}, "config.json")
    expected = {
        "d_inner": shape.num_heads * shape.head_dim,
        "d_xb": shape.num_kv_heads * shape.head_dim,
        "n_layer": shape.num_layers,
    }
    _check_options(config, expected, MAMBA_CONFIG)
    _check_options(ssm, {"ngroups": shape.num_heads, "d_state": shape.head_dim}, "ssm_cfg")
    kinds = attention_types(base)
    return HybridConfig(
        base_config=base,
        layer_types=[kinds[i] if i in config["attn_layers"] else SSM_LAYER for i in range(shape.num_layers)],
        mixer="mamba2",
        mixer_conv_kernel=ssm.get("d_conv", 4),
        mixer_bias=ssm.get("bias", False),
    )


def write_mamba_in_llama(config: HybridConfig, *, repeats_in_conv: bool = False) -> dict[str, Any]:
    base, shape = config.base_config, decoder_shape(config.base_config)
    return {
        "d_model": shape.hidden_size,
        "ssm_cfg": {
            "expand": 1,
            "ngroups": shape.num_heads,
            "d_state": shape.head_dim,
            "d_conv": config.mixer_conv_kernel,
            "bias": config.mixer_bias,
            **({"repeat_kv_before_conv": True} if repeats_in_conv else {}),
        },
        "rms_norm_eps": base.rms_norm_eps,
        "vocab_size": None,
        "d_inner": shape.num_heads * shape.head_dim,
        "d_xb": shape.num_kv_heads * shape.head_dim,
        "intermediate_size": base.intermediate_size,
        "hidden_act": base.hidden_act,
        "n_layer": shape.num_layers,
        "attn_layers": [i for i in range(shape.num_layers) if i not in config.ssm_layers],
    }
