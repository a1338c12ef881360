"""Which rows and columns of each parameter a cut keeps, and what they are multiplied by so that nothing else changes.

A norm divides by the mean of squares over its channels, and the mean over fewer channels is another one, even if all
that went was zero. So the residual stream is multiplied by c = sqrt(kept / all) wherever something is added to it:
then its mean of squares is what it was, every norm sees the epsilon it was trained with, and what reads the stream is
divided by c. OLMo 2's norms over all heads of q and k are treated the same. (Gemma 2 multiplies its embedding by
sqrt(hidden_size), which is c times as much already.)

LayerNorm (Phi) also subtracts the mean: there a channel leaves no trace when it equals the mean of the stream.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, overload

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mohawk.models.delta_mixer import DeltaMixer, GatedDeltaMixer, KimiDeltaMixer
from mohawk.models.families import Family, decoder_shape, family_of
from mohawk.models.mixers import SSMMixer
from mohawk.models.state_mixer import StateMixer


@dataclass(frozen=True)
class KeptUnits:
    """Kept indices of one layer's parts, ascending: (k,) int64, or None for all.

    heads, kv_heads: of attention. state_heads, state_groups: of a mixer. state_dims: (groups, kept dimensions), for
    every group of the uncut mixer. hidden, ffn: channels and neurons.
    """

    hidden: Tensor | None = None
    ffn: Tensor | None = None
    heads: Tensor | None = None
    kv_heads: Tensor | None = None
    state_heads: Tensor | None = None
    state_groups: Tensor | None = None
    state_dims: Tensor | None = None


@dataclass(frozen=True)
class Part:
    """What is kept of one module's weight (rows, columns), or of a vector (rows); its bias goes with the rows.

    weight_factor multiplies weight + offset, bias_factor the bias. dim: which dimension rows are of.
    """

    rows: Tensor | None = None
    columns: Tensor | None = None
    dim: int = 0
    weight_factor: float = 1.0
    bias_factor: float = 1.0
    offset: float = 0.0

    def scaled(self, factor: float) -> "Part":
        """The same part, with what the module puts out multiplied: its weight and bias."""
        return replace(self, weight_factor=self.weight_factor * factor, bias_factor=self.bias_factor * factor)


def layer_parts(layer: Any, config, kept: KeptUnits) -> dict[str, Part]:
    """Module or vector of a decoder layer, by its name in the layer -> what a cut keeps of it."""
    family, c = family_of(config), _stream_factor(config, kept.hidden)
    mixer = isinstance(layer.self_attn, StateMixer)
    inner = _mixer_parts(layer.self_attn, kept) if mixer else _attention_parts(layer.self_attn, family, kept)
    output = layer.self_attn.output_name if mixer else family.output
    parts = {f"self_attn.{name}": part for name, part in inner.items()}
    parts |= {f"mlp.{name}": part for name, part in _mlp_parts(layer.mlp, family, kept).items()}
    writers = [f"self_attn.{output}", f"mlp.{family.mlp_output}"]
    for name in writers:
        parts[name] = parts[name].scaled(c)
    reading_norms = [family.input_norm] if family.input_norm else []
    reading_norms += [name for name in family.mlp_norms if name != _mlp_output_norm(family)]
    for name in reading_norms:
        parts[name] = Part(kept.hidden, weight_factor=1 / c, offset=family.norm_offset)
    for name in (family.output_norm, _mlp_output_norm(family)):
        if name is not None:
            parts[name] = Part(kept.hidden)
    if family.input_norm is None and kept.hidden is not None:  # attention and MLP read the stream as it is
        for name, part in parts.items():
            if part.columns is kept.hidden:
                parts[name] = replace(part, weight_factor=part.weight_factor / c)
    return parts


def outer_parts(model: PreTrainedModel, hidden: Tensor | None, tokens: Tensor | None) -> dict[str, Part]:
    """Embedding, final norm and head, by their names in the model -> what a cut keeps of them."""
    family, c = family_of(model.config), _stream_factor(model.config, hidden)
    embedding_factor = 1.0 if family.embedding_scale else c
    head_factor = embedding_factor if model.config.tie_word_embeddings else 1.0
    return {
        "model.embed_tokens": Part(tokens, hidden, weight_factor=embedding_factor),
        f"model.{family.final_norm}": Part(
            hidden, weight_factor=1 / c / head_factor, bias_factor=1 / head_factor, offset=family.norm_offset
        ),
        "lm_head": Part(tokens, hidden),  # of a tied head the bias alone is its own
    }


def folded_biases(layer: Any, config, hidden: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    """(module, what to add to its bias) for a layer whose norm has a bias.

    In a channel that equals the stream's mean, LayerNorm puts out its bias: a constant, which the projections behind
    it can take over.
    """
    family = family_of(config)
    if family.input_norm is None:
        return
    readers = [(f"self_attn.{name}", module) for name, module in layer.self_attn.named_children()]
    readers += [(f"mlp.{name}", getattr(layer.mlp, name)) for name in family.mlp_inputs] if family.parallel else []
    norm, output = getattr(layer, family.input_norm), getattr(layer.self_attn, "output_name", family.output)
    for name, module in readers:
        if name.split(".")[1] != output and isinstance(module, nn.Linear):
            if (extra := folded_bias(norm, module, hidden)) is not None:
                yield name, extra


def folded_bias(norm: Any, reader: Any, hidden: Tensor | None) -> Tensor | None:
    """(outputs,) what a norm's bias in channels that go contributes to a projection, None where there is nothing."""
    bias = getattr(norm, "bias", None)
    if bias is None or hidden is None or reader.bias is None:
        return None
    gone = torch.ones_like(bias, dtype=torch.bool).index_fill(0, hidden, False)
    return reader.weight[:, gone].double() @ bias[gone].double()


def kept_of(tensor: Tensor, part: Part, name: str) -> Tensor:
    """What a cut keeps of a parameter (its name ends in weight, bias or is a vector's own); a copy."""
    is_bias = name == "bias"
    kept = tensor
    if part.rows is not None:
        kept = kept.index_select(part.dim, part.rows)
    if part.columns is not None and not is_bias and tensor.dim() > 1:
        kept = kept.index_select(1, part.columns)
    factor = part.bias_factor if is_bias else part.weight_factor
    if factor != 1.0 and part.offset and not is_bias:
        return ((kept.double() + part.offset) * factor - part.offset).to(tensor.dtype)
    if factor != 1.0:
        return kept * factor
    return kept.clone() if kept is tensor else kept


@overload
def units(kept: Tensor, size: int, start: int = 0) -> Tensor: ...
@overload
def units(kept: Tensor | None, size: int, start: int = 0) -> Tensor | None: ...
def units(kept: Tensor | None, size: int, start: int = 0) -> Tensor | None:
    """Indices of the channels of kept units of so many channels each, behind `start` others; None for all of them."""
    if kept is None:
        return None
    return start + (kept[:, None] * size + torch.arange(size, device=kept.device)).flatten()


def _stream_factor(config, hidden: Tensor | None) -> float:
    return 1.0 if hidden is None else (len(hidden) / decoder_shape(_base(config)).hidden_size) ** 0.5


def _base(config):
    return getattr(config, "base_config", None) or config


def _mlp_output_norm(family: Family) -> str | None:
    """The norm of the MLP's output: families that normalise attention's output have it, and it is the last."""
    return None if family.output_norm is None else family.mlp_norms[-1]


def _attention_parts(attention: nn.Module, family: Family, kept: KeptUnits) -> dict[str, Part]:
    shape = decoder_shape(attention.config)
    d, h, g = shape.head_dim, shape.num_heads, shape.num_kv_heads
    q, kv = units(kept.heads, d), units(kept.kv_heads, d)
    parts = {family.output: Part(kept.hidden, q)}
    if family.fused_qkv is not None:
        rows = None
        if kept.heads is not None and kept.kv_heads is not None:
            pieces = (kept.heads, 0), (kept.kv_heads, h * d), (kept.kv_heads, (h + g) * d)
            rows = torch.cat([units(piece, d, start) for piece, start in pieces])
        parts[family.fused_qkv] = Part(rows, kept.hidden)
    else:
        parts |= {"q_proj": Part(q, kept.hidden), "k_proj": Part(kv, kept.hidden), "v_proj": Part(kv, kept.hidden)}
    for name, projection, heads, rows, count in (
        (family.query_norm, "q_proj", kept.heads, q, h * d),
        (family.key_norm, "k_proj", kept.kv_heads, kv, g * d),
    ):
        norm = None if name is None else getattr(attention, name, None)
        if name is None or norm is None:
            continue
        if norm.weight.shape[-1] == d:  # each head by itself, with a weight for all of them or for each
            parts[name] = Part(heads if norm.weight.dim() == 2 else None)
            continue
        factor = 1.0 if rows is None else (len(rows) / count) ** 0.5
        parts[name] = Part(rows, weight_factor=1 / factor)
        parts[projection] = parts[projection].scaled(factor)
    return parts


def _mlp_parts(mlp: nn.Module, family: Family, kept: KeptUnits) -> dict[str, Part]:
    size = getattr(mlp, family.mlp_output).in_features
    parts = {family.mlp_output: Part(kept.hidden, kept.ffn)}
    for name in family.mlp_inputs:
        pieces = getattr(mlp, name).out_features // size
        rows = None if kept.ffn is None else torch.cat([kept.ffn + i * size for i in range(pieces)])
        parts[name] = Part(rows, kept.hidden)
    return parts


def _mixer_parts(mixer: StateMixer, kept: KeptUnits) -> dict[str, Part]:
    h, p, g, size = mixer.num_heads, mixer.head_dim, mixer.num_groups, mixer.state_size
    device = mixer.output.weight.device
    heads = torch.arange(h, device=device) if kept.state_heads is None else kept.state_heads
    groups = torch.arange(g, device=device) if kept.state_groups is None else kept.state_groups
    dims = torch.arange(size, device=device).expand(g, -1) if kept.state_dims is None else kept.state_dims
    state = (groups[:, None] * size + dims[groups]).flatten()
    parts = {mixer.output_name: Part(kept.hidden, units(heads, p))}
    if isinstance(mixer, SSMMixer):
        parts |= _ssm_parts(mixer, kept.hidden, heads, state)
        if "norm" in parts:  # of each group's channels; its epsilon is set in the configuration
            parts["norm"] = replace(parts["norm"], weight_factor=(h * len(groups) / g / len(heads)) ** 0.5)
    else:
        assert isinstance(mixer, DeltaMixer)
        parts |= _delta_parts(mixer, kept.hidden, heads, state)
    return parts


def _ssm_parts(mixer: SSMMixer, hidden: Tensor | None, heads: Tensor, state: Tensor) -> dict[str, Part]:
    """The parts of a Mamba-2 mixer. state: which rows of B and of C stay."""
    inner = units(heads, mixer.head_dim)
    rows = {"x": inner, "B": state, "C": state, "z": inner, "decay": heads}
    slices = sorted(((part.start, name) for name, part in mixer.slices().items() if name in rows))
    parts = {
        "in_proj": Part(torch.cat([start + rows[name] for start, name in slices]), hidden),
        "conv1d": Part(torch.cat([inner, mixer.inner_size + state, mixer.inner_size + mixer.group_size + state])),
    }
    vectors = {"D": heads, "A_log": heads, "dt_bias": heads, "z_bias": inner, "norm": inner}
    return parts | {name: Part(index) for name, index in vectors.items() if hasattr(mixer, name)}


def _delta_parts(mixer: DeltaMixer, hidden: Tensor | None, heads: Tensor, state: Tensor) -> dict[str, Part]:
    """The parts of a delta rule's mixer. state: which rows of q and of k stay.

    The norm is of each head by itself; where a state has fewer dimensions, its epsilon is set in the configuration.
    """
    inner = units(heads, mixer.head_dim)
    qkv = torch.cat([state, mixer.group_size + state, 2 * mixer.group_size + inner])
    if isinstance(mixer, GatedDeltaMixer):
        parts = {"in_proj_qkv": Part(qkv, hidden), "in_proj_z": Part(inner, hidden), "norm": Part()}
        parts |= {name: Part(heads, hidden) for name in ("in_proj_b", "in_proj_a")}
        parts |= {name: Part(heads) for name in ("A_log", "dt_bias")}
    else:
        assert isinstance(mixer, KimiDeltaMixer)
        parts = {"q_proj": Part(state, hidden), "k_proj": Part(state, hidden), "v_proj": Part(inner, hidden)}
        parts |= {"b_proj": Part(heads, hidden), "o_norm": Part()}
        # by way of as many channels as a head has, which stay
        parts |= {"g_a_proj": Part(None, hidden), "g_b_proj": Part(inner)}
        parts |= {"forget_gate.f_a_proj": Part(None, hidden), "forget_gate.f_b_proj": Part(state)}
        parts |= {"forget_gate.A_log": Part(heads, dim=2), "forget_gate.dt_bias": Part(state)}
    return parts | {"conv1d": Part(qkv)}
