"""Running a teacher one decoder layer at a time, and reading queries and keys off its attention.

Phases 1 and 2 compare layer by layer on the teacher's own hidden states, so the teacher is never run with all of its
layers' intermediate results alive: the caller walks the layers and keeps what it needs of one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mohawk.kernels.mixing.operands import AttentionMixing
from mohawk.models.families import decoder_layers, final_norm_name

RECORDING = "mohawk_recording"  # transformers refuses names with "sdpa" in them for models with a softcap
# what models hand to their attention that changes the matrix and is not in AttentionMixing
BEYOND = ("s_aux", "sinks", "position_bias", "indices", "block_indices")
ROWS = 256  # of scores at once: 32 heads x 256 x 2048 float32 scores are 64 MB


@dataclass
class LayerCall:
    """What the decoder passes to one layer besides hidden states: masks, positions, rotary tables."""

    args: tuple
    kwargs: dict


@dataclass
class AttentionRecord:
    """What one attention layer computed in its last call, before its softmax."""

    query: Tensor | None = None  # (b, h, n, d), after rotary embedding
    key: Tensor | None = None  # (b, kv heads, n, d)
    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    causal: bool = True
    output: Tensor | None = field(default=None, repr=False)  # (b, n, D), after the output projection
    value: Tensor | None = field(default=None, repr=False)  # (b, kv heads, n, values' d), where it is kept
    keeps_value: bool = False

    def mixing(self, segment_ids: Tensor | None = None) -> AttentionMixing:
        """The layer's mixing matrix softmax(mask(softcap(scale q k^T))), unmaterialised."""
        assert self.query is not None and self.key is not None  # the layer has run
        return AttentionMixing(
            self.query,
            self.key,
            scale=self.scale,
            window=self.window,
            segment_ids=segment_ids,
            softcap=self.softcap,
            causal=self.causal,
        )


class StandIn(nn.Module):
    """Takes a decoder layer's place in its model; what it does not have itself is read from the layer."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.__dict__["layer"] = layer  # not a submodule: it belongs to the model

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["layer"], name)  # attention_type and the like, read by some families


class _Recorder(StandIn):
    """Notes how the layer is called."""

    def __init__(self, layer: nn.Module, calls: list[LayerCall]):
        super().__init__(layer)
        self.calls = calls

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        self.calls.append(LayerCall(args, kwargs))
        return hidden_states


@torch.no_grad()
def layer_calls(
    model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, embedded: Tensor | None = None
) -> tuple[Tensor, list[LayerCall]]:
    """The input of the first decoder layer and the arguments of each, without running any of them.

    The family's own forward makes embeddings, masks and rotary tables, so nothing about a family is repeated here.

    Args:
        model: a causal LM; its decoder is left as it was.
        input_ids, position_ids: (b, n); positions that restart mark the documents of packed rows.
        embedded: (b, n, D) in place of what the embedding makes of the tokens.

    Returns:
        (hidden states (b, n, D), one LayerCall a layer).
    """
    layers, calls = decoder_layers(model), []
    body: Any = model.model
    body.layers = nn.ModuleList(_Recorder(layer, calls) for layer in layers)
    norm_name = final_norm_name(model)
    norm = getattr(body, norm_name)
    setattr(body, norm_name, nn.Identity())
    try:
        given = {"input_ids": input_ids} if embedded is None else {"inputs_embeds": embedded}
        hidden = body(**given, position_ids=position_ids, use_cache=False).last_hidden_state
    finally:
        body.layers = layers
        setattr(body, norm_name, norm)
    return hidden, calls


def _recording_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, **kwargs):
    for name in BEYOND:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__}: its attention has {name}, which queries and keys do not tell; "
                "its matrices cannot be compared"
            )
    for record in module.__dict__.get("mixing_records", ()):
        record.query, record.key = query, key
        scaling = kwargs.get("scaling")
        record.scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        record.window = kwargs.get("sliding_window")
        record.softcap = kwargs.get("softcap")
        causal = kwargs.get("is_causal")  # as sdpa finds it, where there is no mask
        record.causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
        record.value = value if record.keeps_value else None
    if kwargs.get("softcap") is not None:
        output = softcapped_attention(query, key, value, attention_mask, kwargs["scaling"], kwargs["softcap"])
        return output.transpose(1, 2).contiguous(), None
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)


def softcapped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, softcap: float
) -> Tensor:
    """Attention with bounded scores, softmax(mask(c tanh(scale q k^T / c))) v, which torch's sdpa does not have.

    Args:
        query: (b, h, n, d); key, value: (b, kv heads, m, d).
        mask: (b or 1, 1, n, m) bool, true where a token may look, as transformers makes it for sdpa; None: causal.
        scale, softcap: of the scores; c above.

    Returns:
        (b, h, n, d) in the query's dtype; ROWS rows of scores are alive at a time, softmax in float32.
    """
    n, m = query.shape[2], key.shape[2]
    key, value = (tensor.repeat_interleave(query.shape[1] // tensor.shape[1], 1) for tensor in (key, value))
    if mask is None:
        mask = torch.ones(n, m, dtype=torch.bool, device=query.device).tril(m - n)[None, None]
    parts = []
    for start in range(0, n, ROWS):
        rows = slice(start, start + ROWS)
        scores = softcap * torch.tanh(query[:, :, rows] @ key.transpose(-1, -2) * (scale / softcap))
        scores = scores.float().masked_fill(~mask[:, :, rows], torch.finfo(torch.float32).min)
        parts.append(torch.softmax(scores, -1).to(value.dtype) @ value)
    return torch.cat(parts, 2)


AttentionInterface.register(RECORDING, _recording_attention)
AttentionMaskInterface.register(RECORDING, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


@contextmanager
def recording_attention(model: Any) -> Iterator[None]:
    """Within it the model's attention runs through a registered function that can note queries and keys."""
    before = [(config, config._attn_implementation) for config in _configs(model)]
    model.set_attn_implementation(RECORDING)
    try:
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation


def _configs(model: nn.Module) -> list:
    """The configurations of a model and its parts, which may differ in their attention; outer ones first.

    Setting the attention of one sets that of those within it.
    """
    found, queue = {}, [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    while queue:
        config = queue.pop(0)
        found.setdefault(id(config), config)
        queue += [part for name in config.sub_configs if (part := getattr(config, name, None)) is not None]
    return list(found.values())


@contextmanager
def record(attention: nn.Module) -> Iterator[AttentionRecord]:
    """Notes queries, keys and output of one attention module's next call (under `recording_attention`)."""
    noted = AttentionRecord()

    def keep_output(module, args, result):
        noted.output = result[0]

    tag(attention, noted)
    hook = attention.register_forward_hook(keep_output)
    try:
        yield noted
    finally:
        hook.remove()
        untag(attention, noted)


def tag(module: nn.Module, noted: Any) -> None:
    """From here on a module's attention is noted in a record, beside those that it is noted in already."""
    module.__dict__.setdefault("mixing_records", []).append(noted)


def untag(module: nn.Module, noted: Any) -> None:
    """Ends that; nothing where it had ended."""
    kept = [one for one in module.__dict__.pop("mixing_records", ()) if one is not noted]
    if kept:
        module.__dict__["mixing_records"] = kept


def tagged(module: nn.Module, noted: Any) -> bool:
    """Whether a module's attention is noted in this record."""
    return any(one is noted for one in module.__dict__.get("mixing_records", ()))
