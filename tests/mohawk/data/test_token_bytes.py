"""Tokens as bytes: byte-level BPE, byte fallback with Metaspace, and what cannot be aligned."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from mohawk.data.aligned_rows import Examples, TokenAligner, _whole_characters
from mohawk.data.pair_tokens import Pairs
from mohawk.data.tokenizers.token_bytes import TokenBytes, met_spans, shared_tokens, special_roles
from mohawk.errors import UserError

WORDS = ("▁the", "▁fox", "▁", "he", "t", "h", "e", "f", "o", "x")


def sentencepiece(*, lower=False):
    """A BPE with byte fallback that puts a space in front, as Llama 2's does."""
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))])}
    for word in WORDS:
        vocab.setdefault(word, len(vocab))
    merges = [("h", "e"), ("▁", "t"), ("▁t", "he"), ("o", "x"), ("f", "ox"), ("▁", "fox")]
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>"))
    parts = [normalizers.Lowercase()] if lower else []
    backend.normalizer = normalizers.Sequence([*parts, normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return made


def test_bytes_of_both_kinds(tokenizer):
    level, pieces = TokenBytes(tokenizer, "student"), TokenBytes(sentencepiece(), "teacher")
    assert sorted(level.of[:256]) == sorted(bytes([byte]) for byte in range(256))
    assert level.special == {256, 257} and not level.adds_space and pieces.adds_space
    text = "the fox, é"
    ids = pieces.encode(text)
    assert b"".join(pieces.pieces(ids, text.encode())) == text.encode() != b"".join(pieces.pieces(ids))[1:] + b"!"
    assert b"".join(level.of[i] for i in level.encode(text)) == text.encode()
    roles = special_roles(level, pieces)
    assert roles[257] == 2 and roles[256] == 1
    pairs = dict(shared_tokens(level, pieces, roles))
    known = {byte: i for i, byte in enumerate(level.of)}
    # a letter that is a token of its own goes before the byte that is kept for what has none
    assert pieces.of[pairs[known[b"t"]]] == b"t" and pairs[known[b"t"]] > 258
    assert pieces.of[pairs[known[b"\n"]]] == b"\n" and len(pairs) == 258


def test_lower_casing_is_refused():
    with pytest.raises(UserError, match="^teacher: its tokenizer gives 'The quick .* back as 'the quick .* by bytes"):
        TokenBytes(sentencepiece(lower=True), "teacher")


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ([b"ab", b"c"], [b"a", b"bc"], [(0, 2, 0, 2)]),
        ([b"a", b"b", b"cd"], [b"ab", b"c", b"d"], [(0, 2, 0, 1), (2, 3, 1, 3)]),
        ([b"", b"a", b"b"], [b"a", b"b"], [(1, 2, 0, 1), (2, 3, 1, 2)]),
        ([b"a", b"X", b"c", b"d"], [b"a", b"yy", b"c", b"d"], [(0, 1, 0, 1), (2, 3, 2, 3), (3, 4, 3, 4)]),
        ([b"aX"], [b"ay"], []),
        ([], [], []),
    ],
)
def test_where_tokens_meet(ours, theirs, expected):
    assert met_spans(ours, theirs) == expected


def test_rows_that_begin_and_end_within_a_character():
    pieces = [b"\xa9", b"a", b"\xc3", b"\xa9", b"\xe2", b"\x82"]
    assert _whole_characters(pieces) == (1, 4)
    assert _whole_characters([b"\xa9"]) == (1, 1) and _whole_characters([]) == (0, 0)


def test_a_space_in_front_is_no_text(tokenizer):
    """Of a teacher that puts one there; the middle of a document begins with one that is text."""
    aligner = TokenAligner(tokenizer, sentencepiece())
    for text in ("the fox", " the fox"):
        ids = tokenizer(text)["input_ids"] + [257]
        ones = torch.ones(len(ids), dtype=torch.int64)
        made, of, spans = aligner.row(torch.tensor(ids).numpy(), torch.tensor(ids).numpy(), (0 * ones).numpy())
        assert aligner.teacher.tokenizer.convert_ids_to_tokens(made) == ["▁the", "▁fox", "</s>"]
        assert of == [0, 0, 0]
        cut = len(text) - 4
        assert spans == [(cut, cut + 4, 1, 2), (cut + 4, cut + 5, 2, 3)]


def test_examples_are_found_by_the_students_ids(tokenizer):
    import numpy as np

    def example(ids, learn):
        one = np.zeros(1, dtype=np.int64)
        return Pairs(
            ids,
            learn,
            np.array([[0, len(ids)]]),
            one,
            one,
            one,
            np.full(1, np.nan),
            np.full(1, np.nan),
            one,
            None,
            {},
            None,
        )

    ids = np.array(tokenizer("the fox")["input_ids"] + [257])
    learn = np.array([False] * 4 + [True] * 4)
    ours = example(ids, learn)
    teacher = sentencepiece()
    theirs_ids = np.array([1, *teacher("the")["input_ids"], *teacher("fox")["input_ids"], 2])
    flags = np.array([i >= len(theirs_ids) - 2 for i in range(len(theirs_ids))])
    theirs = example(theirs_ids, flags)
    aligner = TokenAligner(tokenizer, teacher, examples=[Examples(ours, theirs, 16)])
    labels = np.where(learn, ids, -100)
    made, _, spans = aligner.row(ids, labels, np.zeros(8, dtype=np.int64))
    assert made == theirs_ids.tolist()
    last = len(made)
    # "fox" is " fox" there, whose space the template or the tokenizer put in front
    assert spans == [(4, 7, last - 2, last - 1), (7, 8, last - 1, last)]
