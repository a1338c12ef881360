"""Importance without a text, to compare with: by chance, and by the size of weights."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange, reduce
from torch import Tensor
from transformers import PreTrainedModel

from mohawk.models.cutting.sizes import attention_layers, sizes_of, ssm_layers
from mohawk.models.delta_mixer import DeltaMixer, GatedDeltaMixer, KimiDeltaMixer
from mohawk.models.families import attention_parts, family_of
from mohawk.models.mixers import SSMMixer
from mohawk.models.sharding import reshard, whole, whole_modules
from mohawk.models.state_mixer import StateMixer
from mohawk.pruning.importance import Importance


def random_importance(config, seed: int = 0) -> Importance:
    """Uniform scores for a model of this configuration. ValueError: an unsupported one."""
    own, generator = sizes_of(config), torch.Generator().manual_seed(seed)
    attention, ssm = attention_layers(config), ssm_layers(config)
    heads, groups, size = own.state_heads or 0, own.state_groups or 0, own.state_size or 0

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    return Importance(
        layers=draw(own.layers),
        hidden=draw(own.hidden),
        ffn=draw(own.layers, own.ffn),
        heads=draw(len(attention), own.heads),
        kv_heads=draw(len(attention), own.kv_heads),
        state_heads=draw(len(ssm), heads),
        state_groups=draw(len(ssm), groups),
        state_dims=draw(len(ssm), groups, size),
        attention_layers=tuple(attention),
        ssm_layers=tuple(ssm),
        method=f"random, seed {seed}",
    )


@torch.no_grad()
def magnitude_importance(model: PreTrainedModel) -> Importance:
    """The L2 norm of all projection weights that make a unit or read it, without norms and biases.

    A layer: all its projections. A hidden channel: its column of the embedding, its rows of what is added to the
    residual stream and its columns of what reads it. A group of heads: its keys and values (or B and C) and its heads.

    Of a model in parts all processes must ask; a layer at a time is whole.

    Raises:
        ValueError: an unsupported model.
    """
    own, family = sizes_of(model.config), family_of(model.config)
    plain: Any = model  # of its family's own class
    reshard(model)
    hidden = _columns(whole(plain.model.embed_tokens.weight))
    if not plain.config.tie_word_embeddings:
        hidden = hidden + _columns(whole(plain.lm_head.weight))
    layers, ffn, heads, kv_heads, state_heads, state_groups, state_dims = ([] for _ in range(7))
    layer: Any
    for _, layer in whole_modules(model, [f"model.layers.{i}" for i in range(own.layers)]):
        readers = [getattr(layer.mlp, name).weight for name in family.mlp_inputs]
        down = getattr(layer.mlp, family.mlp_output).weight
        # a fused projection holds gate and values one below the other
        ffn.append(_columns(down) + sum(reduce(_rows(w), "(parts f) -> f", "sum", f=own.ffn) for w in readers))
        if isinstance(layer.self_attn, StateMixer):
            mixer, written = layer.self_attn, layer.self_attn.output.weight
            inner, state, each, read = _mixer_weights(mixer)
            inner = reduce(_columns(written) + inner, "(h p) -> h", "sum", h=mixer.num_heads) + each
            dims = rearrange(state, "(g N) -> g N", g=mixer.num_groups)
            state_heads.append(inner)
            state_dims.append(dims)
            state_groups.append(reduce(inner, "(g h) -> g", "sum", g=mixer.num_groups) + dims.sum(-1))
            readers += read
        else:
            parts = attention_parts(layer.self_attn)
            written = parts.o.weight
            query = reduce(_columns(written) + _rows(parts.q.weight), "(h d) -> h", "sum", h=own.heads)
            shared = reduce(_rows(parts.k.weight) + _rows(parts.v.weight), "(g d) -> g", "sum", g=own.kv_heads)
            heads.append(query)
            kv_heads.append(shared + reduce(query, "(g h) -> g", "sum", g=own.kv_heads))
            readers += [parts.q.weight, parts.k.weight, parts.v.weight]
        hidden = hidden + _rows(written) + _rows(down) + sum(_columns(weight) for weight in readers)
        layers.append(_rows(written).sum() + _rows(down).sum() + sum(_rows(weight).sum() for weight in readers))

    def table(rows: list[Tensor], *size: int) -> Tensor:
        return torch.stack(rows).sqrt() if rows else torch.zeros(0, *size, dtype=torch.float64)

    groups = own.state_groups or 0
    return Importance(
        layers=table(layers),
        hidden=hidden.sqrt(),
        ffn=table(ffn),
        heads=table(heads, own.heads),
        kv_heads=table(kv_heads, own.kv_heads),
        state_heads=table(state_heads, own.state_heads or 0),
        state_groups=table(state_groups, groups),
        state_dims=table(state_dims, groups, own.state_size or 0),
        attention_layers=tuple(attention_layers(model.config)),
        ssm_layers=tuple(ssm_layers(model.config)),
        method="magnitude",
    )


def _mixer_weights(mixer: StateMixer) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Sums of squares of what makes a mixer's channels (h*p), its state dimensions (g*N) and its heads (h); and the
    weights that read the residual stream."""
    if isinstance(mixer, SSMMixer):
        rows = {name: _rows(mixer.in_proj.weight[part]) for name, part in mixer.slices().items()}
        return rows["x"] + rows["z"], rows["B"] + rows["C"], rows["decay"], [mixer.in_proj.weight]
    assert isinstance(mixer, DeltaMixer)
    rows = {name: _rows(weight) for name, weight in mixer.input_weights().items()}
    if isinstance(mixer, GatedDeltaMixer):
        z, heads = _rows(mixer.in_proj_z.weight), _rows(mixer.in_proj_b.weight) + _rows(mixer.in_proj_a.weight)
        read = [mixer.in_proj_qkv, mixer.in_proj_z, mixer.in_proj_b, mixer.in_proj_a]
    else:
        assert isinstance(mixer, KimiDeltaMixer)
        forget = mixer.forget_gate
        z, heads = _rows(mixer.g_b_proj.weight), _rows(mixer.b_proj.weight)
        rows["k"] = rows["k"] + _rows(forget.f_b_proj.weight)
        read = [mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.b_proj, mixer.g_a_proj, forget.f_a_proj]
    return rows["v"] + z, rows["q"] + rows["k"], heads, [projection.weight for projection in read]


def _rows(weight: Tensor) -> Tensor:
    """(rows,) sums of squares, float64."""
    return weight.double().square().sum(1).cpu()


def _columns(weight: Tensor) -> Tensor:
    return weight.double().square().sum(0).cpu()
