"""`HybridForCausalLM`: a decoder of a supported family in which some layers' `self_attn` is a Mamba-2 mixer.

The decoder itself (embeddings, norms, MLPs, rotary positions, masks, the attention layers that stay) is the family's
own transformers code; only attention modules are swapped. `layer_types` says which: "linear_attention" marks a Mamba-2
layer and makes transformers' caches give that layer a conv and a recurrent state instead of keys and values.
"""

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple, logging

from mohawk.models.call import CACHE, documents_in, one_cache, refuse_unknown
from mohawk.models.families import check_supported, decoder_shape, family_of, leaves_out_softcap, needed_attention
from mohawk.models.mixers import MIXERS, DiscreteMamba2Mixer, Mamba2Mixer, SSMMixer

logger = logging.get_logger(__name__)

SSM_LAYER = "linear_attention"
# read from the base configuration so that tools and caches that ask the student's find them
_COPIED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window", "initializer_range",
    "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "final_logit_softcapping",
)  # fmt: skip


# keywords of forward that only the loss reads
_OF_LOSS = ("ignore_index", "shift_labels")


class HybridConfig(PreTrainedConfig):
    """Configuration of a hybrid student.

    Args:
        base_config: configuration (or its dict) of the decoder whose attention is replaced.
        layer_types: one entry a layer: "linear_attention" (Mamba-2), "full_attention" or "sliding_attention".
        mixer: "mamba2" or "discrete_mamba2".
        mixer_num_heads, mixer_head_dim, mixer_state_size, mixer_num_groups, mixer_conv_kernel, mixer_bias: the mixers'
            shapes (see `SSMMixer`); heads and head dim default to the decoder's attention, state size to its head dim.
        mixer_norm_eps: of the mixers' output norm; default the decoder's rms_norm_eps.

    Raises:
        ValueError: unknown mixer, or layer_types that do not fit the base configuration.
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
        self.mixer: str = mixer
        self.mixer_num_heads = cast(int, mixer_num_heads)
        self.mixer_head_dim = cast(int, mixer_head_dim)
        self.mixer_state_size = cast(int, mixer_state_size)
        self.mixer_num_groups = cast(int, mixer_num_groups)
        self.mixer_conv_kernel: int = mixer_conv_kernel
        self.mixer_bias: bool = mixer_bias
        self.mixer_norm_eps: float | None = mixer_norm_eps
        self.layer_types = cast(list[str], layer_types)
        if base_config is not None:
            if mixer not in MIXERS:
                raise ValueError(f"mixer: got {mixer!r}, allowed: {', '.join(MIXERS)}")
            for name in _COPIED:
                if hasattr(base_config, name):
                    kwargs.setdefault(name, getattr(base_config, name))
            shape = decoder_shape(base_config)
            self.mixer_num_heads = mixer_num_heads or shape.num_heads
            self.mixer_head_dim = mixer_head_dim or shape.head_dim
            self.mixer_state_size = mixer_state_size or shape.head_dim
            self.mixer_num_groups = mixer_num_groups or self.mixer_num_heads
            self.layer_types = layer_types or attention_types(base_config)
        super().__init__(**kwargs)
        # set after, since the parent has its own ideas about a missing value
        if base_config is not None and len(self.layer_types) != base_config.num_hidden_layers:
            raise ValueError(
                f"layer_types: {len(self.layer_types)} entries for a model of {base_config.num_hidden_layers} layers"
            )

    @property
    def ssm_layers(self) -> list[int]:
        """Indices of the layers that are Mamba-2."""
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

    def make_mixer(self, layer_idx: int) -> SSMMixer:
        """A freshly initialised mixer for one layer."""
        return MIXERS[self.mixer](
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


def attention_types(base_config) -> list[str]:
    """The decoder's own layer types: what `layer_types` is before any layer is replaced."""
    own = getattr(base_config, "layer_types", None)
    if own is not None:
        return list(own)
    sliding = getattr(base_config, "sliding_window", None) is not None
    return ["sliding_attention" if sliding else "full_attention"] * base_config.num_hidden_layers


class StateCache(DynamicCache):
    """The cache of a student without attention layers: states only, and a count of the tokens they have seen.

    transformers reads a cache's length from its first attention layer, and `generate` needs the length. The student
    counts its tokens here, padding among them, as an attention layer's cache would.
    """

    is_compileable = False

    def __init__(self, config: HybridConfig):
        super().__init__(config=config)
        self.seen = 0

    @property
    def is_linear(self) -> list[bool]:
        # transformers takes a cache of linear layers for one that does not know its length: asked to go on with it,
        # generate would read the whole text again on top of the states
        return [False] * len(self.layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def reset(self) -> None:
        super().reset()
        self.seen = 0


class HybridPreTrainedModel(PreTrainedModel):
    config_class = HybridConfig
    config: HybridConfig  # pyrefly: ignore[bad-override-mutable-attribute]  # as every model of transformers has its own
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = [CACHE]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False
    _is_stateful = True  # a state cannot be cut back, as speculative decoding would: generate refuses it

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # mixers' own vectors are set where they are made; on loading, transformers asks only for what is missing
        super()._init_weights(module)
        if isinstance(module, SSMMixer) and any(p.is_meta for p in module.parameters(recurse=False)):
            return
        if isinstance(module, SSMMixer):
            fresh = self.config.make_mixer(module.layer_idx)
            for name, parameter in module.named_parameters(recurse=False):
                if not getattr(parameter, "_is_hf_initialized", False):
                    parameter.copy_(getattr(fresh, name))


class HybridForCausalLM(HybridPreTrainedModel, GenerationMixin):
    """A causal language model of attention and Mamba-2 layers, used like any transformers model.

    `forward` takes what the family's own model takes, and `segment_ids` (b, n) for packed rows: attention, conv and
    state then stay inside each document. Without it, packing is recognised from `seq_idx`, or from `position_ids` that
    restart, by the rule transformers' attention masks follow. A packed row has no cache: there is nothing to continue
    it with, and asking for one is a ValueError. `generate`, beam search, padded batches and `save_pretrained` work as
    for other transformers models; the cache is transformers' own, under both of its names, `cache` and
    `past_key_values`. Padding may lie anywhere in a row: an `attention_mask` (b, tokens so far) of zeros and ones says
    where, and the row's tokens are then answered as if they stood next to each other (but in attention layers with a
    window, where padding counts, as in transformers). A keyword that is not known is a TypeError.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: HybridConfig):
        super().__init__(config)
        check_supported(config.base_config)
        if leaves_out_softcap(config.base_config):
            config.base_config._attn_implementation = needed_attention(config.base_config)
        self.model = AutoModel.from_config(config.base_config)
        for i in config.ssm_layers:
            self.model.layers[i].self_attn = config.make_mixer(i)
        self.model.register_forward_pre_hook(_with_padding, with_kwargs=True)
        self.vocab_size = config.vocab_size
        bias = family_of(config).head_bias
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=bias)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache=None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        segment_ids: Tensor | None = None,
        past_key_values=None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        of_loss = {name: kwargs.pop(name) for name in _OF_LOSS if name in kwargs}
        body = self.body(
            input_ids,
            attention_mask,
            position_ids,
            one_cache("forward", cache, past_key_values),
            inputs_embeds,
            use_cache,
            segment_ids,
            **kwargs,
        )
        hidden = body.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        logits = self.lm_head(hidden if isinstance(kept, int) else hidden[:, kept])
        if (cap := self.logit_softcap) is not None:
            logits = cap * torch.tanh(logits / cap)
        loss = None
        if labels is not None:
            of_loss |= {name: value for name, value in kwargs.items() if name == "num_items_in_batch"}
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **of_loss)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=body.hidden_states,
            attentions=body.attentions,
            **{CACHE: body[CACHE] if CACHE in body else None},
        )

    @property
    def logit_softcap(self) -> float | None:
        """Bound c of the logits, c tanh(logits / c), where the family has one (Gemma 2)."""
        return getattr(self.config, "final_logit_softcapping", None)

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """As in transformers; the decoder's own configuration follows, so that the student loads again."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        for config in (self.config.base_config, self.model.config):
            config.vocab_size = self.config.vocab_size
        self.vocab_size = self.config.vocab_size
        return embeddings

    def new_cache(self) -> DynamicCache:
        """An empty cache: conv and recurrent state for Mamba-2 layers, keys and values where attention stays."""
        return StateCache(self.config) if self.config.is_pure_ssm else DynamicCache(config=self.config)

    # pyrefly: ignore[bad-override]  # whatever its other parameters are from one release to the next
    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        if generation_config.prefill_chunk_size and model_kwargs.get("inputs_embeds") is not None:
            raise ValueError(
                "prefill_chunk_size cuts input_ids into chunks, and inputs_embeds were given; leave it out"
            )
        if self.config.is_pure_ssm and generation_config.use_cache:
            given = model_kwargs.get(CACHE)
            if given is not None and not isinstance(given, StateCache):
                raise ValueError(
                    f"{CACHE}: got {type(given).__name__}, but no attention layer is left to read its length "
                    "from; leave it out, or give new_cache() of this student: its states never grow"
                )
            if generation_config.cache_implementation in ("static", "offloaded_static"):
                logger.warning_once(
                    f"cache_implementation={generation_config.cache_implementation!r} changes nothing in a student "
                    "without attention layers: its states have one size anyway, and generate does not compile its steps"
                )
            if given is None:
                model_kwargs[CACHE] = StateCache(self.config)
            return None
        # pyrefly: ignore[bad-argument-type]
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids,
        cache=None,
        attention_mask=None,
        inputs_embeds=None,
        position_ids=None,
        past_key_values=None,
        **kwargs,
    ):
        cache = one_cache("generate", cache, past_key_values)
        # transformers' Phi-3 does the same: longrope turns every position differently once the text is longer than the
        # model's first training, so the keys that were cached until then are made anew
        limit = _longrope_limit(self.config.base_config)
        if limit and cache is not None and not self.config.is_pure_ssm and 0 < cache.get_seq_length() <= limit:
            masked = attention_mask is not None and attention_mask.dim() == 2
            length = attention_mask.shape[1] if masked else input_ids.shape[1]
            if length > limit:
                if input_ids.shape[1] < length and inputs_embeds is not None:  # the prompt came as embeddings alone
                    inputs_embeds = torch.cat([inputs_embeds, self.get_input_embeddings()(input_ids)], 1)
                    kwargs["is_first_iteration"] = True
                cache, position_ids = None, None
                kwargs["next_sequence_length"] = None
                if masked:
                    position_ids = positions_in(attention_mask)
        return super().prepare_inputs_for_generation(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            **{CACHE: cache},
            **kwargs,
        )

    def body(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        cache=None,
        inputs_embeds=None,
        use_cache=None,
        segment_ids=None,
        past_key_values=None,
        **kwargs,
    ):
        """Everything but the head: the decoder's output, with `last_hidden_state` (b, n, D) after the final norm."""
        refuse_unknown(f"{type(self).__name__}.forward", kwargs)
        cache = one_cache("forward", cache, past_key_values)
        inputs = input_ids if input_ids is not None else inputs_embeds
        if inputs is None:
            raise ValueError("forward needs input_ids or inputs_embeds")
        b, n = inputs.shape[:2]
        if segment_ids is None and position_ids is not None and attention_mask is None and cache is None:
            segment_ids = segments_of(position_ids.expand(b, -1))
        segment_ids = documents_in("forward", segment_ids, kwargs)
        kwargs.pop("seq_idx", None)
        if segment_ids is not None:
            # attention knows documents by positions that restart, and looks for them where there is no mask
            segment_ids, attention_mask = _without_padding(segment_ids, attention_mask)
            if position_ids is None:
                position_ids = positions_of(segment_ids)
            elif not torch.equal(starts_of(position_ids.expand(b, -1)), _changes(segment_ids)):
                raise ValueError("position_ids must restart where segment_ids change, and only there; leave them out")
        if segment_ids is not None:
            if use_cache or cache is not None:
                raise ValueError(
                    "packed rows (segment_ids, or position_ids that restart) cannot be cached: attention would cross "
                    "the documents; leave the cache out and use_cache unset"
                )
            use_cache = False
        if use_cache is None:
            use_cache = cache is not None or (not self.training and getattr(self.config, "use_cache", True))
        if use_cache and cache is None:
            cache = self.new_cache()
        padding_mask = None
        if isinstance(attention_mask, dict):  # generate() prepares one mask a layer type for static caches
            padding_mask = attention_mask.get(SSM_LAYER)
            others = {kind: mask for kind, mask in attention_mask.items() if kind != SSM_LAYER}
            kinds = getattr(self.config.base_config, "layer_types", None)
            if kinds is not None:  # the decoder looks for all of its kinds, also those no layer is left of
                attention_mask = {kind: others.get(kind) for kind in set(kinds)}
            else:
                attention_mask = next(iter(others.values()), others)
        elif attention_mask is not None:
            if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
                raise ValueError(
                    f"attention_mask must be (batch, tokens), got {tuple(attention_mask.shape)}: a mask of queries by "
                    "keys says nothing to a Mamba-2 layer; give segment_ids for packed rows"
                )
            padding_mask = attention_mask[:, -n:]
            # without padding there is less to do, but asking a GPU makes each decoding step wait for the last
            if (n > 1 or padding_mask.device.type == "cpu") and bool(padding_mask.all()):
                padding_mask = None
            seen = cache.get_seq_length() if cache is not None else 0
            if position_ids is None and attention_mask.shape[1] == seen + n and not bool(attention_mask.all()):
                position_ids = positions_in(attention_mask)[:, -n:]
        if cache is not None and not isinstance(attention_mask, dict) and not self.config.is_pure_ssm:
            attention_mask = self._masks_by_kind(attention_mask, cache, position_ids, b, n)
        if self.config.is_pure_ssm:
            # no attention layer: transformers cannot size a mask from such a cache, and nothing here needs one
            attention_mask = inputs.new_zeros((1, 1, 1, 1), dtype=torch.bool)
            if position_ids is None:
                position_ids = torch.arange(n, device=inputs.device)[None]
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            segment_ids=segment_ids,
            padding_mask=padding_mask,
            **{CACHE: cache},
            **kwargs,
        )
        if isinstance(cache, StateCache):
            cache.seen += n
        return output

    def _masks_by_kind(self, attention_mask, cache, position_ids, b: int, n: int):
        """The mask as it came, or, in a family with windowed and full layers, one for each kind that is left.

        The family's own code would size them by the cache's first layer without and with a window, and some versions of
        transformers take a Mamba-2 layer, which has no length, for one without; here only attention layers are looked
        at.
        """
        kinds = set(getattr(self.model.config, "layer_types", None) or ())
        if len(kinds) < 2:
            return attention_mask
        attention = copy.copy(cache)
        attention.layers = [
            layer for layer, kind in zip(cache.layers, self.config.layer_types, strict=False) if kind != SSM_LAYER
        ]
        make = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
        sizes = torch.empty((b, n, 0), dtype=self.dtype, device=self.device)  # stands for the embeddings
        return {
            kind: make[kind](
                config=self.model.config,
                inputs_embeds=sizes,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **{CACHE: attention},
            )
            if kind in self.config.layer_types
            else None
            for kind in kinds
        }


def _longrope_limit(base_config) -> int | None:
    """How many tokens a text may have before longrope takes its other factors; None without longrope."""
    rope = getattr(base_config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    return rope.get("original_max_position_embeddings") or base_config.original_max_position_embeddings


def positions_in(attention_mask: Tensor) -> Tensor:
    """(b, n) positions of a row's tokens, 0, 1, ... from its first one on; padding (0 in the mask) takes none."""
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)


def _with_padding(decoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Where the decoder is called by itself, as for hidden states, its mixers are to hear of padding too."""
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    if "padding_mask" not in kwargs and isinstance(mask, Tensor) and mask.dim() == 2:
        kwargs = {**kwargs, "padding_mask": mask}
    return args, kwargs


def _without_padding(segment_ids: Tensor, mask: Tensor | None) -> tuple[Tensor, None]:
    """Padding as segments of its own, -1, in the place of a mask."""
    if mask is None:
        return segment_ids, None
    if not isinstance(mask, Tensor) or mask.shape != segment_ids.shape:
        raise ValueError(
            f"attention_mask of packed rows must be {tuple(segment_ids.shape)}, as segment_ids, got {tuple(mask.shape)}"
        )
    real, changes = mask.bool(), _changes(segment_ids)
    goes_on = torch.nn.functional.pad(real[:, :-1], (1, 0)) & ~changes  # from a real token of the same document
    begins = torch.zeros_like(segment_ids).scatter_add_(1, changes.long().cumsum(1), (real & ~goes_on).to(segment_ids))
    if bool((begins > 1).any()):
        raise ValueError("attention_mask of packed rows: padding within a document; put it behind or in front of one")
    padded = torch.where(real, segment_ids, -1)
    return padded, None


def starts_of(position_ids: Tensor) -> Tensor:
    """(b, n) where a document begins after the first: positions do not go on. transformers' own packing rule."""
    return position_ids.diff(dim=-1, prepend=position_ids[:, :1] - 1) != 1


def _changes(segment_ids: Tensor) -> Tensor:
    return segment_ids.diff(dim=-1, prepend=segment_ids[:, :1]) != 0


def segments_of(position_ids: Tensor) -> Tensor | None:
    """(b, n) segment ids of rows whose positions restart, or None when none does."""
    starts = starts_of(position_ids)
    return starts.cumsum(-1) if bool(starts.any()) else None


def positions_of(segment_ids: Tensor) -> Tensor:
    """(b, n) positions that restart at 0 with each segment."""
    index = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
    starts = segment_ids.diff(dim=-1, prepend=segment_ids[:, :1] - 1) != 0
    return index - torch.where(starts, index, 0).cummax(-1).values


AutoConfig.register("mohawk_hybrid", HybridConfig, exist_ok=True)
AutoModelForCausalLM.register(HybridConfig, HybridForCausalLM, exist_ok=True)

__all__ = ["DiscreteMamba2Mixer", "HybridConfig", "HybridForCausalLM", "Mamba2Mixer"]
