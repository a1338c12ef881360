"""The bits of a teacher cache: 16-bit log-probabilities and packed ids."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mohawk.teacher_cache.layout import (
    LOGPROBS,
    NO_MASS,
    ROUNDING,
    Layout,
    decode_logprobs,
    encode_logprobs,
    is_whole,
    make_row,
    pack_ascending,
    pack_ids,
    text_digest,
    unpack_ascending,
    unpack_ids,
)


def through(x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(decode_logprobs(encode_logprobs(x).numpy()))


def test_every_code_is_its_own_and_they_descend():
    values = torch.from_numpy(LOGPROBS)
    assert encode_logprobs(values).tolist() == list(range(1 << 16))
    assert (values[1:] < values[:-1]).all() and values[0] == 0 and values[NO_MASS] == -torch.inf


def test_the_rounding_is_within_the_stated_bound_and_reaches_it():
    x = -torch.cat([torch.logspace(-9, 2.1, 200_000), torch.rand(100_000) * 3, torch.arange(0, 120, 0.5)])
    error = (through(x).double() - x.double()).abs() / (ROUNDING * x.double().abs().clamp(min=1))
    assert 0.99 < error.max() <= 1


def test_ends_of_the_range():
    given = torch.tensor([1e-7, 0.0, -127.984, -128.0, -1e30, -torch.inf])
    assert through(given).tolist() == [0.0, 0.0, -127.984375, -127.984375, -127.984375, -torch.inf]


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(1, 32), k=st.integers(1, 40), seed=st.integers(0, 9))
def test_packed_ids_are_a_little_endian_stream(bits, k, seed):
    ids = np.random.default_rng(seed).integers(0, 1 << bits, (3, k))
    ids[0, 0], ids[-1, -1] = 0, (1 << bits) - 1
    stream = pack_ids(ids, bits)
    plain = ((ids[..., None] >> np.arange(bits)) & 1).astype(np.uint8).reshape(3, -1)
    assert (stream == np.packbits(plain, axis=-1, bitorder="little")).all()
    assert stream.shape == (3, -(-k * bits // 8))
    assert (unpack_ids(stream, bits, k) == ids).all()


@settings(max_examples=60, deadline=None)
@given(k=st.integers(1, 300), seed=st.integers(0, 9), ends=st.booleans(), spread=st.sampled_from([1, 40, 1 << 16]))
def test_ascending_codes_come_back(k, seed, ends, spread):
    codes = np.sort(np.random.default_rng(seed).integers(0, spread, (4, k)), -1)
    if ends:
        codes[0], codes[1] = 0, NO_MASS
        codes[2, -1] = NO_MASS
    layout = Layout("top-k", 4, 1000, k)
    packed = pack_ascending(codes, layout.low_bits)
    assert all(packed[name].shape == (4, *layout.token[name].shape) for name in packed)
    assert (unpack_ascending(**packed, low_bits=layout.low_bits, k=k) == codes).all()


@pytest.mark.parametrize(
    ("vocab", "bits"), [(1, 1), (2, 1), (3, 2), (256, 8), (257, 9), (49152, 16), (65536, 16), (65537, 17), (151936, 18)]
)
def test_ids_take_as_many_bits_as_the_vocabulary_needs(vocab, bits):
    assert Layout("samples", 8, vocab, 12).id_bits == bits


def test_bytes_of_a_record():
    assert Layout("top-k", 512, 49152, 64).token.itemsize == 64 * 12 // 8 + 2 + 64 * 16 // 8
    assert Layout("top-k", 512, 151936, 256).token.itemsize == 256 * 10 // 8 + 2 + 256 * 18 // 8
    # 7 x 13 bits in 12 bytes, 7 + 8 in 2, 7 x 18 in 16
    assert Layout("top-k", 512, 151936, 7).token.itemsize == 12 + 2 + 2 + 16
    assert Layout("samples", 512, 151936, 12).token.itemsize == 27
    assert Layout("hidden", 512, 49152, hidden_size=576, dtype="bfloat16").token.itemsize == 1152
    assert Layout("top-k", 512, 49152, 64).row.itemsize == 512 * 226 + 12


def test_a_row_notices_any_changed_byte():
    layout = Layout("samples", 5, 300, 3)
    ids = np.random.default_rng(0).integers(0, 300, (5, 3))
    row = make_row(layout, 77, {"ids": pack_ids(ids, layout.id_bits)})
    assert is_whole(row[0]) and row["text"] == 77
    raw = np.frombuffer(row.tobytes(), np.uint8)
    for i in range(len(raw)):
        damaged = raw.copy()
        damaged[i] ^= 4
        assert not is_whole(damaged.view(layout.row)[0])


def test_a_text_digest_is_of_tokens_and_segments_and_not_of_the_filling():
    row = {
        "input_ids": torch.tensor([5, 6, 7, 8, 0, 0]),
        "position_ids": torch.tensor([0, 1, 0, 1, 0, 1]),
        "segment_ids": torch.tensor([0, 0, 1, 1, -1, -1]),
    }
    digest = text_digest(row)
    assert digest == text_digest({**row, "input_ids": torch.tensor([5, 6, 7, 8, 3, 3])})
    assert digest != text_digest({**row, "input_ids": torch.tensor([5, 6, 7, 9, 0, 0])})
    assert digest != text_digest({**row, "position_ids": torch.tensor([0, 1, 2, 3, 0, 1])})
    assert digest != text_digest({**row, "segment_ids": torch.tensor([0, 0, 1, 1, 1, -1])})
    whole = {"input_ids": row["input_ids"]}
    assert text_digest(whole) == text_digest({**whole, "position_ids": torch.arange(6)})
