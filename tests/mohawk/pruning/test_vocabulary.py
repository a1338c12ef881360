"""A trimmed vocabulary: the corpus is cut as before, other text still round-trips, logits are the same numbers."""

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaTokenizer, PreTrainedTokenizerFast

from mohawk.pruning.vocabulary import trim_tokenizer, trim_vocabulary
from tests.models.conftest import tiny_teacher

WIDE = [
    "the quick brown fox jumps over the lazy dog", "she sells sea shells by the sea shore", "thinking about things",
    "one two three four five six seven eight nine ten", "Ä ö ü ß — naïve café", "lower lowest newer newest wider",
] * 3  # fmt: skip
CORPUS = ["the lazy dog thinks the newest things", "a café by the sea"]
OTHER = ["seven quick foxes — ten wider shells", "日本語 🎉 \n\ttabs  and   spaces", "x" * 9]
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]


def byte_level(**options):
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(WIDE, trainer)
    # special tokens at the front, and one behind everything, as chat tokens are
    tokenizer.add_special_tokens(["<|end|>"])
    start = tokenizer.token_to_id("<s>")
    template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return wrapped(tokenizer)


def byte_fallback():
    """As Llama 2, Mistral, Phi-3 and Gemma have it."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL + [f"<0x{i:02X}>" for i in range(256)], show_progress=False
    )
    tokenizer.train_from_iterator(WIDE, trainer)
    start, state = tokenizer.token_to_id("<s>"), json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in SPECIAL]  # bytes are none
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.post_processor = processors.BertProcessing(("</s>", tokenizer.token_to_id("</s>")), ("<s>", start))
    return wrapped(tokenizer)


def llama_class():
    """A class of its own, which builds its tokenizer from vocabulary and merges."""
    model = json.loads(byte_fallback().backend_tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    return LlamaTokenizer(vocab=model["vocab"], merges=merges, pad_token="<pad>")


def wrapped(tokenizer):
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


KINDS = {
    "byte_level": byte_level,
    "ignore_merges": lambda: byte_level(ignore_merges=True),
    "byte_fallback": byte_fallback,
    "llama_class": llama_class,
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_corpus_is_cut_as_before_and_all_text_round_trips(kind, tmp_path):
    tokenizer = KINDS[kind]()
    before = tokenizer.backend_tokenizer.to_str()
    model = tiny_teacher("llama", vocab_size=len(tokenizer) + 24, bos_token_id=1, eos_token_id=2, pad_token_id=3)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=[2], pad_token_id=3)
    trimmed = trim_vocabulary(model, tokenizer, iter(CORPUS))
    assert tokenizer.backend_tokenizer.to_str() == before
    assert len(trimmed.tokens) == len(trimmed.tokenizer) == trimmed.model.config.vocab_size < len(tokenizer)
    new_id = {old: new for new, old in enumerate(trimmed.tokens)}
    for text in CORPUS:
        ids, now = tokenizer(text)["input_ids"], trimmed.tokenizer(text)["input_ids"]
        assert now == [new_id[i] for i in ids]
        assert trimmed.tokenizer.convert_ids_to_tokens(now) == tokenizer.convert_ids_to_tokens(ids)
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[..., trimmed.tokens]
            torch.testing.assert_close(trimmed.model(torch.tensor([now])).logits, expected, rtol=1e-5, atol=1e-5)
    for text in CORPUS + OTHER:
        ids = trimmed.tokenizer(text)["input_ids"]
        expected = tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True)
        assert trimmed.tokenizer.decode(ids, skip_special_tokens=True) == expected == text
    for name in SPECIAL:
        assert trimmed.tokenizer.convert_tokens_to_ids(name) == new_id[tokenizer.convert_tokens_to_ids(name)]
    trimmed.model.save_pretrained(tmp_path)
    trimmed.tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is type(AutoTokenizer.from_pretrained(saved(tokenizer, tmp_path / "whole")))
    for text in CORPUS + OTHER:
        assert loaded(text)["input_ids"] == trimmed.tokenizer(text)["input_ids"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.eos_token_id == loaded.eos_token_id


def saved(tokenizer, folder):
    tokenizer.save_pretrained(folder)
    return folder


def test_only_what_is_needed_is_kept():
    tokenizer = byte_level()
    model = tiny_teacher("llama", vocab_size=len(tokenizer))
    trimmed = trim_vocabulary(model, tokenizer, [""])
    assert len(trimmed.tokens) == 256 + len(SPECIAL) + 1  # bytes and special tokens
    word = max(range(len(tokenizer)), key=lambda i: len(tokenizer.convert_ids_to_tokens(i).strip("<|>/")))
    longer = trim_vocabulary(model, tokenizer, ids=[word])
    pieces = set(longer.tokens) - set(trimmed.tokens)
    text = tokenizer.convert_ids_to_tokens(word)
    assert word in pieces and all(tokenizer.convert_ids_to_tokens(i) in text for i in pieces)
    plain = tokenizer.decode([word])
    assert longer.tokenizer(plain, add_special_tokens=False)["input_ids"] == [longer.tokens.index(word)]


def test_ids_that_are_no_tokens_stay():
    tokenizer = byte_level()
    model = tiny_teacher("llama", vocab_size=len(tokenizer))
    model.config.pad_token_id = model.generation_config.pad_token_id = -1
    model.generation_config.eos_token_id = [1, len(tokenizer) + 5]
    trimmed = trim_vocabulary(model, tokenizer, ids=[0]).model
    assert trimmed.config.pad_token_id == trimmed.generation_config.pad_token_id == -1
    assert trimmed.generation_config.eos_token_id == [1, len(tokenizer) + 5]


def test_spaces_come_back_where_all_else_is_bytes():
    tokenizer = byte_fallback()
    model = tiny_teacher("llama", vocab_size=len(tokenizer))
    trimmed = trim_vocabulary(model, tokenizer, ids=[0])
    assert len(trimmed.tokens) == 256 + len(SPECIAL) + 1
    ids = trimmed.tokenizer("no é kept")["input_ids"]
    assert trimmed.tokenizer.decode(ids, skip_special_tokens=True) == "no é kept"


def test_what_cannot_be_trimmed_gets_one_line():
    tokenizer = byte_level()
    model = tiny_teacher("llama", vocab_size=len(tokenizer))
    with pytest.raises(ValueError, match=r"^LlamaModel cannot be cut: it has no output embedding, [^\n]+$"):
        trim_vocabulary(model.model, tokenizer, ids=[0])
    with pytest.raises(ValueError, match=r"^trim_vocabulary: give texts, ids or both$"):
        trim_vocabulary(model, tokenizer)
    with pytest.raises(ValueError, match=r"^ids: got 9999, allowed: 0 to \d+$"):
        trim_vocabulary(model, tokenizer, ids=[9999])
    with pytest.raises(ValueError, match=r"embedding 97 rows; give the model's own tokenizer$"):
        trim_vocabulary(tiny_teacher("llama"), tokenizer, CORPUS)
    with pytest.raises(ValueError, match=r"^tokens: the added token '<unk>' \(0\) would go; keep it$"):
        trim_tokenizer(tokenizer, range(10, 300))
    for other in (models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0), models.WordLevel({"<unk>": 0}, "<unk>")):
        with pytest.raises(ValueError, match=r"^trim_vocabulary: got a tokenizer with a \w+ model; allowed: BPE$"):
            trim_vocabulary(model, PreTrainedTokenizerFast(tokenizer_object=Tokenizer(other)), CORPUS)
    suffixed = Tokenizer(models.BPE(vocab={"a</w>": 0}, merges=[], end_of_word_suffix="</w>"))
    with pytest.raises(ValueError, match=r"end_of_word_suffix '</w>'; allowed: one without$"):
        trim_vocabulary(model, PreTrainedTokenizerFast(tokenizer_object=suffixed), CORPUS)
    with pytest.raises(ValueError, match="has no tokenizer.json behind it; allowed: fast tokenizers"):
        trim_vocabulary(model, object(), CORPUS)
