"""Whether a model is causal, found out by a few tokens that it reads."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mohawk.errors import UserError, machines_own

if TYPE_CHECKING:
    from typing import TypeAlias

    from peft import PeftMixedModel, PeftModel
    from transformers import GenerationMixin, PreTrainedModel

    # What teachers and students are. peft's models around one pass on what they do not have themselves.
    CausalLM: TypeAlias = PreTrainedModel | PeftModel | PeftMixedModel

    class PlainCausalLM(PreTrainedModel, GenerationMixin):
        """A model of transformers that writes text, as its automatic class gives one."""


log = logging.getLogger(__name__)

GIVE = "give a decoder, which writes text from left to right (saved as ...ForCausalLM)"
FIXED = ("embed_positions", "pos_encoding")  # tables that do not train: of GPT-J and CodeGen, of CTRL
PROBED = 32  # tokens of a text that show whether a model is causal
_causal: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models that were found to be


def embedding_rows(model: CausalLM) -> int:
    """How many ids a model can read."""
    embedding = within_peft(model.get_input_embeddings())
    return getattr(embedding, "num_embeddings", None) or len(embedding.weight)


def position_rows(model: CausalLM) -> int | None:
    """How many tokens a model can read that looks their positions up in a table, as GPT-2 does; None of one that
    computes them, as rotary embeddings are."""
    plain = plain_model(model)
    config = plain.config.get_text_config()
    if config.model_type == "mpt":  # whose biases are made for so many
        return config.max_seq_len
    most = getattr(config, "max_position_embeddings", None)
    if not isinstance(most, int):
        return None
    words = within_peft(model.get_input_embeddings())
    tables = (module for module in plain.modules() if isinstance(module, nn.Embedding) and module is not words)
    # a few rows more than positions: OPT's begin at 2; RoBERTa's begin behind that of padding
    found = [table for table in tables if most <= table.num_embeddings <= most + 2]
    rows = [table.num_embeddings - _first_position(table) for table in found]
    fixed = (getattr(module, name, None) for module in plain.modules() for name in FIXED)
    rows += [len(table) for table in fixed if isinstance(table, Tensor) and table.dim() == 2]
    return min(rows, default=None)


def context_length(model: CausalLM) -> int | None:
    """How many tokens a model reads in one text: those of its table of positions, else what its configuration says."""
    if (rows := position_rows(model)) is not None:
        return rows
    return getattr(plain_model(model).config.get_text_config(), "max_position_embeddings", None)


def _first_position(table: nn.Embedding) -> int:
    """The row of a table of positions that is a text's first token's."""
    return vars(table).get("offset", 0 if table.padding_idx is None else table.padding_idx + 1)


def within_peft(module: Any) -> Any:
    for name in ("original_module", "base_layer"):  # peft's, a wrapper around an adapter around the module
        module = getattr(module, name, module)
    return module


def check_causal(model: Any, who: str) -> None:
    """UserError where a model's states at some tokens change with later ones, whatever its configuration says.

    It reads a few ids of its vocabulary, once. Nothing is found out, and nothing said, of a model that cannot be run as
    it is: weights without values or shared out among processes, kernels of another device than it is on now.
    who: what the message calls it.
    """
    model = plain_model(getattr(model, "_orig_mod", model))  # of torch.compile, which has nothing to gain here
    if model in _causal or model.get_input_embeddings() is None or model.get_output_embeddings() is None:
        return
    if any(p.is_meta or not p.numel() or hasattr(p, "full_tensor") for p in model.parameters()):
        return
    tokens, rows = PROBED // 2, embedding_rows(model)
    # evenly spread over the vocabulary, from behind its first ids, which are special ones in most
    text = (torch.arange(tokens) * max(1, rows // tokens) + rows // (2 * tokens)) % rows
    text = text.to(next(model.parameters()).device)
    try:
        ahead = _looks_ahead(model, text, model)
    except Exception as error:  # whatever the model lacks: the first pass is on a real batch, where it counts
        if machines_own(error) is not None:
            raise
        log.debug("%s: %s cannot be run yet: %s", who, type(model).__name__, error)
        return
    if ahead:
        raise UserError(f"{who}: {_told_ahead(model)}")
    _causal.add(model)


def check_causal_on(model: CausalLM, inputs: Mapping[str, Tensor], forward: Callable[..., Any]) -> None:
    """As `check_causal`, where that found nothing out, with the first real tokens of a batch's first row, alone: what a
    model does at padding is nobody's concern."""
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if plain_model(model) in _causal or model.get_output_embeddings() is None:
        return
    if ids is None or not len(ids) or ids.shape[1] < 2:
        return
    real = ids[0][mask[0].bool()] if mask is not None and mask.dim() == 2 else ids[0]
    if _looks_ahead(model, (real if len(real) > 1 else ids[0])[:PROBED], forward):
        raise UserError(f"model: {_told_ahead(model)}")


def plain_model(model: Any) -> PlainCausalLM:
    """The model itself, within peft's where that is around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _told_ahead(model: nn.Module) -> str:
    return f"got {type(model).__name__}: it is not causal: its states at a token change with later tokens; {GIVE}"


@torch.no_grad()
def _looks_ahead(model: CausalLM, text: Tensor, forward: Callable[..., Any]) -> bool:
    """Whether the states at the first half of a text, (n) ids, change with the second."""
    half = len(text) // 2
    other = text.clone()
    other[half:] = text[: len(text) - half].flip(0)  # tokens that the model surely takes
    seen: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        seen.append(args[0][:, :half])
        return (args[0][:, -1:],)

    output = model.get_output_embeddings()
    assert output is not None  # asked by both callers
    hook = output.register_forward_pre_hook(keep)
    training = [module for module in model.modules() if module.training]
    devices = [text.device] if text.device.type == "cuda" else []
    try:
        for module in training:  # dropout would change all states
            module.training = False
        for tokens in (text, other):
            with torch.random.fork_rng(devices):
                torch.manual_seed(0)
                forward(input_ids=tokens[None], use_cache=False)
    finally:
        hook.remove()
        for module in training:
            module.training = True
    before, after = seen
    # where shapes agree, rounding differs in mixtures of experts alone, by far less than the root of its unit
    return bool((after - before).norm() > torch.finfo(before.dtype).eps ** 0.5 * before.norm())
