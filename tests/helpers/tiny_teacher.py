"""Text for the tests of cached teachers, small enough to cache dozens of times."""

import numpy as np

from mohawk.data.packing import Documents, split_documents
from mohawk.data.text import TokenizedText

LENGTH = 16
VOCAB = 258  # of the tiny Llama


def documents(folder, lengths=(5, 40, 9, 3, 70, 21, 30, 44), seed: int = 0) -> Documents:
    """Random documents of these lengths, 222 tokens: 14 rows, the last with two places of padding."""
    total = sum(lengths)
    np.random.default_rng(seed).integers(0, VOCAB, total).astype("<u4").tofile(folder / "tokens.bin")
    np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    np.save(folder / "digests.npy", np.arange(len(lengths), dtype="<u8"))
    (folder / "meta.json").write_text('{"source": "made", "dtype": "<u4"}')
    return split_documents([TokenizedText(folder)])[0]
