"""`HybridForCausalLM`: a decoder of a supported family in which some layers' `self_attn` is a mixer with a
state: Mamba-2's, Gated DeltaNet's or Kimi Delta Attention's.

The decoder itself (embeddings, norms, MLPs, rotary positions, masks, the attention layers that stay) is the family's
own transformers code; only attention modules are swapped. `layer_types` says which: "linear_attention" marks a layer
with a mixer and makes transformers' caches give it a conv and a recurrent state instead of keys and values.
"""

import copy

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
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple, logging

from mohawk.models.call import CACHE, documents_in, one_cache, refuse_unknown
from mohawk.models.delta_mixer import ForgetGate, GatedDeltaMixer, KimiDeltaMixer
from mohawk.models.families import check_supported, family_of, leaves_out_softcap, logit_factors, needed_attention
from mohawk.models.hybrid_config import SSM_LAYER, HybridConfig, longrope_limit
from mohawk.models.mixers import DiscreteMamba2Mixer, Mamba2Mixer
from mohawk.models.packed import changes_of, positions_in, positions_of, segments_of, starts_of, without_padding
from mohawk.models.state_mixer import StateMixer

logger = logging.get_logger(__name__)


# keywords of forward that only the loss reads
_OF_LOSS = ("ignore_index", "shift_labels")


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

    def initialize_weights(self) -> None:
        super().initialize_weights()
        # transformers asks the family's model about what is inside it, and that knows no mixers
        for module in self.modules():
            if isinstance(module, (StateMixer, ForgetGate)):
                self._init_weights(module)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if not isinstance(module, (StateMixer, ForgetGate)):
            return
        # mixers' own vectors are set where they are made; on loading, transformers asks only for what is missing
        named = module.named_parameters(recurse=False)
        missing = {name: p for name, p in named if not (p.is_meta or getattr(p, "_is_hf_initialized", False))}
        if missing:
            with torch.random.fork_rng(devices=[]):
                fresh = module.fresh()
            for name, parameter in missing.items():
                parameter.copy_(getattr(fresh, name))


class HybridForCausalLM(HybridPreTrainedModel, GenerationMixin):
    """A causal language model of attention and layers with mixers, used like any transformers model.

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
        if kwargs.get("output_router_logits"):
            raise ValueError(
                "forward: output_router_logits asks for the loss that balances experts, which a student's does not "
                "have; leave it out"
            )
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
        multiplied, divided = logit_factors(self.config)
        if multiplied != 1 or divided != 1:
            logits = logits * multiplied / divided
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
        """An empty cache: conv and recurrent state for mixers, keys and values where attention stays."""
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
        limit = longrope_limit(self.config.base_config)
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
            segment_ids, attention_mask = without_padding(segment_ids, attention_mask)
            if position_ids is None:
                position_ids = positions_of(segment_ids)
            elif not torch.equal(starts_of(position_ids.expand(b, -1)), changes_of(segment_ids)):
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
                    "keys says nothing to a layer with a state; give segment_ids for packed rows"
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
        """The mask as it came, or, in a family with windowed layers, one for each kind of layer that is left.

        The family's own code makes one for full layers too, whether there are any or not, and sizes them by the cache's
        first layer without and with a window; some versions of transformers take a layer with a state, which has no
        length, for one without. Here only attention layers are looked at.
        """
        kinds = set(getattr(self.model.config, "layer_types", None) or ())
        if kinds <= {"full_attention"}:
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


def _with_padding(decoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Where the decoder is called by itself, as for hidden states, its mixers are to hear of padding too."""
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    if "padding_mask" not in kwargs and isinstance(mask, Tensor) and mask.dim() == 2:
        kwargs = {**kwargs, "padding_mask": mask}
    return args, kwargs


AutoConfig.register("mohawk_hybrid", HybridConfig, exist_ok=True)
AutoModelForCausalLM.register(HybridConfig, HybridForCausalLM, exist_ok=True)

__all__ = [
    "DiscreteMamba2Mixer",
    "GatedDeltaMixer",
    "HybridConfig",
    "HybridForCausalLM",
    "KimiDeltaMixer",
    "Mamba2Mixer",
]
