"""Prompts and responses as they are given: JSON lines, text lines, Parquet or hub rows, each with where it stands."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from mohawk.core.json_files import parse_json
from mohawk.data.messages import Messages, chat_of
from mohawk.data.source_files import (
    DAMAGED,
    OPENERS,
    as_source,
    check_json,
    check_written,
    is_one_text,
    load_rows,
    local_files,
    no_object,
    rows_of,
)
from mohawk.errors import UserError, is_refusal

CHUNK = 1000  # rows of a Parquet file that are in memory at once


@dataclass(frozen=True)
class Prompt:
    """What a teacher is asked.

    id: 16 hex digits of the content's hash, with -2, -3, ... where the same prompt comes again; it does not depend on
    what else is asked. sha256: of the content. content: a text, or a chat's messages, as `mohawk.data.messages` has
    them. where: file and line. tools: of a chat, or None.
    """

    id: str
    sha256: str
    content: str | Messages
    where: str
    tools: list[dict[str, Any]] | None = None


def read_prompts(sources: Sequence[Any], *, limit: int | None = None) -> list[Prompt]:
    """The prompts of some sources, in their order.

    sources: as in `mohawk.data.source_files.Source`; a text file has one prompt a line (format `paragraphs`: one a
    block), any other one a row in `field`, a text or a list of messages. limit: only the first so many. Raises
    UserError.
    """
    prompts: list[Prompt] = []
    seen: Counter[str] = Counter()
    for source in map(as_source, sources):
        for where, row in read_records(source):
            if len(prompts) == limit:
                return prompts
            content, tools = row.get(source.field), None
            if isinstance(content, str):
                if not content.strip():
                    raise UserError(f"{where}: field {source.field!r} is empty; a prompt needs some words")
            else:
                try:
                    found = chat_of(row, source.field)
                except ValueError as error:
                    raise UserError(f"{where}: {error}; give a text, or messages") from None
                if found is None:
                    raise UserError(f"{where}: has no field {source.field!r}; its fields: {', '.join(map(str, row))}")
                content, tools = found
            digest = content_hash(content if tools is None else {"messages": content, "tools": tools})
            seen[digest] += 1
            again = f"-{seen[digest]}" if seen[digest] > 1 else ""
            prompts.append(Prompt(digest[:16] + again, digest, content, where, tools))
    if not prompts:
        raise UserError(f"prompts: {', '.join(as_source(s).source for s in sources)} holds none")
    return prompts


def read_records(source: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of every row of a source: where is "file:line" or "name row i" (from 0).

    A text file's rows are its lines that are not blank, each {field: line}. Raises UserError with file and line.
    """
    source = as_source(source)
    files, form = local_files(source)
    check_written(files)
    if not files:
        dataset = load_rows(source, files, form)
        for i, row in rows_of(dataset, source):
            yield f"{source.source} row {i}", row
        return
    if source.split != "train":
        raise UserError(f"{source.source}: lines of a file have no splits, got {source.split!r}; leave it out")
    if form == "parquet":  # read where it lies: `datasets` would keep a copy
        rows = (row for path in files for batch in _parquet_batches(path, CHUNK) for row in batch[1])
        yield from ((f"{source.source} row {i}", row) for i, row in enumerate(rows))
        return
    for path in files:
        if form == "jsonl":
            yield from _json_lines(path)
        elif form == "paragraphs":
            text = "".join(line for _, line in _lines(path))
            yield from (
                (str(path), {source.field: b.strip("\r\n")}) for b in re.split(r"\n(?:[ \t\r]*\n)+", text) if b.strip()
            )
        else:
            for number, line in _lines(path):
                if line.strip():
                    yield f"{path}:{number}", {source.field: line.rstrip("\r\n")}


def first_records(source: Any, count: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of the first rows of a source on this machine, and of the first row of each of its other files,
    without reading the rest.

    Of a Parquet file without rows the columns alone, each None; none of a form that only `datasets` reads.
    """
    source = as_source(source)
    files, form = local_files(source)
    if form == "parquet":
        for i, path in enumerate(files):
            yield from _parquet_rows(path, 1 if i else count)
    elif form == "jsonl":
        check_json(files, count)
        for i, path in enumerate(files):
            if not is_one_text(path):
                yield from islice(_json_lines(path), 1 if i else count)


def _parquet_rows(path: Path, count: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """The first rows of a file; of one without rows its columns, each None."""
    names, rows = next(_parquet_batches(path, count))
    if not rows:
        yield str(path), dict.fromkeys(names)
    for i, row in enumerate(rows):
        yield f"{path} row {i}", row


def _parquet_batches(path: Path, count: int) -> Iterator[tuple[list[str], list[dict[str, Any]]]]:
    """(names of the columns, rows) of a file, at most so many rows at a time and one batch at least, without the
    contents of columns of bytes, such as images."""
    from pyarrow import ArrowException, types
    from pyarrow.parquet import ParquetFile

    read = 0
    try:
        with ParquetFile(path) as file:
            fields = {field.name: field.type for field in file.schema_arrow}
            columns = [name for name, kind in fields.items() if not types.is_large_binary(kind)]
            columns = [name for name in columns if not types.is_binary(fields[name])]
            nothing, empty = dict.fromkeys(fields), True
            for batch in file.iter_batches(count, columns=columns):
                empty = False
                yield list(fields), [nothing | row for row in batch.to_pylist()]
                read += len(batch)
            if empty:
                yield list(fields), []
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: row {read} (from 0), or soon after it, is not UTF-8 ({error.reason}, byte "
            f"0x{error.object[error.start]:02x}); write the file anew with text that is"
        ) from error
    except (ArrowException, OSError) as error:
        if is_refusal(error):
            raise
        raise UserError(f"{path}: cannot be read as Parquet ({str(error).splitlines()[0]}); check the file") from error


def content_hash(content: Any) -> str:
    """sha256 of a prompt's text, or of its messages as canonical JSON; hex."""
    text = content if isinstance(content, str) else json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = parse_json(line)
        except ValueError as error:
            raise UserError(f"{where}: not JSON ({error}); each line is one object") from None
        if not isinstance(row, dict):
            raise UserError(f"{where}: {no_object(row)}")
        yield where, row


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line with its end) of a text file, compressed or not."""
    number = 0
    try:
        with (
            OPENERS.get(path.suffix.lower(), open)(path, "rb") as packed,
            io.TextIOWrapper(packed, encoding="utf-8-sig", newline="\n") as file,
        ):
            for number, line in enumerate(file, 1):
                yield number, line
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}:{number + 1}: not UTF-8 ({error.reason}); convert it, for example with iconv"
        ) from None
    except DAMAGED as error:
        raise UserError(f"{path}:{number + 1}: cannot be read ({error}); check the file") from None
