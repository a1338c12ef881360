"""Whether a model answers step by step, in chunks, with padding and turn by turn as it does in one full forward.

What every causal language model must do, and what a cache that is not found, a state that padding changed or a renamed
keyword break without an error. Each path is held against one forward of the same tokens without cache and padding.

An exported folder is checked in a process where mohawk is absent: that process gets this file, so nothing here may
import mohawk.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from transformers import PreTrainedModel

PATHS = {
    "steps": "prefill and steps",
    "chunks": "prefill in chunks",
    "left": "padding on the left",
    "right": "padding on the right",
    "middle": "padding in the middle",
    "turns": "a second turn, padded",
    "generate": "generate, and on with its cache",
}
LEFT_ALONE = ("steps", "chunks", "left", "generate")
STATES = {"linear_attention", "mamba"}  # kinds of layers that have one
# Stock classes that keep none of these promises: with padding, masks or several tokens on a cache they compute
# something else, and their steps round otherwise than a full forward
WITHOUT = ("mamba", "mamba2", "falcon_mamba")
TOKENS = 24
# of the largest logit: float32 rounding in another order stays well below (SmolLM2's 30 layers: 3e-6), and a forgotten
# state, bias or position far above; bfloat16's own rounding differs by a percent or two from path to path
# (`generate` hands out float32 logits)
TOLERANCE = {"float64": 1e-6, "float32": 5e-5, "bfloat16": 8e-2, "float16": 1e-2}


def inconsistencies(model: PreTrainedModel, ids: Tensor) -> dict[str, float]:
    """How far each of PATHS is from a full forward of the same tokens, as a share of the largest logit.

    Args:
        model: any causal language model of transformers, in eval mode.
        ids: (2, n) token ids, n at least 16; n tokens fit the model's positions.

    Returns:
        Key of PATHS -> largest absolute difference of logits / largest absolute logit; NaN where a logit is. Of the
        paths that its class can keep (`paths_of`).
    """
    import torch

    with torch.inference_mode():
        full = model(input_ids=ids, use_cache=False).logits.double()
        ways = {
            "steps": lambda: _cached(model, ids, [ids.shape[1] // 2, *[1] * (ids.shape[1] - ids.shape[1] // 2)]) - full,
            "chunks": lambda: _cached(model, ids, [1, 7, 2, ids.shape[1] - 10]) - full,
            **{side: functools.partial(_padded, model, ids, full, side) for side in ("left", "right", "middle")},
            "turns": lambda: _turns(model, ids, full),
            "generate": lambda: _generated(model, ids[:1]),
        }
        scale = full.abs().amax()
        return {path: float(ways[path]().abs().amax() / scale) for path in paths_of(model.config)}


def paths_of(config) -> tuple[str, ...]:
    """Which of PATHS a model of this configuration can keep.

    transformers' own classes with states (Bamba, Granite 4, Qwen3.5) let padding that comes after a token decay the
    state and fill the convolution; and its attention layers with a window count padding within it, which shows here
    where the window is as short as the texts. Of stock Mambas none is asked for.
    """
    if config.model_type in WITHOUT:
        return ()
    kinds = getattr(config, "layer_types", None)
    lets_padding_in = not hasattr(config, "base_config") and STATES & set(
        kinds or getattr(config, "layers_block_type", None) or ()
    )
    window = getattr(config, "sliding_window", None)
    short = window is not None and window < 2 * TOKENS and (kinds is None or "sliding_attention" in kinds)
    return LEFT_ALONE if lets_padding_in or short else tuple(PATHS)


def broken_paths(model: PreTrainedModel, found: dict[str, float]) -> str | None:
    """What of a model's `inconsistencies` is more than rounding, in one line, or None."""
    return broken_in(found, str(model.dtype).removeprefix("torch."))


def broken_in(found: Mapping[str, float], dtype: str) -> str | None:
    """As `broken_paths`, of a model whose parameters are of this dtype ("float32")."""
    allowed = TOLERANCE[dtype]
    # a NaN is not below anything
    broken = [f"{PATHS[path]} {share:.1g}" for path, share in found.items() if not share <= allowed]
    return f"{', '.join(broken)} of the largest logit ({allowed:.0e} allowed)" if broken else None


def some_tokens(model: PreTrainedModel) -> Tensor:
    """(2, n) random tokens of the model's vocabulary, the same each time."""
    import torch

    size = model.config.get_text_config().vocab_size
    return torch.randint(size, (2, TOKENS), generator=torch.Generator().manual_seed(0)).to(model.device)


def cache_name() -> str:
    """What the installed transformers calls the cache, in a forward's keywords and in its output."""
    from dataclasses import fields

    from transformers.modeling_outputs import CausalLMOutputWithPast

    return "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"


def positions_in(mask: Tensor) -> Tensor:
    """Positions of a row's tokens, as `generate` counts them: padding takes none."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def ask(model: PreTrainedModel, ids: Tensor, mask: Tensor, cache):
    """One forward on top of a cache: ids (b, n) are the last n of mask's columns. Returns (logits, cache)."""
    out = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions_in(mask)[:, -ids.shape[1] :],
        use_cache=True,
        **{cache_name(): cache},
    )
    return out.logits.double(), out[cache_name()]


def _cached(model, ids, lengths):
    """Logits (b, n, V) of pieces of these lengths on one cache."""
    import torch

    mask, cache, logits, start = torch.ones_like(ids), None, [], 0
    for length in lengths:
        part, cache = ask(model, ids[:, start : start + length], mask[:, : start + length], cache)
        logits.append(part)
        start += length
    return torch.cat(logits, 1)


def _placed(rows: list, side: str, width: int):
    """Rows of tokens in a batch that wide, padded with zeros on that side: (ids, mask, where each token is)."""
    import torch

    ids = torch.zeros(len(rows), width, dtype=rows[0].dtype, device=rows[0].device)
    mask, places = torch.zeros_like(ids), []
    for r, row in enumerate(rows):
        count, free = len(row), width - len(row)
        split = {"left": 0, "right": count, "middle": count // 2}[side]
        place = torch.arange(count, device=row.device)
        place = torch.where(place < split, place, place + free)
        ids[r, place], mask[r, place] = row, 1
        places.append(place)
    return ids, mask, places


def _padded(model, ids, full, side: str):
    """Differences of a batch of rows of unlike length, in one forward, and in a prefill and two steps after it."""
    import torch

    counts, width = (ids.shape[1] - 2, ids.shape[1] - 7), ids.shape[1] + 1
    rows = [ids[r, :count] for r, count in enumerate(counts)]
    batch, mask, places = _placed(rows, side, width)
    alone = model(
        input_ids=batch, attention_mask=mask, position_ids=positions_in(mask), use_cache=False
    ).logits.double()
    logits, cache = ask(model, batch, mask, None)
    differences = [
        (found[r, place] - full[r, : len(place)]).flatten()
        for found in (alone, logits)
        for r, place in enumerate(places)
    ]
    for step in range(2):
        tokens = torch.stack([ids[r, count + step] for r, count in enumerate(counts)])[:, None]
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        logits, cache = ask(model, tokens, mask, cache)
        differences += [logits[r, 0] - full[r, count + step] for r, count in enumerate(counts)]
    return torch.cat(differences)


def _turns(model, ids, full):
    """Differences of a second turn on the cache of the first, both padded, and of a step after it."""
    import torch

    first, second = (7, 4), (5, 7)
    batch, mask, _ = _placed([ids[r, :n] for r, n in enumerate(first)], "right", 8)
    _, cache = ask(model, batch, mask, None)
    rows = [ids[r, n : n + m] for r, (n, m) in enumerate(zip(first, second, strict=True))]
    batch, more, places = _placed(rows, "left", 8)
    mask = torch.cat([mask, more], 1)
    logits, cache = ask(model, batch, mask, cache)
    differences = [
        (logits[r, place] - full[r, n : n + len(place)]).flatten()
        for r, (n, place) in enumerate(zip(first, places, strict=True))
    ]
    ends = [n + m for n, m in zip(first, second, strict=True)]
    tokens = torch.stack([ids[r, end] for r, end in enumerate(ends)])[:, None]
    logits, _ = ask(model, tokens, torch.cat([mask, torch.ones_like(mask[:, :1])], 1), cache)
    return torch.cat([*differences, *(logits[r, 0] - full[r, end] for r, end in enumerate(ends))])


def _generated(model, ids):
    """Differences of what `generate` chose its tokens by, in a first turn and in a second one on its cache."""
    import torch

    prompt, more = ids[:, : ids.shape[1] // 2], ids[:, ids.shape[1] // 2 : ids.shape[1] // 2 + 3]
    differences, given = [], {}
    for text in (prompt, more):
        prompt = text if not given else torch.cat([prompt, text], 1)
        out = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), min_new_tokens=4, max_new_tokens=4, do_sample=False,
            temperature=None, top_p=None, top_k=None, pad_token_id=0, return_dict_in_generate=True, output_logits=True,
            **given,
        )  # fmt: skip
        chosen = torch.stack(out.logits, 1).float()
        full = model(input_ids=out.sequences, use_cache=False).logits.double()
        differences.append((chosen - full[:, prompt.shape[1] - 1 : -1]).flatten())
        prompt, given = out.sequences, {cache_name(): out[cache_name()]}
    return torch.cat(differences)
