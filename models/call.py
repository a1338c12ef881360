"""How a forward is called: what the installed transformers calls its cache, and which keywords may be passed over.

transformers 5.24 renamed `past_key_values` to `cache`. A forward that takes unknown keywords in silence then starts
from an empty state at every step and answers wrongly without an error. So ours know both names, and refuse what they do
not know.
"""

from dataclasses import fields
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

# the keyword of a forward and of `generate`, and the field of what a forward returns
CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"

# where documents begin, as transformers tells its attention (`documents_in` reads them)
DOCUMENTS = ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
# keywords of transformers (its `TransformersKwargs`, and what its decoder layers hand to attention) that change nothing
# in a layer with a state: positions are rotary embeddings' business, the rest is about what is returned or counted
HARMLESS = frozenset(
    (
        "position_ids", "position_embeddings", "use_cache", "cache_position", "return_dict", "num_items_in_batch",
        "output_attentions", "output_hidden_states", "output_router_logits", *DOCUMENTS,
    )
)  # fmt: skip


def one_cache(where: str, cache: Any, past_key_values: Any) -> Any:
    """The cache of a call, under either of its names. Raises ValueError where both are given."""
    if cache is not None and past_key_values is not None:
        raise ValueError(f"{where}: cache and past_key_values are two names of one argument; give one")
    return past_key_values if cache is None else cache


def refuse_unknown(where: str, given: dict[str, Any]) -> None:
    """Raises TypeError for a keyword that is not harmless: what is not understood would be answered wrongly."""
    for name, value in given.items():
        if name == "is_causal" and value in (None, True):
            continue
        if name not in HARMLESS:
            raise TypeError(
                f"{where}: unexpected keyword argument {name!r}; with a transformers newer than those that mohawk was "
                "tested with (`mohawk doctor` says) this can be a renamed argument: install a tested version"
            )


def documents_in(where: str, segment_ids: Tensor | None, given: dict[str, Any]) -> Tensor | None:
    """(b, n) documents of packed rows: `segment_ids`, else `seq_idx` of the keywords.

    Raises ValueError where `cu_seq_lens_q` alone says that there are several.
    """
    if segment_ids is None:
        segment_ids = given.get("seq_idx")
    starts = given.get("cu_seq_lens_q")
    if segment_ids is None and starts is not None and len(starts) > 2:
        raise ValueError(
            f"{where}: cu_seq_lens_q says where documents begin to attention alone; give position_ids that restart, or "
            "segment_ids, for the layers with a state to know"
        )
    return segment_ids
