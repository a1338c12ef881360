"""Running a teacher once over a dataset and keeping what it says: top k, random samples or hidden states.

The cache grows in a folder called NAME.unfinished, shard by shard; a shard appears by one rename, and so does the
folder at the end. Rows carry their own checksums, so a run that was killed at any moment goes on behind the last whole
shard, and a shard that was damaged later is written anew by the same call. Memory is that of a batch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mohawk.core.folders import MANIFEST, fsync, locked, manifest_sum, why_incomplete
from mohawk.core.json_files import parse_json
from mohawk.core.places import home
from mohawk.core.processes import count, is_first, on_first
from mohawk.core.terminal import SHOWN, Bar
from mohawk.errors import UserError, is_refusal, naming
from mohawk.loading.model_hash import teacher_hash
from mohawk.losses.heads import Head
from mohawk.models.sharding import is_sharded, reshard
from mohawk.teacher_cache.answers import Answers, Kept, check_range, make_answers
from mohawk.teacher_cache.layout import Layout, is_whole, make_row, text_digest
from mohawk.teacher_cache.reader import (
    FORMAT,
    VERSION,
    CachedRows,
    TeacherCache,
    read_manifest,
    shard_name,
    unfinished_folder,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

SETTINGS = "settings.json"  # what an unfinished cache will be; a second copy of the manifest's in a finished one
SHARD_BYTES = 32 << 20  # what a kill can cost: 150,000 tokens of a top 64


def write_cache(
    folder: str | Path,
    teacher: PreTrainedModel,
    dataset: Any,
    *,
    kind: str = "top-k",
    k: int = 64,
    draws: int = 12,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 8,
    rows: int | None = None,
    vocab_size: int | None = None,
    autocast: torch.dtype | None = None,
    tokenizer_hash: str | None = None,
    rows_per_shard: int | None = None,
) -> TeacherCache:
    """Run the teacher over a dataset's rows and keep its answers in `folder`, or go on with that, or find it done.

    Args:
        folder: appears when it is whole; until then NAME.unfinished beside it holds what there is.
        teacher: a causal language model, on its device, whose packed rows it tells apart by their `position_ids`. Of
            one in parts all processes must ask: the first one writes, and batch_size is each one's.
        dataset: map-style rows of one length n with `input_ids`, and `position_ids` and `segment_ids` if packed.
        kind: top-k (with the log mass of the rest), samples (arXiv 2503.16870) or hidden (the final hidden states, bit
            for bit, and the head).
        k: of top-k, 1 to the vocabulary. draws: of samples, with replacement.
        temperature: of the softmax that is cut or drawn from. The loss has to be at the same; hidden states know none.
        seed: of the draws.
        batch_size: rows at once. No answer depends on it beyond the rounding of the teacher's own products.
        rows: only the first so many (a packed dataset's rows are shuffled already).
        vocab_size: only the first so many logits are real, as in `kd_loss`.
        autocast: dtype of the teacher's products, and then of hidden states and head, as in training.
        tokenizer_hash: `text.tokenizer_key` of the tokenizer, for `TeacherCache.check`.
        rows_per_shard: default: 32 MiB.

    Raises:
        UserError: an argument out of its range; `folder` holds something else or a cache made with other settings or of
            another text; another process is writing it; the disk is full or can't be written; the teacher gives NaN.
    """
    folder = home(folder)
    answers = make_answers(
        teacher, dataset, kind=kind, k=k, draws=draws, temperature=temperature, seed=seed, vocab_size=vocab_size,
        autocast=autocast,
    )  # fmt: skip
    about = {
        "name": str(getattr(teacher.config, "_name_or_path", "")) or type(teacher).__name__.removeprefix("FSDP"),
        "sha256": teacher_hash(teacher),
        "autocast": None if autocast is None else str(autocast).removeprefix("torch."),
    }
    settings = _settings(
        answers.layout, dataset, about, temperature=None if kind == "hidden" else float(temperature),
        draw_seed=seed if kind == "samples" else None, tokenizer_hash=tokenizer_hash, rows=rows, batch_size=batch_size,
        rows_per_shard=rows_per_shard,
    )  # fmt: skip
    training = teacher.training
    teacher.eval()
    try:
        if not is_sharded(teacher):
            _write_or_go_on(folder, settings, answers, dataset, batch_size)
        elif is_first():
            try:
                _write_or_go_on(folder, settings, answers, dataset, batch_size * count())
            except UserError:  # found between two batches; in the middle of one the others hear of nothing but its end
                answers.ended()
                raise
            answers.ended()
        else:
            answers.follow()
    finally:
        teacher.train(training)
        reshard(teacher)
    on_first(lambda: TeacherCache(folder))  # where the first one could not write it, it has ended, and so do all
    return TeacherCache(folder)


def keep_answers(
    folder: str | Path,
    answers: Kept,
    dataset: Any,
    *,
    teacher: dict[str, Any],
    temperature: float | None,
    tokenizer_hash: str | None,
    rows: int | None = None,
    batch_size: int = 8,
) -> TeacherCache:
    """`write_cache` with answers that come from elsewhere than a model in this process.

    teacher: what tells it from others: name, sha256, autocast, and what else there is. Raises UserError.
    """
    folder = home(folder)
    settings = _settings(
        answers.layout, dataset, teacher, temperature=temperature, draw_seed=None, tokenizer_hash=tokenizer_hash,
        rows=rows, batch_size=batch_size, rows_per_shard=None,
    )  # fmt: skip
    _write_or_go_on(folder, settings, answers, dataset, batch_size)
    return TeacherCache(folder)


def _settings(
    layout: Layout,
    dataset: Any,
    teacher: dict[str, Any],
    *,
    temperature: float | None,
    draw_seed: int | None,
    tokenizer_hash: str | None,
    rows: int | None,
    batch_size: int,
    rows_per_shard: int | None,
) -> dict[str, Any]:
    """What an unfinished cache will be. Raises UserError for a number out of its range."""
    rows = len(dataset) if rows is None else rows
    check_range("rows", rows, 1, len(dataset))
    check_range("batch_size", batch_size, 1)
    per_shard = rows_per_shard or max(1, SHARD_BYTES // layout.row.itemsize)
    check_range("rows_per_shard", per_shard, 1)
    return {
        "format": FORMAT,
        "version": VERSION,
        "layout": asdict(layout),
        "id_bits": layout.id_bits,
        "low_bits": layout.low_bits,
        "record": [list(field) for field in layout.fields],  # as JSON gives it back
        "temperature": temperature,
        "draw_seed": draw_seed,
        "teacher": teacher,
        "tokenizer": tokenizer_hash,
        "data": {
            "rows": rows,
            "sequence_length": layout.sequence_length,
            "seed": getattr(dataset, "seed", None),
        },
        "rows_per_shard": per_shard,
    }


def _write_or_go_on(folder: Path, settings: dict[str, Any], answers: Kept, dataset: Any, batch_size: int) -> None:
    """The cache, unless it is there. Raises UserError."""
    if _taken(folder) and _finished(folder, settings, dataset):
        return
    unfinished = unfinished_folder(folder)
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
        with locked(unfinished):
            if _taken(folder):  # another process has finished it meanwhile
                raise UserError(f"{folder}: was just written by another process; run again to check it")
            _claim(unfinished, settings)
            _write(unfinished, folder, settings, answers, dataset, batch_size)
    except OSError as error:
        raise UserError(
            f"{unfinished}: cannot be written ({error.strerror}); make room or choose another output, and run again: "
            "finished shards are kept"
        ) from error


def _taken(folder: Path) -> bool:
    """Whether something is there; an empty folder is nothing."""
    return os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir()))


def _finished(folder: Path, settings: dict[str, Any], dataset: Any) -> bool:
    """Whether the cache is there already; a damaged one is moved back to where it is written."""
    damaged = None
    try:
        old = read_manifest(folder)
    except UserError:  # not a cache, or a damaged manifest: the settings lie there twice
        old = _read_settings(folder)
        if old is None:
            raise UserError(f"{folder}: exists and is not a teacher cache; choose another output") from None
        damaged = f"{MANIFEST} is damaged or missing"
    _same(folder, old, settings)
    problem = damaged or why_incomplete(folder)
    if problem is None:
        cache = TeacherCache(folder)
        CachedRows(dataset, cache)  # of the same text?
        log.info("%s is there already: %s rows, nothing damaged", folder, f"{len(cache):,}", extra=SHOWN)
        return True
    log.warning("%s: %s; writing that again", folder, problem)
    unfinished = unfinished_folder(folder)
    if unfinished.exists():
        raise UserError(f"{folder}: {problem}, and {unfinished} exists too; delete one of them and run again")
    _drop_foreign(folder)
    _write_json(folder / SETTINGS, settings)
    os.rename(folder, unfinished)
    (unfinished / MANIFEST).unlink(missing_ok=True)
    return False


def _drop_foreign(folder: Path) -> None:
    """Deletes shards whose sha256 the manifest does not have: the rows of another cache of this text are whole too.

    Of a damaged manifest what can be read counts, since no damage makes a hash fit; of none, the rows' checksums do.
    """
    try:
        files = parse_json((folder / MANIFEST).read_bytes())["files"]
        known = {name: entry.get("sha256") for name, entry in files.items() if isinstance(entry, dict)}
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return
    for path in folder.glob("shard-*.bin"):
        if _entry(path)["sha256"] != known.get(path.name):
            log.warning("%s is not what %s has; writing it again", path, MANIFEST)
            path.unlink()


def _claim(unfinished: Path, settings: dict[str, Any]) -> None:
    """The unfinished cache in this folder is of these settings, and the disk has room for it."""
    old = _read_settings(unfinished)
    if old is not None:
        _same(unfinished, old, settings)
    elif any(unfinished.glob("shard-*.bin")):
        raise UserError(f"{unfinished}: its {SETTINGS} is missing or damaged; delete the folder and run again")
    else:
        _write_json(unfinished / SETTINGS, settings)
    there = sum(path.stat().st_size for path in unfinished.glob("shard-*.bin"))
    needed = settings["data"]["rows"] * Layout(**settings["layout"]).row.itemsize - there
    free = shutil.disk_usage(unfinished).free
    if needed > free:
        raise UserError(
            f"{unfinished}: needs {needed / 1e9:.1f} GB more, the disk has {free / 1e9:.1f} GB free; make room, choose "
            "another output, a smaller k or fewer rows"
        )


def _write(
    unfinished: Path, folder: Path, settings: dict[str, Any], answers: Kept, dataset: Any, batch_size: int
) -> None:
    """All shards that are not there, then the manifest, then the folder's name."""
    layout, rows, per_shard = answers.layout, settings["data"]["rows"], settings["rows_per_shard"]
    files, texts = {}, []
    with Bar("cache", rows) as progress:
        for shard in range(-(-rows // per_shard)):
            span = range(shard * per_shard, min((shard + 1) * per_shard, rows))
            path = unfinished / shard_name(shard)
            found = _kept(path, layout, dataset, span)
            if found is None:
                found = _write_shard(path, answers, dataset, span, batch_size, progress)
            else:
                progress.skip(len(span))
            digest, text = found
            files[path.name] = {"bytes": path.stat().st_size, "sha256": digest}
            texts.append(text)
    about = {}
    if layout.kind == "hidden":
        assert isinstance(answers, Answers)
        about["head"] = _write_head(unfinished, answers.head)
        names = [part["file"] for part in (about["head"]["weight"], about["head"]["bias"]) if part]
        files |= {name: _entry(unfinished / name) for name in names}
    files[SETTINGS] = _entry(unfinished / SETTINGS)
    data = settings["data"] | {"sha256": hashlib.sha256(np.concatenate(texts).astype("<u8").tobytes()).hexdigest()}
    _write_json(unfinished / MANIFEST, settings | {"data": data} | about | {"files": files})
    os.rename(unfinished, folder)
    fsync(folder.parent)
    tokens, seconds = progress.worked * layout.sequence_length, progress.seconds
    size = layout.row.itemsize / layout.sequence_length
    log.info(
        "cached %s rows in %s: %s tokens (%s in this run), %.1f bytes a token, %s MB, %s tokens/s", f"{rows:,}", folder,
        f"{rows * layout.sequence_length:,}", f"{tokens:,}", size, f"{rows * layout.row.itemsize / 1e6:,.1f}",
        f"{tokens / seconds:,.0f}",
        extra=SHOWN,
    )  # fmt: skip


def _kept(path: Path, layout: Layout, dataset: Any, span: range) -> tuple[str, np.ndarray] | None:
    """sha256 and text digests of a finished shard, if every row of it is whole; None if it has to be written."""
    if not path.is_file():
        return None
    if path.stat().st_size != len(span) * layout.row.itemsize:
        log.warning(
            "%s has %d bytes, not %d; writing it again", path, path.stat().st_size, len(span) * layout.row.itemsize
        )
        return None
    shard, digest = np.memmap(path, dtype=layout.row, mode="r"), hashlib.sha256()
    for index, row in zip(span, shard, strict=True):
        if not is_whole(row):
            log.warning("%s is damaged; writing it again", path)
            return None
        if int(row["text"]) != text_digest(dataset[index]):
            raise UserError(
                f"{path}: row {index} was cached from another text; give the same data, choose another output, or "
                f"delete {path.parent}"
            )
        digest.update(row.tobytes())
    return digest.hexdigest(), np.array(shard["text"])


def _write_shard(
    path: Path, answers: Kept, dataset: Any, span: range, batch_size: int, progress: Bar
) -> tuple[str, np.ndarray]:
    """Writes one shard, which appears whole; its sha256 and its rows' text digests."""
    digest, texts, length = hashlib.sha256(), [], answers.layout.sequence_length
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        for start in range(0, len(span), batch_size):
            indices = span[start : start + batch_size]
            given = [dataset[i] for i in indices]
            if odd := [i for i, row in zip(indices, given, strict=True) if len(row["input_ids"]) != length]:
                raise UserError(f"data: row {odd[0]} is not of {length} tokens as row 0 is; pad all rows to one length")
            batch = {
                "input_ids": torch.stack([row["input_ids"] for row in given]),
                "position_ids": torch.stack([row.get("position_ids", torch.arange(length)) for row in given]),
            }
            for row, columns in zip(given, answers.columns(batch, indices), strict=True):
                texts.append(text_digest(row))
                record = make_row(answers.layout, texts[-1], columns).tobytes()
                digest.update(record)
                with naming(part):
                    file.write(record)
            progress.add(len(given))
            speed = f"{progress.worked * length / progress.seconds:,.0f} tokens/s"
            progress.say(f"cache  row {progress.done}/{progress.total}  {speed}", speed)
        with naming(part):
            file.flush()
    fsync(part)
    os.rename(part, path)
    fsync(path.parent)
    return digest.hexdigest(), np.array(texts, dtype=np.uint64)


def _write_head(folder: Path, head: Head) -> dict[str, Any]:
    """head.bin and bias.bin; what the manifest says of them."""
    about: dict[str, Any] = {"scale": head.scale, "softcap": head.softcap}
    for name, tensor in (("weight", head.weight), ("bias", head.bias)):
        about[name] = None
        if tensor is not None:
            path = folder / {"weight": "head.bin", "bias": "bias.bin"}[name]
            with naming(path):
                path.write_bytes(tensor.contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes())
            fsync(path)
            about[name] = {
                "file": path.name,
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": [*tensor.shape],
            }
    return about


def _same(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Refuses to go on with a cache that was begun otherwise."""
    wrong = []
    for key in new:
        before, now = old.get(key), new[key]
        parts = now if isinstance(now, dict) else {"": now}
        for part, value in parts.items():
            was = before.get(part) if isinstance(before, dict) else before
            if was != value and (key, part) != ("teacher", "name"):
                wrong.append(f"{key}{'.' * bool(part)}{part} {was} (now {value})")
    if wrong:
        raise UserError(
            f"{folder}: holds a cache made with another {', '.join(wrong)}; choose another output, or delete the folder"
        )


def _read_settings(folder: Path) -> dict[str, Any] | None:
    try:
        settings = parse_json((folder / SETTINGS).read_bytes())
        return settings if settings["sha256"] == manifest_sum(settings) and settings["format"] == FORMAT else None
    except OSError as error:
        if is_refusal(error):
            raise
        return None
    except (ValueError, KeyError, TypeError):
        return None


def _write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a JSON object by one rename, with its own hash in it."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value | {"sha256": manifest_sum(value)}, indent=1) + "\n", encoding="utf-8")
    fsync(part)
    os.rename(part, path)
    fsync(path.parent)


def _entry(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
