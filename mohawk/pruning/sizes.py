"""From what a target says to the sizes of a model, and what a model of such sizes costs; configurations alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from mohawk.conversion.footprint import used_parameters
from mohawk.conversion.plan import parameter_kind
from mohawk.loading.describe import describe_layers
from mohawk.models.cutting.cuts import resolve_layers
from mohawk.models.cutting.sizes import (
    Sizes,
    attention_layers,
    base_config,
    check_sizes,
    sized_config,
    sizes_of,
    ssm_layers,
)
from mohawk.models.decoders import decoder
from mohawk.models.families import decoder_shape, needed_attention
from mohawk.models.formats.stock import mixer_in, stock_mixer

WIDTHS = ("all", "inner", "ffn")  # what a narrower model has less of: everything, heads and MLPs, MLPs


def target_sizes(config: Any, target: Any) -> Sizes:
    """The sizes that a target with sizes asks of a model of this configuration.

    target: has the attributes of `mohawk.pruning.recipe.TargetSection`. Heads follow kv heads that go, and state groups
    state heads where each has a group of its own.

    Raises:
        ValueError: sizes that the model cannot be cut to, in one line.
    """
    own = sizes_of(config)
    asked = {name: getattr(target, name) for name in asdict(own) if name not in ("layers", "vocabulary")}
    wanted = {name: value for name, value in asked.items() if value is not None}
    if target.layers is not None:
        layers = target.layers
        wanted["layers"] = layers if isinstance(layers, int) else len(resolve_layers(layers, own.layers))
    if wanted.get("kv_heads", 0) > own.kv_heads:  # or the heads that follow would be told
        raise ValueError(f"kv_heads: got {wanted['kv_heads']}, allowed: 1 to {own.kv_heads}, the model's own")
    if "kv_heads" in wanted and "heads" not in wanted:
        wanted["heads"] = wanted["kv_heads"] * (own.heads // own.kv_heads)
    if own.state_heads is not None and own.state_groups is not None:
        per_group = own.state_heads // own.state_groups
        if "state_heads" in wanted and "state_groups" not in wanted and per_group == 1:
            wanted["state_groups"] = wanted["state_heads"]
        if "state_groups" in wanted and "state_heads" not in wanted:
            wanted["state_heads"] = wanted["state_groups"] * per_group
    sizes = replace(own, **wanted)
    check_sizes(config, sizes)
    sized_config(config, sizes, spread(own.layers, sizes.layers))  # what the class itself does not allow
    return sizes


def present(config: Any, sizes: Sizes) -> Sizes:
    """The sizes as they are of a model that has lost all its attention or all its mixers: without those of them."""
    own = sizes_of(config)
    if own.state_heads is None:
        sizes = replace(sizes, state_heads=None, state_groups=None, state_size=None)
    if not attention_layers(config):
        sizes = replace(sizes, heads=own.heads, kv_heads=own.kv_heads)
    return sizes


def spread(layers: int, count: int) -> list[int]:
    """So many of the layers at equal distances: stands for those that scores will choose."""
    return [int((i + 0.5) * layers / count) for i in range(count)]


def unit(size: int) -> int:
    """Sizes between others are multiples of it: the power of two of about a 32nd of the whole that divides it."""
    power = 1
    while size % (power * 2) == 0 and power * 2 <= size / 32:
        power *= 2
    return power


def hidden_step(hidden: int, heads: int) -> int:
    """Hidden sizes are multiples of it: of the heads, as transformers' classes want, and of a power of two where that
    leaves eight steps at least."""
    power = unit(hidden)
    while power > 1 and math.lcm(power, heads) > hidden / 8:
        power //= 2
    return math.lcm(power, heads)


def between(config: Any, final: Sizes, share: float) -> Sizes:
    """The sizes of a round on the way from the model of a configuration: each in equal ratios from round to round,
    rounded to what the model's class can have."""
    if share >= 1:
        return final
    own = sizes_of(config)

    def on_the_way(name: str, step: int = 1) -> int:
        first, last = getattr(own, name), getattr(final, name)
        value = first * (last / first) ** share
        return first if first == last else min(first, max(last, round(value / step) * step))

    def grouped(heads: str, groups: str) -> dict[str, int]:
        count = on_the_way(groups)
        first, last = (getattr(s, heads) // getattr(s, groups) for s in (own, final))
        per_group = first if first == last else round(first * (last / first) ** share)
        return {groups: count, heads: count * per_group}

    sizes = {"layers": on_the_way("layers"), "ffn": on_the_way("ffn", unit(own.ffn))}
    if own.state_heads is not None and own.state_groups is not None:
        sizes |= grouped("state_heads", "state_groups") | {"state_size": on_the_way("state_size")}
    narrow = sizes | grouped("heads", "kv_heads")
    step = hidden_step(own.hidden, narrow["heads"])
    for hidden in (on_the_way("hidden", step), narrow["heads"] * decoder_shape(base_config(config)).head_dim):
        point = replace(own, **narrow, hidden=hidden)
        if final.hidden <= hidden <= own.hidden and allowed(config, point):
            return point
    return replace(own, **sizes)  # hidden and heads go in the last round


def allowed(config: Any, sizes: Sizes) -> bool:
    """Whether the model can be cut to these sizes."""
    try:
        sized_config(config, sizes, spread(config.num_hidden_layers, sizes.layers))
    except ValueError:
        return False
    return True


def empty_model(config: Any, convert: dict[str, Any] | None = None) -> PreTrainedModel:
    """The model of a configuration on the meta device; `convert`: then made a hybrid with these options."""
    with torch.device("meta"):
        config = copy.deepcopy(config)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=needed_attention(config))
        if convert is not None:
            from mohawk.models.from_teacher import hybrid_from_teacher

            model = hybrid_from_teacher(model, **convert)
    return model


def parameters_of(model: PreTrainedModel) -> tuple[int, int]:
    """(all parameters, those outside embedding and head), tied ones once."""
    both = (model.get_input_embeddings(), model.get_output_embeddings())
    ends = {id(p): p for part in both if part is not None for p in part.parameters()}
    total = sum(p.numel() for p in model.parameters())
    return total, total - sum(p.numel() for p in ends.values())


def flops_of(model: PreTrainedModel, context: int) -> float:
    """Floating-point operations of one decoded token after `context` others: 2 for each weight that it is multiplied
    with (of a mixture of experts, those of the experts it is sent to), the head's too; 4 x head size in each query head
    for each token that attention reaches; 6 for each entry of a mixer's state."""
    config, layers = base_config(model.config), decoder(model)[1]
    head = model.get_output_embeddings()
    assert head is not None  # of a causal language model
    found = 2.0 * sum(used_parameters(layer, config) for layer in layers) + 2 * head.weight.numel()
    for layer, described in zip(layers, describe_layers(model), strict=True):
        if described.token_bytes:
            shape = decoder_shape(config)
            reached = context if described.window is None else min(context, described.window)
            found += 4 * shape.num_heads * shape.head_dim * reached
            continue
        mixer = mixer_in(layer)
        stock = stock_mixer(mixer)
        entries = stock.state_elements if stock else mixer.num_heads * mixer.head_dim * mixer.state_size
        found += 6 * entries
    return found


def parameters_by_kind(model: PreTrainedModel) -> dict[str, int]:
    """Parameters of the embedding, the head (where it has its own), attention, mixers, MLPs and norms."""
    kinds: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        kind = parameter_kind(name, ssm_layers(model.config))
        kinds[kind] = kinds.get(kind, 0) + parameter.numel()
    return kinds


def narrower(config: Any, own: Sizes, width: str, steps: int = 64) -> list[Sizes]:
    """Sizes from `own` down to the narrowest, each axis of `width` by about the same share; without repetitions.

    Whole groups of heads go; with one group, its query heads. Only sizes that the model's class allows.
    """
    path: list[Sizes] = []
    head_dim = decoder_shape(base_config(config)).head_dim
    for i in range(steps):
        share = 1 - i / steps
        sizes = {"ffn": max(1, round(own.ffn * share / unit(own.ffn)) * unit(own.ffn))}
        if width != "ffn":
            if attention_layers(config):
                sizes |= _fewer_heads(own, "heads", "kv_heads", share)
            if own.state_heads is not None and own.state_groups is not None:
                sizes |= _fewer_heads(own, "state_heads", "state_groups", share)
        options = [own.hidden]
        if width == "all":
            heads = sizes.get("heads", own.heads)
            step = hidden_step(own.hidden, heads)
            # a multiple of the heads, or, where the class wants them to fill it, so many
            options = [
                min(max(1, round(own.hidden * share / step)) * step, own.hidden // step * step),
                heads * head_dim,
            ]
        for hidden in options:
            point = replace(own, **sizes, hidden=hidden)
            if 1 <= hidden <= own.hidden and allowed(config, point):
                if point not in path:
                    path.append(point)
                break
    return path


def _fewer_heads(own: Sizes, heads: str, groups: str, share: float) -> dict[str, int]:
    count, per_group = getattr(own, groups), getattr(own, heads) // getattr(own, groups)
    if count == 1:
        return {heads: max(1, round(per_group * share))}
    kept = max(1, round(count * share))
    return {groups: kept, heads: kept * per_group}


def sizes_line(sizes: Sizes) -> str:
    """The sizes in one line, such as `24 layers, hidden 576, ffn 1024, heads 9/3`."""
    line = f"{sizes.layers} layers, hidden {sizes.hidden}, ffn {sizes.ffn}, heads {sizes.heads}/{sizes.kv_heads}"
    if sizes.state_heads is not None:
        line += f", state {sizes.state_heads}/{sizes.state_groups} x {sizes.state_size}"
    return line


SIZES_HEADER = ["layers", "hidden", "ffn", "heads", "kv heads"]
STATE_HEADER = ["state heads", "groups", "state size"]


def sizes_header(sizes: Sizes) -> list[str]:
    return SIZES_HEADER + (STATE_HEADER if sizes.state_heads is not None else [])


def sizes_row(sizes: Sizes, of: Sizes | None = None) -> list[str]:
    """The cells under `sizes_header(of or sizes)`; a dash for what the model has not."""
    row: Sequence[int | None] = [sizes.layers, sizes.hidden, sizes.ffn, sizes.heads, sizes.kv_heads]
    if (of or sizes).state_heads is not None:
        row = [*row, sizes.state_heads, sizes.state_groups, sizes.state_size]
    return ["-" if value is None else f"{value:,}" for value in row]
