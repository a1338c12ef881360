"""Structured cuts: a smaller model of the same class from some of the layers, neurons, heads and channels of a model.

`cut` takes indices for any axes at once, `keep_layers` layers alone. The model is left as it was; what comes back is an
ordinary checkpoint, and removing units that put out zero leaves the logits as they were to rounding: parameters.py
says how, sizes.py which sizes there are. Units keep their order.

What zero means for each axis
    ffn: the neuron's output (its row of gate or up, with biases, or its column of the down projection) is zero.
    heads: the output projection's columns, or the values, are zero; in OLMo 2, whose norms run over all heads, q (and k
        of a group that goes) as well.
    state heads: x (its rows of in_proj and convolution bias), or, where whole groups go, out_proj's columns; of a gated
        delta rule the values (their rows of the projection) or the output projection's columns.
    state dimensions: B or C (their rows of in_proj and convolution bias); of a gated delta rule, whose queries are
        divided by their norm, q and k (their rows of the projections).
    hidden: everything added to that channel of the residual stream is zero: its column of the embedding, its rows of
        output and down projections and their biases. In Phi, whose LayerNorms subtract the mean, a channel goes
        without a trace when it equals the mean of all channels, as a channel of zeros does in a stream whose mean is 0.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from mohawk.models.casting import cast
from mohawk.models.cutting.depth import Model, keep_any_layers
from mohawk.models.cutting.parameters import KeptUnits, folded_bias, folded_biases, kept_of, layer_parts, outer_parts
from mohawk.models.cutting.sizes import (
    Sizes,
    attention_layers,
    base_config,
    sized_config,
    sizes_of,
    ssm_layers,
)
from mohawk.models.decoders import decoder
from mohawk.models.families import FAMILIES, check_causal_lm, family_of
from mohawk.models.generation_settings import saveable
from mohawk.models.sharding import fill, materialise, whole_modules

PerLayer = Mapping[int, Sequence[int]]
# token ids in configurations and generation settings: those a model needs, and lists that may lose some
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id",
            "forced_eos_token_id")  # fmt: skip
_SUPPRESSED = ("suppress_tokens", "begin_suppress_tokens")


@dataclass(frozen=True, kw_only=True)
class Cut:
    """What is kept of a model along each axis; None: everything.

    Indices count the uncut model's units and layers, in any order. Where layers choose for themselves, a mapping from
    layer to indices has an entry for every kept layer that has such units (others are ignored), all of one length.

    Args:
        layers: decoder layers.
        hidden: channels of the residual stream.
        ffn: layer -> neurons of its MLP.
        heads: layer -> query heads of its attention; a kv head is kept if one of its query heads is, and every kept
            one must keep equally many.
        state_heads: layer -> heads of its mixer; of groups of B and C (keys and queries) the same holds.
        state_dims: layer -> for each group of the mixer (of the uncut one, in order) its state dimensions, all of one
            length; entries of groups that go are ignored.
        tokens: rows of the embedding and the head, which are then numbered anew in ascending order; see
            `mohawk.pruning.vocabulary` for a tokenizer that follows.
    """

    layers: Sequence[int] | None = None
    hidden: Sequence[int] | None = None
    ffn: PerLayer | None = None
    heads: PerLayer | None = None
    state_heads: PerLayer | None = None
    state_dims: Mapping[int, Sequence[Sequence[int]]] | None = None
    tokens: Sequence[int] | None = None

    def to_dict(self) -> dict:
        """As JSON holds it: lists, and layers as keys."""
        made: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Mapping):
                made[field.name] = {str(layer): _lists(indices) for layer, indices in value.items()}
            elif value is not None:
                made[field.name] = _lists(value)
        return made

    @classmethod
    def from_dict(cls, made: Mapping) -> "Cut":
        """What `to_dict` made, also after a turn through JSON."""
        given: dict[str, Any] = {
            name: {int(layer): indices for layer, indices in value.items()} if isinstance(value, Mapping) else value
            for name, value in made.items()
        }
        return cls(**given)


@torch.no_grad()
def cut(
    model: Model, what: Cut, *, dtype: torch.dtype | None = None, spread: Callable[[nn.Module], None] | None = None
) -> Model:
    """A smaller model of the same class, with what the cut keeps of the weights; the model is left as it was.

    Args:
        model: a causal LM of a supported family, or a `HybridForCausalLM`; whole, or in parts on several processes.
        what: the units that stay.
        dtype: of the smaller model's weights, also of those that are rescaled or folded into others; default the
            model's.
        spread: brings the smaller model into its parts, `mohawk.models.sharding.shard` for one: of a sharded model no
            process ever holds more than a layer or the embedding whole. None: it is whole.

    Returns:
        A model of the same class, device, mode and generation settings; its parameters are trainable.

    Raises:
        ValueError: indices out of range or given twice, nothing kept, layers that keep different numbers, groups left
            without a head, sizes the family's class or mixers of several kinds do not allow, or special tokens that
            would go, or a model that is no causal LM.
    """
    check_causal_lm(model, "cut")
    own = sizes_of(model.config)
    if what.heads is not None and not attention_layers(model.config):
        raise ValueError("heads: given, but the model has no attention layer; leave them out")
    layers = check_indices("layers", range(own.layers) if what.layers is None else what.layers, own.layers)
    hidden = None if what.hidden is None else check_indices("hidden", what.hidden, own.hidden)
    tokens = None if what.tokens is None else check_indices("tokens", what.tokens, own.vocabulary)
    kept = {i: _kept_units(model, what, i, own, hidden) for i in layers}
    sizes = _sizes(own, what, kept)
    config = sized_config(model.config, sizes, layers)
    generation = saveable(model.generation_config)
    if tokens is not None:
        _renumber(config, generation, tokens, own.vocabulary)
    with no_init_weights():  # all of them come from the model
        smaller = type(model)(config) if spread is None else _without_weights(type(model), config)
    weights = _cut_weights(model, layers, kept, _index(hidden, model.device), _index(tokens, model.device), dtype)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if spread is None:
        missing, unexpected = smaller.load_state_dict(dict(weights), strict=False, assign=True)
    else:
        cast(smaller, dtype or model.dtype)
        spread(smaller)
        materialise(smaller, model.device)
        missing, unexpected = _filled(smaller, weights)
    if set(missing) - tied or unexpected:
        raise RuntimeError(f"weights without a place: {unexpected}; without a source: {missing}")
    smaller.tie_weights()
    smaller.generation_config = generation
    # pyrefly: ignore[bad-argument-type]  # transformers wraps `to` and loses its parameters
    smaller = smaller.to(model.device) if spread is None else smaller
    return smaller.train(model.training)


def _filled(model: nn.Module, weights: Iterator[tuple[str, Tensor]]) -> tuple[list[str], list[str]]:
    """Writes whole weights into a model in parts; the names that got none, and those that the model does not have."""
    left, unknown = dict(model.named_parameters()), []
    for name, tensor in weights:
        if name in left:
            fill(left.pop(name), tensor)
        else:
            unknown.append(name)
    return list(left), unknown


def _without_weights(kind: type[Model], config) -> Model:
    """A model on the meta device, but for its buffers."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = kind(config)
    model.tie_weights()  # which making it empty has undone
    return model


def keep_layers(model: Model, layers: str | Sequence[int]) -> Model:
    """The model with some of its decoder layers, in their order: see `resolve_layers` for the words, and `cut`.

    Any causal LM of transformers: of a family that `cut` does not know, or does not cut, layers are found by structure
    (`mohawk.models.cutting.depth`). ValueError: bad layers, a model whose layers cannot change places, a hybrid with
    mixtures of experts, or a model that is no causal LM.
    """
    check_causal_lm(model, "cut")
    kept = resolve_layers(layers, len(decoder(model)[1]))
    kind = model.config.model_type
    by_structure = FAMILIES[kind].experts if kind in FAMILIES else kind not in ("mohawk_hybrid", "bamba")
    return keep_any_layers(model, kept) if by_structure else cut(model, Cut(layers=kept))


def resolve_layers(layers: str | Sequence[int], num_layers: int) -> list[int]:
    """Which layers are meant: indices, "every_second" (0, 2, 4, ..., as DistilBERT kept them), "first:k", "last:k", or
    "without:a-b", all but the contiguous block from layer a to layer b.

    Raises:
        ValueError: another word, indices out of range or given twice, or no layer at all.
    """
    if not isinstance(layers, str):
        return check_indices("layers", layers, num_layers)
    word, _, rest = layers.partition(":")
    allowed = "every_second, first:k, last:k, without:a-b, or a list of layer indices"
    try:
        if word == "every_second" and not rest:
            return list(range(0, num_layers, 2))
        if word in ("first", "last"):
            count = int(rest)
            if not 1 <= count <= num_layers:
                raise ValueError(f"layers: got {layers!r}; allowed: 1 to {num_layers} layers")
            return list(range(count)) if word == "first" else list(range(num_layers - count, num_layers))
        if word == "without":
            first, last = (int(part) for part in rest.split("-"))
            if not 0 <= first <= last < num_layers or last - first + 1 == num_layers:
                raise ValueError(
                    f"layers: got {layers!r}; allowed: a block within layers 0 to {num_layers - 1} that leaves a layer"
                )
            return [i for i in range(num_layers) if not first <= i <= last]
    except ValueError as error:
        if "allowed" in str(error):
            raise
    raise ValueError(f"layers: got {layers!r}, allowed: {allowed}")


def check_indices(name: str, indices: Sequence[int], size: int) -> list[int]:
    """The indices in ascending order. ValueError: none, out of range, or given twice."""
    found = sorted(int(i) for i in indices)
    if not found:
        raise ValueError(f"{name}: nothing would be kept; give at least one of 0 to {size - 1}")
    if wrong := [i for i in found if not 0 <= i < size]:
        raise ValueError(f"{name}: got {_listed(wrong)}, allowed: 0 to {size - 1}")
    if len(set(found)) != len(found):
        raise ValueError(f"{name}: {_listed([i for i in set(found) if found.count(i) > 1])} given twice")
    return found


def _kept_units(model: Model, what: Cut, layer: int, own: Sizes, hidden: list[int] | None) -> KeptUnits:
    device, is_state = model.device, layer in ssm_layers(model.config)
    kept = {"hidden": _index(hidden, device)}

    def of_layer(name: str, per_layer: Mapping):
        if layer not in per_layer:
            raise ValueError(f"{name}: no entry for layer {layer}, which is kept; every kept layer needs one")
        return per_layer[layer]

    if what.ffn is not None:
        kept["ffn"] = _index(check_indices(f"ffn of layer {layer}", of_layer("ffn", what.ffn), own.ffn), device)
    for name, groups_name, per_layer, here in (
        ("heads", "kv_heads", what.heads, not is_state),
        ("state_heads", "state_groups", what.state_heads, is_state),
    ):
        if per_layer is not None and here:
            count, groups = getattr(own, name), getattr(own, groups_name)
            heads = check_indices(f"{name} of layer {layer}", of_layer(name, per_layer), count)
            kept[name] = _index(heads, device)
            kept[groups_name] = _index(_groups(f"{name} of layer {layer}", heads, count // groups, groups_name), device)
    if what.state_dims is not None and own.state_groups is not None and own.state_size is not None and is_state:
        dims = list(of_layer("state_dims", what.state_dims))
        if len(dims) != own.state_groups:
            raise ValueError(
                f"state_dims of layer {layer}: got {len(dims)} lists, allowed: one for each of the mixer's "
                f"{own.state_groups} groups"
            )
        groups_kept = kept.get("state_groups")
        stay = range(own.state_groups) if groups_kept is None else groups_kept.tolist()
        checked = {g: check_indices(f"state_dims of layer {layer}, group {g}", dims[g], own.state_size) for g in stay}
        if len(lengths := {len(indices) for indices in checked.values()}) > 1:
            raise ValueError(f"state_dims of layer {layer}: groups keep {sorted(lengths)}, allowed: one number for all")
        some = next(iter(checked.values()))  # stands for the groups that go
        kept["state_dims"] = torch.tensor([checked.get(g, some) for g in range(own.state_groups)], device=device)
    return KeptUnits(**kept)


def _groups(where: str, heads: list[int], group: int, groups_name: str) -> list[int]:
    """The groups that heads are of; ValueError unless each keeps equally many."""
    counts: dict[int, int] = {}
    for head in heads:
        counts[head // group] = counts.get(head // group, 0) + 1
    if len(set(counts.values())) > 1:
        raise ValueError(
            f"{where}: {groups_name} {list(counts)} keep {list(counts.values())} heads; allowed: equally many of each "
            "one that stays"
        )
    return list(counts)


def _sizes(own: Sizes, what: Cut, kept: dict[int, KeptUnits]) -> Sizes:
    """The sizes after a cut; ValueError where layers keep different numbers."""
    sizes: dict[str, Any] = {
        "layers": len(kept),
        "vocabulary": own.vocabulary if what.tokens is None else len(what.tokens),
    }
    for name in ("hidden", "ffn", "heads", "kv_heads", "state_heads", "state_groups", "state_dims"):
        counts = {i: getattr(units, name).shape[-1] for i, units in kept.items() if getattr(units, name) is not None}
        size_name = "state_size" if name == "state_dims" else name
        if len(set(counts.values())) > 1:
            raise ValueError(
                f"{name}: layers keep different numbers ({_listed(sorted(set(counts.values())))}); a model of this "
                "class has one size for all of its layers"
            )
        sizes[size_name] = next(iter(counts.values()), getattr(own, size_name))
    return Sizes(**sizes)


def _cut_weights(
    model: Model,
    layers: list[int],
    kept: dict[int, KeptUnits],
    hidden: Tensor | None,
    tokens: Tensor | None,
    dtype: torch.dtype | None,
) -> Iterator[tuple[str, Tensor]]:
    """The smaller model's state dict, a tensor at a time."""
    names = [f"model.layers.{old}" for old in layers]
    for new, (old, (_, layer)) in enumerate(zip(layers, whole_modules(model, names), strict=True)):
        parts = layer_parts(layer, model.config, kept[old])
        extra = dict(folded_biases(layer, model.config, hidden))
        for name, tensor in layer.state_dict().items():
            module, _, last = name.rpartition(".")
            part = parts.get(module) or parts.get(name)
            if part is None or not tensor.is_floating_point():
                raise ValueError(
                    f"layer {old}: {name} ({tensor.dtype}) is no plain weight of this family; merge adapters and "
                    "dequantise before a cut"
                )
            tensor = tensor.to(dtype or tensor.dtype)
            if last == "bias" and module in extra:
                tensor = (tensor.double() + extra[module]).to(tensor.dtype)
            yield f"model.layers.{new}.{name}", kept_of(tensor, part, last)
    final = model.get_submodule(f"model.{family_of(model.config).final_norm}")
    outer = outer_parts(model, hidden, tokens)
    for module_name, module in whole_modules(model, outer):
        for name, tensor in module.state_dict().items():
            if module_name == "lm_head" and name == "weight" and model.config.tie_word_embeddings:
                continue
            tensor = tensor.to(dtype or tensor.dtype)
            if module_name == "lm_head" and name == "bias":
                extra = folded_bias(final, module, hidden)
                tensor = tensor if extra is None else (tensor.double() + extra).to(tensor.dtype)
            yield f"{module_name}.{name}", kept_of(tensor, outer[module_name], name)


def _renumber(config, generation, tokens: list[int], vocabulary: int) -> None:
    """Token ids in a configuration, its decoder's and generation settings, after a cut of a vocabulary of this size.

    Ids that are none of its tokens (-1, or beyond it, as defaults of some classes are) stay what they are.
    """
    new_id = {old: new for new, old in enumerate(tokens)}
    for settings in {id(one): one for one in (config, base_config(config), generation)}.values():
        for name in _SPECIAL:
            if (value := getattr(settings, name, None)) is None:
                continue
            ids = value if isinstance(value, (list, tuple)) else [value]
            if wrong := [i for i in ids if 0 <= i < vocabulary and i not in new_id]:
                raise ValueError(f"tokens: {name} {_listed(wrong)} would go; keep it")
            ids = [new_id.get(i, i) for i in ids]
            setattr(settings, name, ids if isinstance(value, (list, tuple)) else ids[0])
        for name in _SUPPRESSED:
            if getattr(settings, name, None) is not None:
                setattr(settings, name, [new_id[i] for i in getattr(settings, name) if i in new_id])


def _lists(indices: Sequence) -> list:
    values = indices.tolist() if hasattr(indices, "tolist") else indices
    return [_lists(value) if hasattr(value, "__iter__") else int(value) for value in values]


def _index(indices: Sequence[int] | None, device) -> Tensor | None:
    return None if indices is None else torch.tensor(indices, dtype=torch.int64, device=device)


def _listed(indices: Sequence[int]) -> str:
    return ", ".join(map(str, indices[:6])) + (", ..." if len(indices) > 6 else "")
