"""Where the text of a recipe lies and what rows it has: files and hub datasets, found, checked and opened."""

from __future__ import annotations

import bz2
import functools
import glob as globbing
import gzip
import hashlib
import io
import itertools
import lzma
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mohawk.core.folders import sum_file, why_altered
from mohawk.core.hub import hub_or_cache
from mohawk.core.json_files import parse_json
from mohawk.core.lines import damage, sums_of
from mohawk.core.places import home
from mohawk.data.generated import spare_lines
from mohawk.errors import FULL, UserError, causes, machines_own, naming

if TYPE_CHECKING:
    import datasets


# suffix -> format; the format `paragraphs` reads a text file as one document per blank-line separated block
SUFFIXES = {".txt": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}


FORMATS = ("text", "paragraphs", "jsonl", "parquet")


def _zstandard(path: Path, mode: str) -> io.BufferedReader:
    """Opens a .zst file with Arrow, which every installation has; Python itself reads Zstandard only from 3.14 on."""
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _zstandard}


DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError)  # what unpacking raises


BUILDERS = {"text": "text", "paragraphs": "text", "jsonl": "json", "parquet": "parquet"}


DEEPEST = 500  # brackets inside brackets in a line of JSON


class NotThere(UserError):
    """A local source that names no file here; it may name one later."""


@dataclass(frozen=True)
class Source:
    """Where text comes from.

    source: a file, folder, glob or hub dataset id. format: text (one file is one document), paragraphs (one
    blank-line separated block is one document), jsonl or parquet; None goes by the suffix. field: the column
    with the text. split and subset: as in `datasets.load_dataset`.
    """

    source: str
    split: str = "train"
    field: str = "text"
    subset: str | None = None
    format: str | None = None


def as_source(given: Any) -> Source:
    """A Source from a string, a path, a mapping, or an object with its attributes (a recipe's entry)."""
    if isinstance(given, Source):
        return given
    if isinstance(given, (str, Path)):
        return Source(str(given))
    fields = Source.__dataclass_fields__
    if isinstance(given, dict):
        return Source(**given)
    return Source(**{name: getattr(given, name) for name in fields if hasattr(given, name)})


def source_content(source: Any) -> str:
    """What a source holds, as a hash: of its files' bytes, or the fingerprint that `datasets` gives its rows."""
    source = as_source(source)
    files, form = local_files(source)
    return content_key(files) if files else load_rows(source, files, form)._fingerprint


def local_files(source: Source) -> tuple[list[Path], str | None]:
    """The files a local source names, sorted, and their format; ([], None) for a hub id."""
    name = source.source
    if source.format is not None and source.format not in FORMATS:
        raise UserError(f"data: {name}: format {source.format!r} is unknown; allowed: {', '.join(FORMATS)}")
    path = home(name)
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and _suffix(p) in SUFFIXES)
        if not files:
            raise NotThere(f"data: the folder {name} holds no {', '.join(SUFFIXES)} file")
    elif path.exists():
        raise UserError(f"data: {name} is neither a file nor a folder; give one of these")
    elif any(c in name for c in "*?["):
        files = sorted(Path(p) for p in globbing.glob(str(path), recursive=True) if Path(p).is_file())
        if not files:
            raise NotThere(f"data: {name} matches no file (looked from {Path.cwd()})")
    elif _looks_local(name):
        raise NotThere(f"data: {name} does not exist (looked for {path.absolute()})")
    else:
        return [], None
    if empty := [p for p in files if p.stat().st_size == 0]:
        raise UserError(f"data: {empty[0]} is empty; remove it or give it text")
    if source.format is not None:
        return files, source.format
    if (odd := next((p for p in files if _suffix(p) not in SUFFIXES), None)) is not None:
        raise UserError(f"data: {odd} has an unknown suffix; set format to one of {', '.join(FORMATS)}")
    forms = {SUFFIXES[_suffix(p)] for p in files}
    if len(forms) > 1:
        raise UserError(f"data: {name} mixes {', '.join(sorted(forms))}; give each kind as a source of its own")
    return files, forms.pop()


def check_written(files: Iterable[Path]) -> None:
    """UserError where one of the files was written here, by generate-data or purify, and is not as it was written."""
    for path in files:
        problem, sums = why_altered(path), sum_file(path)
        if problem is None and sums_of(path).exists():
            problem, sums = damage(path, spare_lines(path.parent)), sums_of(path)
        if problem is not None:
            raise UserError(
                f"{path}: damaged ({problem}); run the command that wrote it again, or, if you changed it on purpose, "
                f"delete {sums} to use it as it is"
            )


def _suffix(path: Path) -> str:
    return (path.with_suffix("") if path.suffix.lower() in OPENERS else path).suffix.lower()


def _looks_local(name: str) -> bool:
    parent = home(name).parent
    return (
        name.startswith((".", "/", "~", "\\"))
        or name.count("/") > 1
        or _suffix(Path(name)) in SUFFIXES
        or (parent != Path(".") and parent.is_dir())
    )


def load_rows(source: Source, files: list[Path], form: str | None, scratch: str | None = None) -> datasets.Dataset:
    import datasets

    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        if not files or form is None:
            with hub_or_cache():
                return datasets.load_dataset(source.source, source.subset, split=source.split)
        options: dict[str, Any] = {"sample_by": "document"} if BUILDERS[form] == "text" else {}
        if form == "jsonl":
            check_json(files)
        names = [globbing.escape(str(_unpacked(p, scratch).absolute())) for p in files]
        return datasets.load_dataset(BUILDERS[form], data_files=names, split=source.split, cache_dir=scratch, **options)
    except Exception as error:
        made = _user_error(error, source, files, form)
        # Arrow knows no names: of its copy, of which there is too little room, or of the text
        if isinstance(made, OSError) and made.errno is not None and made.filename is None and files:
            copied = made.errno in FULL and scratch is not None
            made.filename = str(Path(scratch).parent if copied else files[0] if len(files) == 1 else source.source)
        raise made from error
    finally:
        if not bars:
            datasets.enable_progress_bars()


def _user_error(error: Exception, source: Source, files: list[Path], form: str | None) -> BaseException:
    if isinstance(error, UserError):
        return error
    if (own := machines_own(error)) is not None:
        return own
    name = source.source
    chain = causes(error)
    root = chain[-1]
    said = next((str(e).strip().splitlines()[0][:300] for e in reversed(chain) if str(e).strip()), "no reason given")
    if files:
        if any(isinstance(e, UnicodeDecodeError) for e in chain) or "UTF-8" in said or "utf-8" in said:
            for path in files:
                _check_encoding(path)
        if "corresponds to no data" in said:
            return UserError(f"data: {name} has no rows; remove it or give it text")
        if "split" in str(error).lower():
            return UserError(f"data: {name}: a local file has only the split train, got {source.split!r}")
        what = {"jsonl": "JSON lines", "parquet": "Parquet"}.get(form or "", "text")
        return UserError(f"data: cannot read {name} as {what}: {said}")
    import datasets.exceptions

    if isinstance(error, ValueError) and ("split" in str(error).lower() or "BuilderConfig" in str(error)):
        return UserError(f"data: {name}: {str(error).strip().splitlines()[0][:300]}")
    missing = isinstance(error, (datasets.exceptions.DatasetNotFoundError, FileNotFoundError))
    offline = isinstance(error, ConnectionError) or type(root).__module__.split(".")[0].startswith("http")
    if missing or offline:
        why = "the hub cannot be reached" if offline else "the hub has no such dataset, or no access was granted"
        return UserError(f"data: {name} is no local file or folder, and {why}; give a path that exists")
    return UserError(f"data: cannot load {name}: {said}")


def check_encoding(files: list[Path], most: int) -> str:
    """UserError for the first text file that is not UTF-8; gives what was read: of each file an equal share of `most`
    characters."""
    share = max(1, most // len(files))
    whole = [_check_encoding(path, share) for path in files]
    if all(whole):
        return "all"
    return f"the first {share:,} characters" + (" of each file" if len(files) > 1 else "")


def _check_encoding(path: Path, most: int | None = None) -> bool:
    """UserError where a file is not UTF-8; gives whether all of it was read. most: only so many characters of it."""
    try:
        with open_file(path) as file, io.TextIOWrapper(file, encoding="utf-8") as file:
            left = most
            while left is None or left > 0:
                if not (read := file.read(1 << 20 if left is None else min(left, 1 << 20))):
                    return True
                left = None if left is None else left - len(read)
            return not file.read(1)
    except UnicodeDecodeError as error:
        raise UserError(
            f"data: {path} is not UTF-8 ({error.reason}, byte 0x{error.object[error.start]:02x}); "
            f"convert it, for example: iconv -f latin1 -t utf-8 {path.name}"
        ) from None


def check_json(files: list[Path], most: int | None = None) -> None:
    """UserError with the first line that is no JSON object, or is nested too deep: Arrow's own words do not tell, and
    some of these take its parser's process down.

    A file by another name than .jsonl may be one JSON text over several lines: an object, or a list of them. most: only
    so many lines of each file.
    """
    for path in files:
        with open_file(path) as file:
            for number, line in enumerate(itertools.islice(file, most), 1):
                if not line.strip(b" \t\r\n\xef\xbb\xbf"):
                    continue
                problem = _wrong_object(line, path)
                if problem is not None and is_one_text(path):
                    problem = _wrong_text(path)
                    if problem is None:
                        break
                if problem is not None:
                    raise UserError(f"data: {path}:{number}: {problem}")


def is_one_text(path: Path) -> bool:
    """Whether a JSON file may be, and is, one text over several lines or a list, instead of an object a line."""
    if _suffix(path) in (".jsonl", ".ndjson"):
        return False
    with open_file(path) as file:
        first = next((line for line in file if line.strip(b" \t\r\n\xef\xbb\xbf")), b"{}")
    try:
        return not isinstance(parse_json(first), dict)
    except ValueError:
        return True


def no_object(value: Any) -> str:
    """Says that a line's value is not a JSON object, and what it is."""
    kind = "null" if value is None else f"a JSON {type(value).__name__}"
    return f"{kind}, not an object; each line is one object"


def _wrong_object(line: bytes, path: Path) -> str | None:
    if _depth(line) > DEEPEST:
        return f"JSON nested more than {DEEPEST} deep"
    try:
        value = parse_json(line.strip())
    except UnicodeDecodeError:
        _check_encoding(path)
        return "not UTF-8"
    except ValueError as error:
        return f"not JSON ({error}); each line is one object"
    return None if isinstance(value, dict) else no_object(value)


def _wrong_text(path: Path) -> str | None:
    with open_file(path) as file:
        text = file.read()
    if _depth(text) > DEEPEST:
        return f"JSON nested more than {DEEPEST} deep"
    try:
        value = parse_json(text)
    except ValueError as error:
        return f"not JSON ({error}); each line is one object"
    if not isinstance(value, list):
        return None if isinstance(value, dict) else no_object(value)
    odd = next(((i, entry) for i, entry in enumerate(value) if not isinstance(entry, dict)), None)
    return odd and f"a JSON list whose entry {odd[0]} (from 0) is {no_object(odd[1]).partition(';')[0]}"


def _depth(text: bytes) -> int:
    if text.count(b"[") + text.count(b"{") <= DEEPEST:
        return 0
    brackets = re.sub(rb'"(?:[^"\\]|\\.)*"|[^][{}]', b"", text)
    return max(itertools.accumulate(1 if bracket in b"[{" else -1 for bracket in brackets), default=0)


@contextmanager
def open_file(path: Path) -> Iterator[Any]:
    """A file's bytes, compressed or not. Raises UserError where they are cut or damaged."""
    try:
        with OPENERS.get(path.suffix.lower(), open)(path, "rb") as file:
            yield file
    except DAMAGED as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the machine's: a disk, a permission
        raise UserError(f"data: {path}: cannot be read ({error or 'it is cut'}); check the file") from error


def _unpacked(path: Path, folder: str | None) -> Path:
    """A Zstandard file's content beside the Arrow copy: `datasets` needs one more package for it."""
    if path.suffix.lower() != ".zst" or folder is None:
        return path
    target = Path(tempfile.mkdtemp(dir=folder)) / path.stem
    with open_file(path) as file, naming(target), target.open("wb") as unpacked:
        shutil.copyfileobj(file, unpacked)
    return target


def rows_of(dataset: datasets.Dataset, source: Source) -> Iterator[tuple[int, dict[str, Any]]]:
    """(i from 0, row) of all rows. UserError for bytes that are not UTF-8, which Arrow takes in unread."""
    number = 0
    try:
        for number, row in enumerate(dataset, 1):
            # pyrefly: ignore[invalid-yield]  # a row is a dict, of which datasets says nothing
            yield number - 1, row
    except UnicodeDecodeError as error:
        for path in local_files(source)[0]:
            if _suffix(path) != ".parquet":
                _check_encoding(path)
        raise UserError(
            f"data: {source.source}: row {number} (from 0), or soon after it, is not UTF-8 ({error.reason}, byte "
            f"0x{error.object[error.start]:02x}); write the file anew with text that is"
        ) from None


def check_field(dataset: datasets.Dataset, source: Source) -> None:
    names = dataset.column_names
    if source.field not in names:
        raise UserError(f"data: {source.source} has no field {source.field!r}; its fields: {', '.join(names)}")


def content_key(files: list[Path]) -> str:
    """A hash of the files' bytes, hex; in one process, files that keep their size and times are read once."""
    stamps = ((path, path.stat()) for path in files)
    return _content_key(tuple((path, at.st_size, at.st_mtime_ns, at.st_ctime_ns) for path, at in stamps))


@functools.lru_cache(maxsize=1024)
def _content_key(files: tuple[tuple[Path, int, int, int], ...]) -> str:
    digest = hashlib.blake2b(digest_size=32)
    for path, size, *_ in files:
        digest.update(f"{size} ".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()
