"""A tokenizer as the fields of a GGUF file, from which llama.cpp turns text into the same tokens.

llama.cpp has two that Hugging Face's fast BPE tokenizers are: "gpt2", on bytes, where a name stands for how text is cut
first (src/llama-vocab.cpp has the list); and "llama", SentencePiece's, which joins the two pieces whose union has the
highest score, here minus the rank of the merge that makes it.
"""

import json
import re
from typing import Any

from transformers import PreTrainedTokenizerBase

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # gguf.TokenType

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
LINES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = SHORT + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + LINES
QWEN2 = SHORT + r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + LINES
SEED = SHORT + r"\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+" + LINES
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + LINES
)
# how text is cut, and whether a word that is a token is never merged from parts -> llama.cpp's name for it
CUTS: dict[tuple[tuple[str, ...], bool], str] = {
    ((GPT2,), False): "gpt-2",
    (("digits", GPT2), False): "smollm",
    ((LLAMA3,), True): "llama-bpe",
    ((LLAMA3,), False): "smaug-bpe",
    ((QWEN2,), False): "qwen2",
    ((SEED,), False): "seed-coder",
    ((TEKKEN,), True): "tekken",
}
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def vocabulary(tokenizer: PreTrainedTokenizerBase | None, vocab_size: int) -> dict[str, Any]:
    """Fields of a GGUF file for a tokenizer: tokens, their kinds, merges or scores, special tokens, chat templates.

    tokenizer: None for a file that takes token ids alone. vocab_size: of the model; ids that the tokenizer lacks are
    unused.

    Raises:
        ValueError: a tokenizer that llama.cpp does not have, with what it is that it lacks.
    """
    if tokenizer is None:
        return {"tokenizer.ggml.model": "none"}
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ValueError(f"{type(tokenizer).__name__} is a slow tokenizer, which has no tokenizer.json to read it from")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos token, and llama.cpp would take another token for it")
    if (largest := max(tokenizer.get_vocab().values())) >= vocab_size:
        raise ValueError(f"the tokenizer has ids up to {largest}, the model {vocab_size} tokens; llama.cpp wants all")
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    model = described["model"]
    if model["type"] != "BPE":
        raise ValueError(f"the tokenizer is a {model['type']} model; llama.cpp's here is BPE")
    fields: dict[str, Any] = {}
    if model.get("byte_fallback"):
        fields |= {"model": "llama", "pre": "default", "add_space_prefix": _space_prefix(described)}
        fields["scores"] = _scores(model, tokenizer, vocab_size)
    else:
        fields |= {"model": "gpt2", "pre": pre_tokenizer(described)}
        fields["merges"] = [" ".join(pair) for pair in _merges(model)]
    tokens, kinds = _tokens(tokenizer, vocab_size, bytes_apart=bool(model.get("byte_fallback")))
    if twice := len(tokens) - len(set(tokens)):
        raise ValueError(f"{twice} of the tokenizer's tokens have the text of another one, which llama.cpp refuses")
    ids = {name: getattr(tokenizer, f"{ours}_token_id") for ours, name in SPECIAL.items()}
    fields |= {"tokens": tokens, "token_type": kinds, **_added(tokenizer)}
    fields |= {f"{name}_token_id": i for name, i in ids.items() if i is not None}
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items()} | _chat(tokenizer)


def pre_tokenizer(described: dict[str, Any]) -> str:
    """llama.cpp's name for how a byte-level tokenizer cuts text. described: tokenizer.json. Raises ValueError."""
    normalizer = (described["normalizer"] or {"type": "NFC"})["type"]  # llama.cpp leaves NFC to whoever writes the text
    steps = described["pre_tokenizer"] or {"type": "nothing"}
    steps = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
    cuts = tuple(cut for step in steps if (cut := _cut(step)) is not None)
    whole = bool(described["model"].get("ignore_merges"))
    if normalizer != "NFC" or (cuts, whole) not in CUTS:
        changed = "" if normalizer == "NFC" else f", after {normalizer}"
        raise ValueError(
            f"the tokenizer cuts text by {' then '.join(cuts) or 'nothing'}{changed}"
            f"{', taking whole words first' if whole else ''}; llama.cpp has no name for that among "
            f"{', '.join(CUTS.values())}"
        )
    return CUTS[cuts, whole]


def _cut(step: dict[str, Any]) -> str | None:
    """One step of a pre-tokenizer: a pattern, "digits", or what is unknown as it is; None for one that cuts nothing."""
    kind = step["type"]
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return GPT2 if step.get("use_regex", True) else None
    if kind == "Digits" and step.get("individual_digits"):
        return "digits"
    if kind == "Split" and step["behavior"] == "Isolated" and not step.get("invert"):
        return step["pattern"].get("Regex", str(step["pattern"]))
    return json.dumps(step)


def _space_prefix(described: dict[str, Any]) -> bool:
    """Whether a SentencePiece-like tokenizer puts a space in front of text. Raises ValueError for other kinds."""
    normalizer, cut = described["normalizer"] or {}, described["pre_tokenizer"]
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    if cut is None and steps in ([replaced], [{"type": "Prepend", "prepend": "▁"}, replaced]):
        return len(steps) == 2
    if not steps and cut and cut["type"] == "Metaspace" and cut["replacement"] == "▁" and cut.get("split") is False:
        return cut["prepend_scheme"] != "never"
    raise ValueError(
        f"the tokenizer has byte fallback, but the normalizer {json.dumps(described['normalizer'])} and the "
        f"pre-tokenizer {json.dumps(cut)}; llama.cpp's SentencePiece turns spaces into ▁ and cuts nothing"
    )


def _merges(model: dict[str, Any]) -> list[list[str]]:
    return [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]


def _scores(model: dict[str, Any], tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[float]:
    """Minus the rank of the first merge that makes a token; 0 of what none makes, which is no union either."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(_merges(model)):
        ranks.setdefault(left + right, rank)
    scores = [0.0] * vocab_size
    for token, i in tokenizer.get_vocab().items():
        scores[i] = -float(ranks.get(token, 0))
    return scores


def _tokens(tokenizer: PreTrainedTokenizerBase, vocab_size: int, bytes_apart: bool) -> tuple[list[str], list[int]]:
    """Texts and kinds of all ids. bytes_apart: <0x0A> and the like are bytes."""
    tokens, kinds = [f"[PAD{i}]" for i in range(vocab_size)], [UNUSED] * vocab_size
    for token, i in tokenizer.get_vocab().items():
        tokens[i], kinds[i] = token, BYTE if bytes_apart and re.fullmatch("<0x[0-9A-F]{2}>", token) else NORMAL
    for i, token in tokenizer.added_tokens_decoder.items():
        tokens[i], kinds[i] = token.content, CONTROL if token.special else USER_DEFINED
    if bytes_apart and tokenizer.unk_token_id is not None:
        kinds[tokenizer.unk_token_id] = UNKNOWN
    return tokens, kinds


def _added(tokenizer: PreTrainedTokenizerBase) -> dict[str, bool]:
    """What the tokenizer puts around a text by itself."""
    ids = tokenizer("a")["input_ids"]
    return {"add_bos_token": ids[0] == tokenizer.bos_token_id, "add_eos_token": ids[-1] == tokenizer.eos_token_id}


def _chat(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    template = tokenizer.chat_template
    if not isinstance(template, dict):
        return {"tokenizer.chat_template": template} if template else {}
    others = {name: text for name, text in template.items() if name != "default"}
    fields = {f"tokenizer.chat_template.{name}": text for name, text in others.items()}
    if "default" in template:
        fields["tokenizer.chat_template"] = template["default"]
    return fields | {"tokenizer.chat_templates": list(others)}
