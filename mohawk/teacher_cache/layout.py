"""What a cached teacher's answer is made of: log-probabilities in 16 bits, ids in as many as the vocabulary needs.

Every token has a record of one length, every row (a sequence of n tokens) is its records behind two checksums, and a
shard is rows behind one another: any position is found by multiplication.

    row    text    8 bytes  of blake2b over the row's real tokens and positions: which text this is of
           crc     4 bytes  crc32 of the text's digest and the records
           tokens  n records
    token  top-k    low ceil(k * low_bits / 8), high ceil((k + 2 ** (16 - low_bits)) / 8), tail 2, ids
           samples  ids
           hidden   hidden_size values in the stored dtype

All is little-endian. ids are a stream of `id_bits` = ceil(log2 V) bits each, lowest bit first, which is numpy's
`unpackbits(bitorder="little")`.

The k log-probabilities are 16-bit codes in ascending order, which says much about them (Elias 1974, Fano 1971): the
lowest `low_bits` = floor(log2(2 ** 16 / k)) of each are a stream, and the rest, i-th code >> low_bits, is the position
of the i-th set bit of `high`, less i. That is 12 bits a value at k = 64 and 10 at 256, in a record of fixed length.

A log-probability x <= 0 is kept as -x in an unsigned float of 3 exponent and 13 fraction bits: code c is c / 8192 below
8192, and (8192 + c % 8192) / 8192 * 2 ** (c // 8192 - 1) above. 65535 is minus infinity; what is below -127.984 is kept
as that, a probability that float32 can't hold. float16 would spend one bit on the sign and two on exponents that
log-probabilities do not have; this rounds seven times finer (benchmarks/models/cache.py), by at most
ROUNDING * max(1, |x|).

What that does to a loss: let p be the teacher's distribution over its k + 1 buckets, q the student's, s a stored
log-probability and e = s - log p its rounding, |e| <= ROUNDING * m with m = max(1, |log p|). `kd_loss` normalises s, so
its log-probabilities are off by e - sum p e up to second order, and the forward KL of a token by

    |sum p (e - sum p e) (log p - log q)| <= ROUNDING * sum p (m + M) |log p - log q|,  M = sum p m,

times T^2. This is the worst case: roundings have both signs, and in the mean over a batch they all but cancel.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ANSWER_KINDS = ("top-k", "samples", "hidden")
ROUNDING = 2.0**-14
NO_MASS = 0xFFFF  # the code of minus infinity
STEPS = 1 << 13  # codes from one power of two to the next
# Of hidden states, and how numpy holds them: it knows no bfloat16.
DTYPES = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}


@dataclass(frozen=True)
class Layout:
    """What the records of a cache look like. k: of a top k, or draws of samples; hidden_size and dtype: of hidden."""

    kind: str
    sequence_length: int
    vocab_size: int
    k: int = 0
    hidden_size: int = 0
    dtype: str = ""

    @property
    def id_bits(self) -> int:
        return max(1, (self.vocab_size - 1).bit_length())

    @property
    def low_bits(self) -> int:
        return max(1, ((1 << 16) // self.k).bit_length() - 1) if self.kind == "top-k" else 0

    @property
    def fields(self) -> list[tuple[str, str]]:
        """The record of one position, as numpy's dtype takes it: (name, "(count,)type")."""
        ids = ("ids", f"({-(-self.k * self.id_bits // 8)},)u1")
        if self.kind == "top-k":
            low = ("low", f"({-(-self.k * self.low_bits // 8)},)u1")
            high = ("high", f"({-(-(self.k + (1 << 16 - self.low_bits)) // 8)},)u1")
            return [low, high, ("tail", "<u2"), ids]
        return [ids] if self.kind == "samples" else [("hidden", f"({self.hidden_size},){DTYPES[self.dtype]}")]

    @property
    def token(self) -> np.dtype:
        return np.dtype(self.fields)

    @property
    def row(self) -> np.dtype:
        """The record of one row."""
        return np.dtype([("text", "<u8"), ("crc", "<u4"), ("tokens", self.token, (self.sequence_length,))])


def encode_logprobs(logprobs: Tensor) -> Tensor:
    """Codes, int32 in 0..65535, of float32 log-probabilities of any shape; above 0 (by rounding) counts as 0."""
    v = (-logprobs.float()).clamp(min=0.0)
    one = 127 << 23  # 1.0, whose bits and those of all floats above it lie on the same scale as the codes
    above = ((v.view(torch.int32) - one + (1 << 9)) >> 10) + STEPS
    codes = torch.where(v < 1, (v * STEPS).round().to(torch.int32), above)
    return torch.where(torch.isinf(v), NO_MASS, codes.clamp(max=NO_MASS - 1))


def _decoded() -> np.ndarray:
    codes = np.arange(1 << 16)
    exponent, fraction = np.divmod(codes, STEPS)
    values = np.where(exponent == 0, fraction / STEPS, (1 + fraction / STEPS) * 2.0 ** (exponent - 1.0))
    values[NO_MASS] = np.inf
    return (0.0 - values).astype(np.float32)


LOGPROBS = _decoded()


def decode_logprobs(codes: np.ndarray) -> np.ndarray:
    """float32 log-probabilities of uint16 codes of any shape."""
    return LOGPROBS[codes]


def pack_ids(ids: np.ndarray, bits: int) -> np.ndarray:
    """Whole numbers (..., k) below 2 ** bits, as a little-endian stream: uint8 (..., ceil(k * bits / 8))."""
    *lead, k = ids.shape
    groups = -(-k // 8)  # eight ids fill `bits` bytes
    ids = np.concatenate([ids, np.zeros((*lead, 8 * groups - k), ids.dtype)], -1).astype(np.uint64)
    stream = np.zeros((*lead, groups, bits), dtype=np.uint8)
    for j in range(8):
        first, shift = divmod(j * bits, 8)
        word = ids[..., j::8] << np.uint64(shift)
        for byte in range(-(-(shift + bits) // 8)):
            stream[..., first + byte] |= (word >> np.uint64(8 * byte)).astype(np.uint8)
    return stream.reshape(*lead, groups * bits)[..., : -(-k * bits // 8)]


def unpack_ids(stream: np.ndarray, bits: int, k: int) -> np.ndarray:
    """The int64 ids (..., k) of `pack_ids`."""
    lead, groups = stream.shape[:-1], -(-k // 8)
    whole = np.zeros((*lead, groups * bits), dtype=np.uint8)
    whole[..., : stream.shape[-1]] = stream
    whole = whole.reshape(*lead, groups, bits)
    ids = np.empty((*lead, groups, 8), dtype=np.int64)
    for j in range(8):
        first, shift = divmod(j * bits, 8)
        word = np.zeros((*lead, groups), dtype=np.int64)
        for byte in range(-(-(shift + bits) // 8)):
            word |= whole[..., first + byte].astype(np.int64) << 8 * byte
        ids[..., j] = (word >> shift) & ((1 << bits) - 1)
    return ids.reshape(*lead, 8 * groups)[..., :k]


def pack_ascending(codes: np.ndarray, low_bits: int) -> dict[str, np.ndarray]:
    """Ascending 16-bit codes (rows, k), as uint8: `low` and `high` of the records."""
    codes = codes.astype(np.int64)
    rows, k = codes.shape
    bits = np.zeros((rows, k + (1 << 16 - low_bits)), dtype=np.uint8)
    np.put_along_axis(bits, (codes >> low_bits) + np.arange(k), 1, axis=-1)
    low = pack_ids(codes & (1 << low_bits) - 1, low_bits)
    return {"low": low, "high": np.packbits(bits, axis=-1, bitorder="little")}


def unpack_ascending(low: np.ndarray, high: np.ndarray, low_bits: int, k: int) -> np.ndarray:
    """The int64 codes (rows, k) of `pack_ascending`."""
    _, ones = np.nonzero(np.unpackbits(high, axis=-1, bitorder="little"))
    return (ones.reshape(len(high), k) - np.arange(k) << low_bits) | unpack_ids(low, low_bits, k)


def text_digest(row: Mapping[str, Tensor]) -> int:
    """64 bits of a dataset's row: its real tokens and their positions; what fills it up does not count."""
    ids = row["input_ids"].numpy()
    positions = row["position_ids"].numpy() if "position_ids" in row else np.arange(len(ids))
    both = np.stack([ids, positions]).astype("<i8")
    if "segment_ids" in row:
        both[:, row["segment_ids"].numpy() < 0] = -1
    return int.from_bytes(hashlib.blake2b(both.tobytes(), digest_size=8).digest(), "little")


def make_row(layout: Layout, text: int, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """The row's record, of shape (1,), from the columns of its tokens."""
    tokens = np.empty(layout.sequence_length, dtype=layout.token)
    for name in layout.token.names or ():
        tokens[name] = columns[name]
    row = np.empty(1, dtype=layout.row)
    row["text"], row["tokens"] = text, tokens
    row["crc"] = checksum(row[0])
    return row


def is_whole(row: np.void) -> bool:
    """Whether a row is as it was written."""
    return checksum(row) == row["crc"]


def checksum(row: np.void) -> int:
    """crc32 of a row's digest and records."""
    # pyrefly: ignore[bad-argument-type]  # an array is a buffer, of which numpy's stubs know from Python 3.12 on
    return zlib.crc32(np.ascontiguousarray(row["tokens"]), zlib.crc32(row["text"].tobytes()))


def decode(layout: Layout, tokens: np.ndarray) -> dict[str, Tensor]:
    """Batch columns (data contract of the distillers) of the records `tokens` (n): see TeacherCache.row."""
    if layout.kind == "hidden":
        hidden = torch.from_numpy(np.array(tokens["hidden"]))
        return {"teacher_hidden": hidden.view(torch.bfloat16) if layout.dtype == "bfloat16" else hidden}
    ids = torch.from_numpy(unpack_ids(tokens["ids"], layout.id_bits, layout.k))
    if layout.kind == "samples":
        return {"teacher_ids": ids, "teacher_weights": torch.full(ids.shape, 1 / layout.k)}
    codes = unpack_ascending(tokens["low"], tokens["high"], layout.low_bits, layout.k)
    return {
        "teacher_ids": ids,
        "teacher_logprobs": torch.from_numpy(decode_logprobs(codes)),
        "teacher_tail": torch.from_numpy(decode_logprobs(tokens["tail"])),
    }
