"""Which of unlike layers stay over several rounds: in the end the mix that a budget was priced with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mohawk.models.cutting.sizes import base_config, ssm_layers
from mohawk.pruning.importance import Importance, chosen_layers


def layer_kinds(config: Any) -> list[str]:
    """What a layer's cost depends on: its mixer, or the attention's kind (full_attention, sliding_attention, ...)."""
    mixers = set(ssm_layers(config))
    types = getattr(base_config(config), "layer_types", None) or ["attention"] * config.num_hidden_layers
    return [config.mixer_of(i) if i in mixers else types[i] for i in range(config.num_hidden_layers)]


def mix_of(config: Any, layers: Sequence[int]) -> Counter[str]:
    """How many of each kind some layers are."""
    kinds = layer_kinds(config)
    return Counter(kinds[i] for i in layers)


def chosen_with_mix(
    importance: Importance, count: int, layers: str | Tensor, kinds: Sequence[str], least: Mapping[str, int]
) -> list[int]:
    """So many layers, ascending, as `chosen_layers` has them, but of each kind at least so many.

    Where every contiguous block would take too many of a kind, single layers go.

    Raises:
        ValueError: fewer layers than `least` has together, or a kind of which there are not so many.
    """
    present = Counter(kinds)
    if count < sum(least.values()) or any(present[kind] < number for kind, number in least.items()):
        raise ValueError(f"layers: {count} of {dict(present)} cannot be at least {dict(least)}")
    kept = chosen_layers(importance, count, layers)
    if _enough(kept, kinds, least):
        return kept
    scores = layers.double() if isinstance(layers, Tensor) else importance.layers
    if isinstance(layers, str) and layers == "block":
        gone = len(kinds) - count
        starts = range(count + 1)
        left = {start: [i for i in range(len(kinds)) if not start <= i < start + gone] for start in starts}
        if fit := [start for start in starts if _enough(left[start], kinds, least)]:
            return left[min(fit, key=lambda start: float(scores[start : start + gone].sum()))]
    order = torch.sort(scores, descending=True, stable=True).indices.tolist()
    needed, kept = Counter(least), []
    for i in order:
        if needed[kinds[i]] > 0:
            needed[kinds[i]] -= 1
            kept.append(i)
    others = [i for i in order if i not in kept]
    return sorted(kept + others[: count - len(kept)])


def _enough(kept: Sequence[int], kinds: Sequence[str], least: Mapping[str, int]) -> bool:
    found = Counter(kinds[i] for i in kept)
    return all(found[kind] >= number for kind, number in least.items())
