"""Compressed files, and what can be wrong with one."""

import bz2
import gzip
import lzma
import random
from collections.abc import Iterator

import pyarrow

COMPRESS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pyarrow.Codec("zstd").compress(content, asbytes=True),
}


def damages(packed: bytes) -> Iterator[bytes]:
    """Cut in several places, and something else altogether."""
    for length in (3, len(packed) // 2, len(packed) - 3):
        yield packed[:length]
    yield b"nonsense" * 99


def flips(packed: bytes, count: int = 30) -> Iterator[bytes]:
    """One bit of it is another."""
    chance = random.Random(0)
    for _ in range(count):
        content = bytearray(packed)
        content[chance.randrange(len(packed))] ^= 1 << chance.randrange(8)
        yield bytes(content)
