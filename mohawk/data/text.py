"""Text to token ids on disk: read through `datasets`, tokenised once, cached by content.

A source is a text file, JSON lines, Parquet, a glob, a folder of those, or a hub dataset id.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mohawk.core.places import cache_dir, home
from mohawk.core.terminal import SHOWN
from mohawk.core.user_cache import META, SUMS, kept_whole, whole_folder
from mohawk.data.source_files import (
    Source,
    as_source,
    check_field,
    check_written,
    content_key,
    load_rows,
    local_files,
    rows_of,
)
from mohawk.errors import UserError, is_refusal, naming

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


LAYOUT = 1  # of the cached folders; raise it when their contents change
PIECE = 1_000_000  # characters tokenised at once: an encoding takes some 100 bytes per token until it is copied


class TokenizedText:
    """A source's token ids on disk, document after document.

    tokens: memory-mapped unsigned ids. offsets: int64 (documents + 1), where each document begins.
    digests: uint64 (documents), of each document's text; equal text has an equal digest.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        meta = json.loads((self.folder / META).read_text())
        self.name: str = meta["source"]
        self.dtype = np.dtype(meta["dtype"])
        self.offsets = np.load(self.folder / "offsets.npy")
        self.digests = np.load(self.folder / "digests.npy")
        self._tokens: np.ndarray | None = None

    @property
    def tokens(self) -> np.ndarray:
        if self._tokens is None:
            self._tokens = np.memmap(self.folder / "tokens.bin", dtype=self.dtype, mode="r")
        return self._tokens

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tokens": None}  # a pickled memmap would carry all its tokens to a worker

    def __len__(self) -> int:
        return len(self.offsets) - 1


def tokenize(source: Any, tokenizer: PreTrainedTokenizerBase, *, cache: Path | str | None = None) -> TokenizedText:
    """Token ids of one source, from the cache where the same text met the same tokenizer before.

    Every document is tokenised as the tokenizer does it by default (with its BOS if it adds one) and ends
    with the tokenizer's EOS. Empty documents are left out. Documents beyond a million characters are
    tokenised in pieces cut at line ends. The cache key is made of the text's content, the tokenizer and the
    settings; the cached folder is whole or absent. Raises UserError.
    """
    source = as_source(source)
    root = (home(cache) if cache is not None else cache_dir()) / "tokens"
    files, form = local_files(source)
    # a hub dataset has to be opened to know its content; local files are only hashed
    dataset = None if files else load_rows(source, files, form)
    content = dataset._fingerprint if dataset is not None else content_key(files)
    settings = {"layout": LAYOUT, "content": content, "field": source.field, "split": source.split}
    settings |= {"format": form, "tokenizer": tokenizer_key(tokenizer)}
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:24]
    folder = root / key
    about = {"key": key}  # so that another folder under this name is not taken for it
    if not kept_whole(folder, about) or not _readable(folder):
        # `scratch` vanishes at the end: the Arrow copy of local files is only a step to the token ids
        check_written(files)
        with whole_folder(folder, about) as partial, tempfile.TemporaryDirectory(dir=partial.parent) as scratch:
            if dataset is None:
                dataset = load_rows(source, files, form, scratch)
            check_field(dataset, source)
            _write(dataset, source, form, tokenizer, partial)
    return TokenizedText(folder)


def _readable(folder: Path) -> bool:
    """Whether the arrays of a cached folder fit each other, as one without sums may not; such a one is removed."""
    try:
        text = TokenizedText(folder)
        if (folder / "tokens.bin").stat().st_size == int(text.offsets[-1]) * text.dtype.itemsize:
            return True
        problem = "tokens.bin has another length than offsets.npy says"
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        if is_refusal(error):
            raise
        problem = str(error)
    log.warning("%s is damaged (%s); making it again", folder, problem)
    shutil.rmtree(folder)
    return False


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of what decides a tokenizer's ids, hex; padding and truncation aside."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        parts = json.loads(backend.to_str())
        # the last call's padding and truncation are kept in there, but change nothing for us
        parts.pop("padding", None), parts.pop("truncation", None)
    else:
        parts: dict[str, Any] = {"class": type(tokenizer).__name__, "vocab": sorted(tokenizer.get_vocab().items())}
        parts["bos"] = getattr(tokenizer, "add_bos_token", None)
    parts["eos"] = tokenizer.eos_token_id
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _documents(dataset: datasets.Dataset, source: Source, form: str | None) -> Iterator[str]:
    column = dataset.select_columns([source.field])
    # pyrefly: ignore[bad-argument-type]  # columns of a Dataset are one
    for i, row in rows_of(column, source):
        text = row[source.field]
        if text is None:
            continue
        if not isinstance(text, str):
            raise UserError(
                f"data: {source.source}: field {source.field!r} holds {type(text).__name__}, not text, in row {i} "
                f"(from 0); its fields: {', '.join(dataset.column_names)}"
            )
        text = text.removeprefix("\ufeff")
        blocks = re.split(r"\n[ \t\r]*\n", text) if form == "paragraphs" else (text,)
        yield from (block for block in blocks if block.strip())


def _pieces(text: str) -> Iterator[str]:
    """Cut a very long document at line ends, so that no encoding of it is whole in memory."""
    start = 0
    while len(text) - start > PIECE:
        cut = text.rfind("\n", start + PIECE // 2, start + PIECE)
        cut = cut if cut > 0 else start + PIECE
        yield text[start:cut]
        start = cut
    yield text[start:]


def _write(
    dataset: datasets.Dataset,
    source: Source,
    form: str | None,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
) -> None:
    from tqdm import tqdm

    vocab = max(len(tokenizer), (tokenizer.eos_token_id or 0) + 1)
    dtype = np.dtype("<u2" if vocab <= 1 << 16 else "<u4")
    eos = tokenizer.eos_token_id
    if eos is None and tokenizer.sep_token_id is None:  # which encoders have instead
        log.warning("the tokenizer has no EOS token: nothing is put between documents")
    lengths, digests = [], []

    def encode(texts: list[str], special: bool) -> list[list[int]]:
        options = {"add_special_tokens": special, "return_attention_mask": False, "verbose": False}
        return tokenizer(texts, **options)["input_ids"]

    def flush(batch: list[str], file: Any) -> None:
        short = [text for text in batch if len(text) <= PIECE]
        rows = iter(encode(short, True) if short else ())
        for text in batch:
            if len(text) <= PIECE:
                ids = next(rows)
            else:
                ids = []
                for k, piece in enumerate(_pieces(text)):
                    # the tokenizer's own special tokens belong around the whole document
                    ids += encode([piece], k == 0)[0]
                    if ids and ids[-1] == eos:
                        ids.pop()
            if eos is not None and (not ids or ids[-1] != eos):
                ids.append(eos)
            with naming(file.name):
                file.write(np.asarray(ids, dtype=dtype).tobytes())
            lengths.append(len(ids))
            digests.append(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())

    log.info("tokenising %s (%d rows, once)", source.source, len(dataset), extra=SHOWN)
    with (
        (folder / "tokens.bin").open("wb") as file,
        tqdm(unit=" documents", disable=None, leave=False) as bar,
    ):
        batch, size = [], 0
        for text in _documents(dataset, source, form):
            batch.append(text)
            size += len(text)
            if size > PIECE:
                flush(batch, file)
                bar.update(len(batch))
                batch, size = [], 0
        flush(batch, file)
        with naming(file.name):
            file.flush()
    if not lengths:
        raise UserError(f"data: {source.source} holds no text in field {source.field!r}")
    meta = {
        "source": source.source,
        "dtype": dtype.str,
        "documents": len(lengths),
        "tokens": int(sum(lengths)),
        SUMS: True,
    }
    with naming(folder):
        np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
        np.save(folder / "digests.npy", np.frombuffer(b"".join(digests), dtype="<u8"))
        (folder / META).write_text(json.dumps(meta, indent=1) + "\n")
