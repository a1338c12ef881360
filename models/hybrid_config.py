"""The configuration of a hybrid student: the decoder's own, which layers are replaced, and the mixers' shapes."""

from collections.abc import Collection, Mapping
from typing import Any, cast

from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from mohawk.models.call import CACHE
from mohawk.models.families import decoder_shape
from mohawk.models.mixer_names import is_layer
from mohawk.models.mixers import MIXERS
from mohawk.models.state_mixer import StateMixer

SSM_LAYER = "linear_attention"
# read from the base configuration so that tools and caches that ask the student's find them
_COPIED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window", "initializer_range",
    "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "final_logit_softcapping",
    "logit_scale", "logits_scaling",
)  # fmt: skip


class HybridConfig(PreTrainedConfig):
    """Configuration of a hybrid student.

    Args:
        base_config: configuration (or its dict) of the decoder whose attention is replaced.
        layer_types: one entry a layer: "linear_attention" (a mixer), "full_attention" or "sliding_attention".
        mixer: "mamba2", "discrete_mamba2", "gated_delta" or "kimi_delta", or one of these for every layer with a mixer,
            by the layer's index.
        mixer_num_heads, mixer_head_dim, mixer_state_size, mixer_num_groups, mixer_conv_kernel, mixer_bias: the mixers'
            shapes (see `SSMMixer`, `GatedDeltaMixer`, `KimiDeltaMixer`); heads and head dim default to the decoder's
            attention, state size to its head dim.
        mixer_norm_eps: of the mixers' output norm; default the decoder's rms_norm_eps.

    Raises:
        ValueError: an unknown mixer, layers that have none, or layer_types that do not fit the base configuration.
    """

    model_type = "mohawk_hybrid"
    sub_configs = {"base_config": AutoConfig}
    keys_to_ignore_at_inference = [CACHE]
    auto_map = {}  # TRL asks every configuration of a class that transformers does not know for one

    def __init__(
        self,
        base_config=None,
        layer_types=None,
        mixer="mamba2",
        mixer_num_heads=None,
        mixer_head_dim=None,
        mixer_state_size=None,
        mixer_num_groups=None,
        mixer_conv_kernel=4,
        mixer_bias=False,
        mixer_norm_eps=None,
        **kwargs,
    ):
        if isinstance(base_config, dict):
            base_config = dict(base_config)
            base_config = AutoConfig.for_model(base_config.pop("model_type"), **base_config)
        # What has no value here gets one from base_config, without which transformers alone makes one, to compare with.
        self.base_config: Any = base_config  # of any family
        self.mixer: str | dict[int, str] = mixer  # a name where all are of one
        self.mixer_num_heads = cast(int, mixer_num_heads)
        self.mixer_head_dim = cast(int, mixer_head_dim)
        self.mixer_state_size = cast(int, mixer_state_size)
        self.mixer_num_groups = cast(int, mixer_num_groups)
        self.mixer_conv_kernel: int = mixer_conv_kernel
        self.mixer_bias: bool = mixer_bias
        self.mixer_norm_eps: float | None = mixer_norm_eps
        self.layer_types = cast(list[str], layer_types)
        if base_config is not None:
            for name in _COPIED:
                if hasattr(base_config, name):
                    kwargs.setdefault(name, getattr(base_config, name))
            shape = decoder_shape(base_config)
            self.mixer_num_heads = mixer_num_heads or shape.num_heads
            self.mixer_head_dim = mixer_head_dim or shape.head_dim
            self.mixer_state_size = mixer_state_size or shape.head_dim
            self.mixer_num_groups = mixer_num_groups or self.mixer_num_heads
            self.layer_types = layer_types or attention_types(base_config)
            self.mixer = one_name(mixers_by_layer(mixer, self.ssm_layers), mixer)
        super().__init__(**kwargs)
        # set after, since the parent has its own ideas about a missing value
        if base_config is not None and len(self.layer_types) != base_config.num_hidden_layers:
            raise ValueError(
                f"layer_types: {len(self.layer_types)} entries for a model of {base_config.num_hidden_layers} layers"
            )

    @property
    def ssm_layers(self) -> list[int]:
        """Indices of the layers that have a mixer in place of attention."""
        return [i for i, kind in enumerate(self.layer_types or []) if kind == SSM_LAYER]

    @property
    def is_pure_ssm(self) -> bool:
        """Whether no attention layer is left."""
        return len(self.ssm_layers) == len(self.layer_types)

    @property
    def output_norm_eps(self) -> float:
        """Epsilon of the mixers' output norm."""
        if self.mixer_norm_eps is not None:
            return self.mixer_norm_eps
        return getattr(self.base_config, "rms_norm_eps", 1e-5)

    def mixer_of(self, layer_idx: int) -> str:
        """The name of one layer's mixer."""
        return self.mixer if isinstance(self.mixer, str) else self.mixer[layer_idx]

    @property
    def mixer_kinds(self) -> list[str]:
        """The names of the mixers that there are, in the order of their layers."""
        return [self.mixer] if isinstance(self.mixer, str) else list(dict.fromkeys(self.mixer.values()))

    @property
    def mixer_words(self) -> str:
        """The names of the mixers as text for a sentence: `mamba2, gated_delta and kimi_delta`."""
        *others, last = self.mixer_kinds
        return f"{', '.join(others)} and {last}" if others else last

    def keep_mixers(self, layers: Collection[int]) -> None:
        """The configuration of a student with attention in all but these layers, in place."""
        mixers = {i: self.mixer_of(i) for i in self.ssm_layers if i in layers}
        kinds = attention_types(self.base_config)
        self.layer_types = [SSM_LAYER if i in mixers else kind for i, kind in enumerate(kinds)]
        self.mixer = one_name(mixers, self.mixer_kinds[0])

    def make_mixer(self, layer_idx: int) -> StateMixer:
        """A freshly initialised mixer for one layer."""
        return MIXERS[self.mixer_of(layer_idx)](
            self.base_config.hidden_size,
            self.mixer_num_heads,
            self.mixer_head_dim,
            self.mixer_state_size,
            self.mixer_num_groups,
            self.mixer_conv_kernel,
            bias=self.mixer_bias,
            norm_eps=self.output_norm_eps,
            layer_idx=layer_idx,
        )


def mixers_by_layer(mixer: str | Mapping[int, str], layers: Collection[int]) -> dict[int, str]:
    """Layer -> the name of its mixer, for the layers that have one.

    mixer: one name for all, or a mapping that has an entry for each of them; its keys may be text, as JSON has them.

    Raises:
        ValueError: an unknown name, layers without one, or names for others.
    """
    if isinstance(mixer, Mapping):
        if wrong := [i for i in mixer if not is_layer(i)]:
            raise ValueError(f"mixer: got the key {wrong[0]!r}, allowed: layer indices counted from 0")
        named = {int(i): name for i, name in mixer.items()}
        if len(named) != len(mixer):
            raise ValueError("mixer: a layer is named twice")
    elif isinstance(mixer, str):
        named = dict.fromkeys(sorted(layers), mixer)
    else:
        raise ValueError(f"mixer: got {mixer!r}, allowed: a name, or a mapping from layer indices to names")
    for name in (mixer,) if isinstance(mixer, str) else named.values():
        if name not in list(MIXERS):
            raise ValueError(f"mixer: got {name!r}, allowed: {', '.join(MIXERS)}")
    if missing := sorted(set(layers) - set(named)):
        raise ValueError(f"mixer: says nothing of layers {missing}, which are replaced; name one for each of them")
    if strange := sorted(set(named) - set(layers)):
        raise ValueError(f"mixer: names layers {strange}, which are not replaced; leave them out")
    return {i: named[i] for i in sorted(layers)}


def one_name(mixers: dict[int, str], otherwise: Any) -> str | dict[int, str]:
    """One name where all mixers are of one; `otherwise` where there is none."""
    kinds = list(dict.fromkeys(mixers.values()))
    return mixers if len(kinds) > 1 else (kinds or [otherwise])[0]


def attention_types(base_config) -> list[str]:
    """The decoder's own layer types: what `layer_types` is before any layer is replaced."""
    own = getattr(base_config, "layer_types", None)
    if own is not None:
        return list(own)
    sliding = getattr(base_config, "sliding_window", None) is not None
    return ["sliding_attention" if sliding else "full_attention"] * base_config.num_hidden_layers


def longrope_limit(base_config) -> int | None:
    """How many tokens a text may have before longrope takes its other factors; None without longrope."""
    rope = getattr(base_config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    return rope.get("original_max_position_embeddings") or base_config.original_max_position_embeddings
