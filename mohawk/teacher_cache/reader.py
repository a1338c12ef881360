"""Reading what a teacher said of a text: a folder of memory-mapped shards, and a dataset with its answers added.

    cache = TeacherCache("caches/llama")               sizes are checked here, a shard's sha256 when it is first opened
    cache.check(temperature=2.0, divergence="jsd")     one line for what does not fit, as UserError
    rows = CachedRows(dataset, cache)                  the dataset's rows with the teacher's columns
    teacher = cache.teacher(batch)                     of a collated batch, for kd_loss and linear_kd_loss

The folder holds shard-00000.bin, shard-00001.bin, ... of `rows_per_shard` rows each (layout.py has their
bits), for hidden states head.bin and perhaps bias.bin, and MANIFEST.json with every file's size and sha256. It is
written by writer.py, whole or not at all. Rows are those of one packed dataset, by index: a cache of one epoch
serves any number of passes in any order. examples/read_teacher_cache.py reads it without this package.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mohawk.core.folders import MANIFEST, manifest_sum, why_incomplete
from mohawk.core.json_files import parse_json
from mohawk.core.places import home
from mohawk.errors import UserError, is_refusal
from mohawk.kernels.kd.divergences import DIVERGENCES
from mohawk.kernels.kd.teachers import TeacherHidden, TeacherSamples, TeacherSource, TeacherTopK
from mohawk.losses.heads import Head
from mohawk.teacher_cache.layout import DTYPES, Layout, checksum, decode, is_whole, text_digest

FORMAT = "mohawk teacher cache"
VERSION = 1
OPEN_SHARDS = 64  # memory maps at once: each holds a file handle
LOOKED_AT = 8  # rows whose text is compared before training begins


class TeacherCache:
    """A finished cache; `len` is its number of rows.

    folder: where it lies. layout: what it holds: kind ("top-k", "samples" or "hidden"), sequence_length, vocab_size, k,
    hidden_size, dtype. temperature: of the softmax that was cut or drawn from, None for hidden states. manifest: all of
    MANIFEST.json.

    Raises:
        UserError: no such folder, not a cache, of a later version, files that are missing or cut short.
    """

    def __init__(self, folder: str | Path):
        self.folder = home(folder)
        self.manifest = read_manifest(self.folder)
        try:
            self.layout = Layout(**self.manifest["layout"])
            self.temperature: float | None = self.manifest["temperature"]
            self.rows: int = int(self.manifest["data"]["rows"])
            self.rows_per_shard: int = int(self.manifest["rows_per_shard"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{self.folder / MANIFEST}: is damaged (no JSON of a teacher cache); {REPAIR}") from error
        if (problem := why_incomplete(self.folder, contents=False)) is not None:
            raise UserError(f"{self.folder}: {problem}; {REPAIR}")
        self._shards: dict[int, np.memmap] = {}
        self._verified: set[int] = set()
        self._heads: dict[torch.device, Head] = {}

    def __len__(self) -> int:
        return self.rows

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": {}, "_heads": {}}  # a worker opens its own

    @property
    def bytes_per_token(self) -> float:
        """How many bytes of the shards a token takes, checksums included."""
        return self.layout.row.itemsize / self.layout.sequence_length

    def row(self, index: int, text: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """What the teacher predicts after each of the n tokens of row `index`.

        top-k: `teacher_ids` int64 (n, k), most probable first, `teacher_logprobs` float32 (n, k), `teacher_tail`
        float32 (n), the log mass of all others. samples: `teacher_ids` (n, draws), ascending, one that was drawn twice
        stands twice; `teacher_weights` float32 (n, draws). hidden: `teacher_hidden` (n, hidden_size) in the stored
        dtype.

        text: the dataset's row, which has to be what the teacher read.

        Raises:
            UserError: the row or its shard is damaged on the disk, the shard is another cache's, or `text` is another.
        """
        record = self._record(index)
        if not is_whole(record):
            shard, at = divmod(range(self.rows)[index], self.rows_per_shard)
            raise self._damaged_row(shard, at, record)
        if text is not None and (found := text_digest(text)) != record["text"]:
            raise UserError(
                f"{self.folder}: row {index} was cached from another text (digest {record['text']:016x}, here it is "
                f"{found:016x}); give the same data in the same order (text, tokenizer, held-out share, seed), or "
                "cache again"
            )
        return decode(self.layout, record["tokens"])

    def at(self, index: int, position: int) -> dict[str, Tensor]:
        """One position of `row(index)`, without the row's checksum: of a shard once verified no other is read."""
        position = range(self.layout.sequence_length)[position]
        tokens = self._record(index)["tokens"][position : position + 1]
        return {name: values[0] for name, values in decode(self.layout, tokens).items()}

    def head(self, device: str | torch.device = "cpu") -> Head:
        """The head that goes with hidden states, as the teacher has it. Raises UserError for other kinds."""
        device = torch.device(device)
        if device not in self._heads:
            about = self.manifest.get("head")
            if about is None:
                raise UserError(
                    f"{self.folder}: holds {self.layout.kind}, which need no head; cache hidden states for one"
                )
            parts: dict[str, Any] = {name: self._array(about[name], device) for name in ("weight", "bias")}
            self._heads[device] = Head(**parts, scale=about["scale"], softcap=about["softcap"])
        return self._heads[device]

    def teacher(self, batch: Mapping[str, Tensor]) -> TeacherSource:
        """The teacher source of a batch with this cache's columns, of shape (b, n) like its labels.

        That is `TeacherTopK`, `TeacherSamples` or `TeacherHidden`. Position t answers for the token after t: the loss
        needs labels moved one to the left. Where the student's vocabulary is wider, pass the loss
        `vocab_size=cache.layout.vocab_size`; where it is the beginning of the cache's, that of the student, and of the
        ids here only those that it has (`KnowledgeDistiller` with `mohawk.teacher_models.CachedTeacher` does so).
        """
        if self.layout.kind == "top-k":
            return TeacherTopK(batch["teacher_ids"], batch["teacher_logprobs"], batch["teacher_tail"])
        if self.layout.kind == "samples":
            return TeacherSamples(batch["teacher_ids"], batch["teacher_weights"])
        hidden = batch["teacher_hidden"]
        head = self.head(hidden.device)
        return TeacherHidden(hidden, head.weight, head.bias, head.scale, head.softcap)

    def check(
        self,
        *,
        sequence_length: int | None = None,
        seed: int | None = None,
        tokenizer_hash: str | None = None,
        teacher_hash: str | None = None,
        temperature: float | None = None,
        divergence: str | None = None,
    ) -> None:
        """Whether training may use this cache as the arguments say; those left out are not compared.

        Raises:
            UserError: a line for each that does not fit: a temperature other than the one of the cut distribution, a
                divergence that the kind can't give, or another sequence length, order of rows (`seed`), tokenizer or
                teacher.
        """
        layout, data, about = self.layout, self.manifest["data"], self.manifest
        wrong = []

        def same(name: str, given, cached, do: str) -> None:
            if given is not None and cached is not None and given != cached:
                wrong.append(f"{name} {_short(cached)}, here it is {_short(given)}; {do}")

        same("sequence length", sequence_length, data["sequence_length"], "set this one, or cache again")
        same("data seed", seed, data["seed"], "set this one, or cache again")
        same("tokenizer", tokenizer_hash, about["tokenizer"], "the ids mean other words: cache again")
        same("teacher", teacher_hash, about["teacher"]["sha256"], "cache again with this teacher")
        if layout.kind != "hidden":
            same(
                "temperature", temperature, self.temperature, "a cut distribution can't be tempered: cache again at it"
            )
        entry = None if divergence is None else DIVERGENCES.get(divergence)
        if entry and entry.on_logits and layout.kind != "hidden":
            wrong.append(f"{layout.kind}, and {divergence} compares logits; cache hidden states, or use forward_kl")
        elif entry and entry.no_top_k and layout.kind == "top-k":
            other = entry.instead
            wrong.append(f"a top k, over which {divergence} can't be taken; cache hidden states, or use {other}")
        elif divergence not in (None, "forward_kl") and layout.kind == "samples":
            wrong.append(f"samples, from which {divergence} can't be estimated; use forward_kl, or cache a top k")
        if wrong:
            raise UserError("\n".join(f"{self.folder}: cached with {line}" for line in wrong))

    def damage(self) -> str | None:
        """None when every byte of every file is as written, else what is wrong. Reads everything."""
        return why_incomplete(self.folder)

    def _record(self, index: int) -> np.void:
        shard, at = divmod(range(self.rows)[index], self.rows_per_shard)
        if shard not in self._shards:
            if len(self._shards) >= OPEN_SHARDS:
                self._shards.pop(next(iter(self._shards)))
            opened = np.memmap(self.folder / shard_name(shard), dtype=self.layout.row, mode="r")
            if shard not in self._verified:
                self._verify(shard, opened)
                self._verified.add(shard)
            self._shards[shard] = opened
        return self._shards[shard][at]

    def _verify(self, shard: int, rows: np.memmap) -> None:
        """Compares a shard with the manifest: rows carry no temperature, so those of another cache are whole too."""
        path = self.folder / shard_name(shard)
        # pyrefly: ignore[bad-argument-type]  # an array is a buffer, of which numpy's stubs know from Python 3.12 on
        if hashlib.sha256(rows.view(np.uint8)).hexdigest() == self.manifest["files"][path.name]["sha256"]:
            return
        for at, record in enumerate(rows):
            if not is_whole(record):
                raise self._damaged_row(shard, at, record)
        raise UserError(f"{path}: is not this cache's (its rows are whole, its sha256 is not the manifest's); {REPAIR}")

    def _damaged_row(self, shard: int, at: int, record: np.void) -> UserError:
        return UserError(
            f"{self.folder / shard_name(shard)}: row {at} is damaged (checksum {checksum(record):08x}, "
            f"expected {record['crc']:08x}); {REPAIR}"
        )

    def _array(self, about: dict[str, Any] | None, device: torch.device) -> Tensor | None:
        if about is None:
            return None
        path = self.folder / about["file"]
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != self.manifest["files"][about["file"]]["sha256"]:
            raise UserError(f"{path}: is damaged (its sha256 is not the manifest's); {REPAIR}")
        values = np.frombuffer(bytearray(content), dtype=DTYPES[about["dtype"]]).reshape(about["shape"])
        return torch.from_numpy(values).view(getattr(torch, about["dtype"])).to(device)


class CachedRows(torch.utils.data.Dataset):
    """The rows of `dataset` with the cache's columns, by index; as long as the cache, which may end before the dataset.

    Every row that is read is compared with the text that the teacher read.

    Raises:
        UserError: the dataset is not the one the cache was made from: another sequence length, seed, text or tokenizer,
            or too few rows. Later, from a row: its text differs, or its record is damaged.
    """

    def __init__(self, dataset: Any, cache: TeacherCache):
        self.dataset, self.cache = dataset, cache
        first = dataset[0]
        cache.check(sequence_length=len(first["input_ids"]), seed=getattr(dataset, "seed", None))
        if len(dataset) < len(cache):
            raise UserError(
                f"{cache.folder}: cached from {len(cache)} rows, the data here has {len(dataset)}; give the same data "
                "(text, tokenizer, held-out share), or cache again"
            )
        for index in sorted({len(cache) * i // LOOKED_AT for i in range(LOOKED_AT)} | {len(cache) - 1}):
            cache.row(index, dataset[index])

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        index = range(len(self))[index]
        row = self.dataset[index]
        return {**row, **self.cache.row(index, row)}


REPAIR = "run mohawk cache again with the same recipe, which writes damaged files anew and keeps the others"


def shard_name(shard: int) -> str:
    return f"shard-{shard:05d}.bin"


def read_manifest(folder: Path) -> dict[str, Any]:
    """MANIFEST.json of a finished cache, checked against its own hash.

    Raises:
        UserError: there is none, or a damaged one.
        OSError: the machine refuses to read it, which says nothing of what is in it.
    """
    path = folder / MANIFEST
    try:
        manifest = parse_json(path.read_bytes())
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise UserError(f"{path}: is not of a teacher cache; give the folder that mohawk cache wrote")
        if manifest["version"] != VERSION:
            raise UserError(f"{path}: is of format version {manifest['version']}, known is {VERSION}; update mohawk")
        if manifest["sha256"] != manifest_sum(manifest):
            raise UserError(f"{path}: is damaged (its sha256 is not what it says); {REPAIR}")
    except FileNotFoundError:
        unfinished = " (it is not finished: run mohawk cache again)" if unfinished_folder(folder).is_dir() else ""
        raise UserError(f"{folder}: holds no {MANIFEST}, so it is no teacher cache{unfinished}") from None
    except OSError as error:
        if is_refusal(error):
            raise
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: is damaged (no JSON of a teacher cache); {REPAIR}") from error
    return manifest


def unfinished_folder(folder: Path) -> Path:
    """Where the cache `folder` grows until it is whole."""
    return folder.parent / f"{folder.name}.unfinished"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return f"{value[:12]}..." if isinstance(value, str) and len(value) > 40 else str(value)
