"""The sizes of a decoder or hybrid that pruning changes, and the configuration of a model of other sizes.

transformers' classes have one size an axis for the whole model: layers may keep different units, never different
numbers of them.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, fields

from mohawk.models.cutting.depth import LAYER_LISTS
from mohawk.models.delta_mixer import DeltaMixer
from mohawk.models.families import check_supported, decoder_shape, family_of
from mohawk.models.hybrid_config import one_name
from mohawk.models.mixers import MIXERS, Mamba2Mixer


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of a model, one an axis.

    Args:
        layers: decoder layers.
        hidden: channels of the residual stream.
        ffn: neurons of each MLP.
        heads, kv_heads: query heads of each attention layer, and key-value heads they share.
        state_heads, state_groups, state_size: heads of each mixer, groups of B and C (keys and queries) they share, and
            state dimensions of each group; None in a model without mixers.
        vocabulary: rows of the embedding and the head.
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    state_heads: int | None = None
    state_groups: int | None = None
    state_size: int | None = None
    vocabulary: int


def sizes_of(config) -> Sizes:
    """The sizes in a supported decoder's or hybrid's configuration.

    ValueError: an unsupported family, or one whose MLPs are mixtures of experts.
    """
    base = base_config(config)
    if base.model_type == "bamba":
        raise ValueError("a Bamba is cut as the hybrid it is: from_bamba(model), the cut, to_bamba")
    check_supported(base, "cut")
    if family_of(base).experts:
        raise ValueError(
            f"model_type {base.model_type!r} cannot be cut; its MLPs are mixtures of experts, which no cut knows; "
            "whole layers can go before a conversion: keep_layers, or student.layers of `mohawk distill`"
        )
    shape = decoder_shape(base)
    mixer = {}
    if ssm_layers(config):
        mixer = {
            "state_heads": config.mixer_num_heads,
            "state_groups": config.mixer_num_groups,
            "state_size": config.mixer_state_size,
        }
    return Sizes(
        layers=shape.num_layers,
        hidden=shape.hidden_size,
        ffn=base.intermediate_size,
        heads=shape.num_heads,
        kv_heads=shape.num_kv_heads,
        vocabulary=config.vocab_size,
        **mixer,
    )


def base_config(config):
    """A decoder's configuration, or that of the decoder within a hybrid."""
    return getattr(config, "base_config", None) or config


def ssm_layers(config) -> list[int]:
    """Indices of the layers with mixers; none in a plain decoder."""
    return config.ssm_layers if hasattr(config, "base_config") else []


def attention_layers(config) -> list[int]:
    """Indices of the layers that are attention."""
    replaced = set(ssm_layers(config))
    return [i for i in range(config.num_hidden_layers) if i not in replaced]


def check_sizes(config, sizes: Sizes) -> None:
    """Raises ValueError, in one line, for sizes that no cut of this model has."""
    own = sizes_of(config)
    check_sizes_within(own, sizes)
    if not attention_layers(config):
        for name in ("heads", "kv_heads"):
            if getattr(sizes, name) != getattr(own, name):
                raise ValueError(f"{name}: got {getattr(sizes, name)}, but the model has no attention layer; leave it")


def check_sizes_within(own: Sizes, sizes: Sizes) -> None:
    """`check_sizes` for a model of these own sizes."""
    for field in fields(Sizes):
        target, size = getattr(sizes, field.name), getattr(own, field.name)
        if target == size:
            continue
        if size is None:
            raise ValueError(f"{field.name}: got {target}, but the model has no mixer")
        if target is None or not 1 <= target <= size:
            raise ValueError(f"{field.name}: got {target}, allowed: 1 to {size}, the model's own")
    _check_groups("heads", sizes.heads, "kv_heads", sizes.kv_heads, own.heads // own.kv_heads)
    if own.state_heads is not None and own.state_groups is not None:
        per_group = own.state_heads // own.state_groups
        # pyrefly: ignore[bad-argument-type]  # whose sizes are there where the model's own are
        _check_groups("state_heads", sizes.state_heads, "state_groups", sizes.state_groups, per_group)


def _check_groups(heads_name: str, heads: int, groups_name: str, groups: int, most: int) -> None:
    if heads < groups:
        raise ValueError(
            f"{heads_name}: got {heads} for {groups_name} {groups}, which leaves groups without a head; allowed: "
            f"multiples of {groups} up to {groups * most}, or fewer {groups_name}"
        )
    if heads % groups or heads // groups > most:
        raise ValueError(
            f"{heads_name}: got {heads} for {groups_name} {groups}; allowed: multiples of {groups} up to "
            f"{groups * most} ({most} a group in the model)"
        )


def sized_config(config, sizes: Sizes, layers: Sequence[int] | None = None):
    """The configuration of the model cut to these sizes; a copy.

    Args:
        config: of a supported decoder or of a hybrid.
        sizes: see `check_sizes`.
        layers: which layers are kept, ascending, as many as sizes says; by default the first ones. What a
            configuration says of single layers (layer_types, windows, layers without rotary positions) follows them.

    Raises:
        ValueError: sizes that are no cut of the model, or that the family's class has no configuration for.
    """
    check_sizes(config, sizes)
    own = sizes_of(config)
    layers = list(range(sizes.layers)) if layers is None else list(layers)
    if len(layers) != sizes.layers:
        raise ValueError(f"layers: got {len(layers)} indices for {sizes.layers} layers")
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    base = base_config(config)
    shape = decoder_shape(base)
    changes = {
        "num_hidden_layers": sizes.layers,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.ffn,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "vocab_size": sizes.vocabulary,
    }
    if sizes.hidden // sizes.heads != shape.head_dim or getattr(base, "head_dim", None) is not None:
        changes["head_dim"] = shape.head_dim
    for one in {id(config): config, id(base): base}.values():
        for name, value in changes.items():
            if getattr(one, name, None) != value:
                setattr(one, name, value)
        if sizes.layers != own.layers:
            _keep_layer_entries(one, layers)
    if own.state_heads is not None:
        config.mixer_num_heads, config.mixer_num_groups = sizes.state_heads, sizes.state_groups
        config.mixer_state_size = sizes.state_size
        if (factor := _norm_factor(config.mixer_kinds, own, sizes)) != 1:
            config.mixer_norm_eps = config.output_norm_eps * factor
    _check_class(base, shape.head_dim)
    return config


def _norm_factor(mixers: Sequence[str], own: Sizes, sizes: Sizes) -> float:
    """What the epsilon of the mixers' output norm is multiplied by, so that nothing changes where zeros went.

    Mamba-2's norm takes the mean over the heads of a group. A gated delta rule's queries have norm N^-0.5, so that its
    outputs are larger where N is smaller, which the norm takes out again.

    Raises:
        ValueError: mixers of both kinds, which have one epsilon, and sizes that change it for one of them.
    """
    assert own.state_heads and own.state_groups and own.state_size  # a model with states has all three
    assert sizes.state_heads and sizes.state_groups and sizes.state_size
    fewer_heads = own.state_heads // own.state_groups * sizes.state_groups / sizes.state_heads
    factors = {}
    for name in mixers:
        if issubclass(MIXERS[name], DeltaMixer):
            factors[name] = own.state_size / sizes.state_size
        elif issubclass(MIXERS[name], Mamba2Mixer):
            factors[name] = fewer_heads
    if len(set(factors.values())) > 1:
        *others, last = factors
        axis = "state_size" if own.state_size != sizes.state_size else "state_heads"
        raise ValueError(
            f"{axis}: got {getattr(sizes, axis)}; allowed in a student of {', '.join(others)} and {last} mixers: "
            f"{getattr(own, axis)}, since it changes the epsilon of the norms of some and not of others"
        )
    return next(iter(factors.values()), 1.0)


def _keep_layer_entries(config, layers: list[int]) -> None:
    for name in LAYER_LISTS:
        if isinstance(entries := getattr(config, name, None), (list, tuple)):
            setattr(config, name, [entries[i] for i in layers])
    if isinstance(mixers := getattr(config, "mixer", None), dict):
        left = {new: mixers[old] for new, old in enumerate(layers) if old in mixers}
        config.mixer = one_name(left, config.mixer_kinds[0])
    if getattr(config, "max_window_layers", None) is not None:
        config.max_window_layers = sum(i < config.max_window_layers for i in layers)


def _check_class(base, head_dim: int) -> None:
    """What transformers' own classes refuse, or read differently than a head dim of its own."""
    hidden, heads = base.hidden_size, base.num_attention_heads
    size = f"hidden {hidden} with {heads} heads of {head_dim}"
    if getattr(base, "qk_layernorm", False) and hidden // heads != head_dim:
        raise ValueError(
            f"{size}: {type(base).__name__} with qk_layernorm makes its norms of hidden // heads channels; allowed: "
            "sizes with hidden // heads equal to the head dim"
        )
    try:
        base.validate()
    except Exception as error:  # huggingface_hub's wrapper of the class's own ValueError; its last line says what
        reason = str(error).strip().splitlines()[-1].strip()
        raise ValueError(f"{size}: {type(base).__name__} does not allow it: {reason}") from error
