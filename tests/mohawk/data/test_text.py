import errno
import gzip
import json
import os
import time

import datasets
import numpy as np
import pytest

from mohawk.data.source_files import Source, as_source
from mohawk.data.text import tokenize
from mohawk.errors import UserError
from tests.helpers.compressed import COMPRESS, damages, flips

WORDS = ["the first text", "a second one,\nof two lines", "third: naïve café ✓"]


def read(text, tokenizer) -> list[str]:
    return [
        tokenizer.decode(text.tokens[a:b].astype(int).tolist())
        for a, b in zip(text.offsets[:-1], text.offsets[1:], strict=True)
    ]


@pytest.fixture
def load(tmp_path, tokenizer):
    def load(source, **options):
        return read(tokenize(source, tokenizer, cache=tmp_path / "cache", **options), tokenizer)

    return load


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def test_every_form_of_a_source_gives_the_same_documents(tmp_path, load):
    rows = [{"text": w, "other": i} for i, w in enumerate(WORDS)]
    (tmp_path / "texts" / "deep").mkdir(parents=True)
    for i, words in enumerate(WORDS):
        (tmp_path / "texts" / ("deep" if i == 0 else "") / f"{i}.txt").write_text(words, encoding="utf-8")
    write_jsonl(tmp_path / "rows.jsonl", rows)
    write_jsonl(tmp_path / "rows.data", rows)
    with gzip.open(tmp_path / "zipped.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write((tmp_path / "rows.jsonl").read_text(encoding="utf-8"))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "blocks.txt").write_text("\n\n".join(WORDS) + "\n\n \n", encoding="utf-8")
    expected = sorted(w + "<eos>" for w in WORDS)
    for source in (
        tmp_path / "texts",
        f"{tmp_path}/texts/**/*.txt",
        tmp_path / "rows.jsonl",
        tmp_path / "zipped.jsonl.gz",
        {"source": str(tmp_path / "rows.data"), "format": "jsonl"},
        tmp_path / "rows.parquet",
        Source(str(tmp_path / "blocks.txt"), format="paragraphs"),
    ):
        assert sorted(t.replace("\n<eos>", "<eos>") for t in load(source)) == expected, source
    assert load(tmp_path / "blocks.txt") == ["\n\n".join(WORDS) + "\n\n \n<eos>"]


def test_a_relative_home_or_object_source(tmp_path, load, monkeypatch):
    (tmp_path / "a.txt").write_text("words")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    class Entry:
        source, field, subset, format, split = "~/a.txt", "text", None, None, "train"

    assert load("a.txt") == load(Entry()) == load("./*.txt") == ["words<eos>"]
    assert as_source("x") == Source("x", "train", "text", None, None)


def test_split_slices_rows(tmp_path, load):
    write_jsonl(tmp_path / "rows.jsonl", [{"text": str(i)} for i in range(10)])
    assert load(Source(str(tmp_path / "rows.jsonl"), split="train[2:4]")) == ["2<eos>", "3<eos>"]


def test_empty_documents_are_left_out(tmp_path, load):
    write_jsonl(tmp_path / "rows.jsonl", [{"t": "a"}, {"t": ""}, {"t": None}, {"t": " \n"}, {"t": "b"}])
    assert load(Source(str(tmp_path / "rows.jsonl"), field="t")) == ["a<eos>", "b<eos>"]


def test_special_tokens_are_the_tokenizers(tmp_path, tokenizer, monkeypatch):
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    (tmp_path / "a.txt").write_text("ab")
    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 256), ("<eos>", 257)]
    )
    both = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", bos_token="<bos>")
    text = tokenize(tmp_path / "a.txt", both, cache=tmp_path / "cache")
    assert read(text, both) == ["<bos>ab<eos>"]  # one EOS, not two
    monkeypatch.setattr("mohawk.data.text.PIECE", 1)
    (tmp_path / "a.txt").write_text("ba")
    assert read(tokenize(tmp_path / "a.txt", both, cache=tmp_path / "cache"), both) == ["<bos>ba<eos>"]

    neither = PreTrainedTokenizerFast(tokenizer_object=type(backend).from_str(tokenizer.backend_tokenizer.to_str()))
    assert read(tokenize(tmp_path / "a.txt", neither, cache=tmp_path / "cache"), neither) == ["ba"]


def test_a_document_longer_than_a_piece_keeps_every_character(tmp_path, load, monkeypatch):
    monkeypatch.setattr("mohawk.data.text.PIECE", 100)
    lines = "".join(f"line {i}\n" for i in range(100)) + "x" * 250 + "\nend"
    (tmp_path / "a.txt").write_text(lines)
    (tmp_path / "b.txt").write_text("short")
    assert load(f"{tmp_path}/?.txt") == [lines + "<eos>", "short<eos>"]


def test_second_time_comes_from_the_cache(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "a.txt").write_text("some words")
    first = tokenize(tmp_path / "a.txt", tokenizer, cache=tmp_path / "cache")
    tokenizer("some text", truncation=True, max_length=2)  # leaves its settings in the tokenizer
    monkeypatch.setattr("mohawk.data.text._write", None)
    (tmp_path / "a.txt").rename(tmp_path / "moved.txt")
    os.utime(tmp_path / "moved.txt", (time.time() + 9, time.time() + 9))
    again = tokenize(tmp_path / "moved.txt", tokenizer, cache=tmp_path / "cache")
    assert again.folder == first.folder
    tokenizer("x", truncation=False)


def test_other_content_tokenizer_or_field_is_tokenised_anew(tmp_path, tokenizer):
    from transformers import PreTrainedTokenizerFast

    write_jsonl(tmp_path / "a.jsonl", [{"text": "one", "title": "two"}])
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<bos>")
    cache = tmp_path / "cache"
    folders = [
        tokenize(tmp_path / "a.jsonl", tokenizer, cache=cache).folder,
        tokenize(Source(str(tmp_path / "a.jsonl"), field="title"), tokenizer, cache=cache).folder,
        tokenize(tmp_path / "a.jsonl", other, cache=cache).folder,
    ]
    write_jsonl(tmp_path / "a.jsonl", [{"text": "six", "title": "two"}])
    folders.append(tokenize(tmp_path / "a.jsonl", tokenizer, cache=cache).folder)
    assert len(set(folders)) == 4


def test_an_interrupted_tokenisation_leaves_nothing(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "a.txt").write_text("some words")

    def fail(*_args, **_kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mohawk.data.text.np.save", fail)
        with pytest.raises(KeyboardInterrupt):
            tokenize(tmp_path / "a.txt", tokenizer, cache=tmp_path / "cache")
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []
    assert read(tokenize(tmp_path / "a.txt", tokenizer, cache=tmp_path / "cache"), tokenizer)


def test_an_unwritable_cache_is_told(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("some words")
    with pytest.raises(UserError, match="cannot write the cache .*; set MOHAWK_CACHE to a writable folder"):
        tokenize(tmp_path / "a.txt", tokenizer, cache=tmp_path / "a.txt" / "cache")


def test_large_vocabularies_need_four_bytes(tmp_path, tokenizer):
    import copy

    (tmp_path / "a.txt").write_text("ab")
    big = copy.deepcopy(tokenizer)
    big.add_tokens([f"<extra{i}>" for i in range(70_000)])
    text = tokenize(tmp_path / "a.txt", big, cache=tmp_path / "cache")
    assert text.dtype == np.dtype("<u4") and read(text, big) == ["ab<eos>"]
    assert tokenize(tmp_path / "a.txt", tokenizer, cache=tmp_path / "cache").dtype == np.dtype("<u2")


def mistake_empty(folder):
    (folder / "empty.txt").write_text("")
    return folder / "empty.txt", "empty.txt is empty"


def mistake_blank(folder):
    (folder / "blank.txt").write_text(" \n\n")
    return folder / "blank.txt", "holds no text"


def mistake_field(folder):
    write_jsonl(folder / "a.jsonl", [{"title": "x", "body": "y"}])
    return folder / "a.jsonl", "no field 'text'; its fields: title, body"


def mistake_type(folder):
    write_jsonl(folder / "a.jsonl", [{"text": [1, 2]}])
    return folder / "a.jsonl", "field 'text' holds list, not text"


def mistake_encoding(folder):
    (folder / "fine.txt").write_text("fine")
    (folder / "latin.txt").write_bytes("un café".encode("latin1"))
    return folder / "*.txt", "latin.txt is not UTF-8"


def mistake_json(folder):
    (folder / "a.jsonl").write_text('{"text": "x"}\n{"text": \n')
    return folder / "a.jsonl", "a.jsonl:2: not JSON .*; each line is one object"


def mistake_parquet(folder):
    (folder / "a.parquet").write_text("no parquet")
    return folder / "a.parquet", "cannot read .* as Parquet"


def mistake_no_rows(folder):
    (folder / "a.jsonl").write_text("\n\n")
    return folder / "a.jsonl", r"a\.jsonl has no rows; remove it or give it text"


def mistake_missing(folder):
    return folder / "nowhere.txt", "nowhere.txt does not exist"


def mistake_glob(folder):
    return folder / "*.txt", "matches no file"


def mistake_folder(folder):
    (folder / "a.zip").write_text("x")
    return folder, "holds no .txt"


def mistake_suffix(folder):
    (folder / "a.log").write_text("x")
    return folder / "a.log", "unknown suffix; set format"


def mistake_mixed(folder):
    (folder / "a.txt").write_text("x")
    write_jsonl(folder / "b.jsonl", [{"text": "y"}])
    return folder, "mixes jsonl, text"


def mistake_format(folder):
    (folder / "a.txt").write_text("x")
    return {"source": str(folder / "a.txt"), "format": "csv"}, "format 'csv' is unknown; allowed: text"


def mistake_split(folder):
    (folder / "a.txt").write_text("x")
    return {"source": str(folder / "a.txt"), "split": "validation"}, "only the split train, got 'validation'"


@pytest.mark.parametrize("mistake", [v for k, v in list(globals().items()) if k.startswith("mistake_")])
def test_mistakes_are_told_in_one_line(tmp_path, tokenizer, mistake):
    folder = tmp_path / "texts"
    folder.mkdir()
    source, message = mistake(folder)
    source = str(source) if not isinstance(source, dict) else source
    with pytest.raises(UserError, match=message) as caught:
        tokenize(source, tokenizer, cache=tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_an_unreachable_hub_is_told(tmp_path, tokenizer, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError, match="someone/texts is no local file or folder, and the hub cannot be reached"):
        tokenize("someone/texts", tokenizer, cache=tmp_path)


def test_a_hub_dataset_is_asked_for_by_subset_and_split(tmp_path, tokenizer, monkeypatch):
    asked = []

    def load_dataset(name, subset, split):
        asked.append((name, subset, split))
        return datasets.Dataset.from_dict({"body": ["hub text"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = Source("someone/texts", split="test", field="body", subset="en")
    text = tokenize(source, tokenizer, cache=tmp_path)
    assert read(text, tokenizer) == ["hub text<eos>"] and asked == [("someone/texts", "en", "test")]


def latin(words):
    """An Arrow column of text whose last entry has a byte of Latin-1, which Arrow takes in unread."""
    import pyarrow

    raw = pyarrow.array([*(word.encode() for word in words), b"caf\xe9"])
    return pyarrow.Array.from_buffers(pyarrow.string(), len(raw), raw.buffers())


@pytest.mark.parametrize(
    ("column", "words"),
    [
        (lambda: [None, 1, 2], r"field 'text' holds int, not text, in row 1 \(from 0\); its fields: text"),
        (lambda: [None, ["a"]], r"field 'text' holds list, not text, in row 1 \(from 0\)"),
        (lambda: latin(["one", "two"]), r"row \d+ \(from 0\), or soon after it, is not UTF-8 \(.*byte 0xe9\)"),
    ],
    ids=["numbers", "lists", "latin-1"],
)
def test_parquet_that_is_not_text(tmp_path, load, column, words):
    import pyarrow
    from pyarrow import parquet

    from mohawk.data.records import read_records

    parquet.write_table(pyarrow.table({"text": column()}), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=words):
        load(tmp_path / "rows.parquet")
    if "UTF-8" in words:
        with pytest.raises(UserError, match=words):
            list(read_records(tmp_path / "rows.parquet"))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": 5}', "field 'text' holds int, not text, in row 300|:301: "),
        (b'{"text": "caf\xe9"}', r"is not UTF-8 \(.*byte 0xe9\)"),
        (b'{"text": "half \\ud800 a character"}', r"rows.jsonl:301: not JSON \(half a character, \\ud800 alone\)"),
        (b'{"text": "cut', r"rows.jsonl:301: not JSON \(Unterminated string"),
        (b'{"text": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "rows.jsonl:301: JSON nested more than 500"),
    ],
    ids=["number", "latin-1", "surrogate", "cut", "deep"],
)
def test_a_line_of_json_that_is_wrong(tmp_path, load, line, words):
    """Among good ones; the nested one would take the process down within Arrow."""
    good = "".join(json.dumps({"text": f"sentence {i} of some"}) + "\n" for i in range(300)).encode()
    (tmp_path / "rows.jsonl").write_bytes(good + line + b"\n")
    with pytest.raises(UserError, match=words):
        load(tmp_path / "rows.jsonl")


def test_brackets_in_texts_are_no_nesting(tmp_path, load):
    write_jsonl(tmp_path / "rows.jsonl", [{"text": "[{" * 2000 + '"'}])
    assert load(tmp_path / "rows.jsonl") == ["[{" * 2000 + '"<eos>']


KINDS = {
    "null": "null",
    "5": "a JSON int",
    "true": "a JSON bool",
    '"abc"': "a JSON str",
    '[{"text": "a"}]': "a JSON list",
}


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.ndjson", "rows.jsonl.gz", "rows.json"])
@pytest.mark.parametrize("line", KINDS)
def test_a_line_that_is_no_object(tmp_path, load, line, name):
    """Arrow's parser is taken down by some of these."""
    import gzip

    from mohawk.data.records import first_records

    for good in ("", '{"text": "a"}\n'):
        text = f"{good}{line}\n".encode()
        (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
        if name == "rows.json" and "[" in line and not good:
            assert load(tmp_path / name) == ["a<eos>"]
            continue
        words = rf"{name}:{2 if good else 1}: {KINDS[line]}, not an object; each line is one object"
        with pytest.raises(UserError, match=words):
            load(tmp_path / name)
        with pytest.raises(UserError, match=words):
            list(first_records(tmp_path / name, 200))


def test_one_json_text_over_several_lines(tmp_path, load):
    (tmp_path / "a.json").write_text('[\n{"text": "a"},\n{"text": "b"}\n]\n')
    (tmp_path / "b.json").write_text('{\n "text": "a"\n}\n')
    assert load(tmp_path / "a.json") == ["a<eos>", "b<eos>"] and load(tmp_path / "b.json") == ["a<eos>"]
    (tmp_path / "c.json").write_text('[{"text": "a"},\n null]\n')
    with pytest.raises(UserError, match=r"c.json:1: a JSON list whose entry 1 \(from 0\) is null, not an object"):
        load(tmp_path / "c.json")


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_compressed_text_that_is_damaged_is_named(tmp_path, load, name, suffix):
    from mohawk.data.records import first_records

    words = [f"{i} {i * i} {i**3}" for i in range(200)]
    lines = "".join(f"{json.dumps({'text': word})}\n" for word in words) if name == "a.jsonl" else "\n".join(words)
    packed, path = COMPRESS[suffix](lines.encode()), tmp_path / f"{name}{suffix}"
    path.write_bytes(packed)
    whole = [f"{text}<eos>" for text in (words if name == "a.jsonl" else [lines])]
    assert load(path) == whole
    if name == "a.jsonl":  # of several files, and of one name in two folders
        (tmp_path / "sub").mkdir()
        (tmp_path / "sub" / path.name).write_bytes(packed)
        assert load(f"{tmp_path}/**/{path.name}") == 2 * whole
        assert [row["text"] for _, row in first_records(path, 9)] == words[:9]
    for damaged in damages(packed):
        path.write_bytes(damaged)
        for read_it in (load, lambda path: list(first_records(path, 999))):
            if read_it is not load and name == "a.txt":  # whose rows are not looked at before
                continue
            with pytest.raises(UserError, match=path.name) as raised:
                read_it(path)
            assert "\n" not in str(raised.value)
    for damaged in flips(packed, 10):
        path.write_bytes(damaged)
        try:
            found = load(path)
        except UserError as error:
            assert path.name in str(error) and "\n" not in str(error)
        else:  # in a header; a Zstandard file may come without a checksum
            assert found == whole or suffix == ".zst"
    latin = b'{"text": "caf\xe9"}\n' if name == "a.jsonl" else b"caf\xe9\n"
    path.write_bytes(COMPRESS[suffix](latin))
    with pytest.raises(UserError, match=rf"{path.name} is not UTF-8 \(.*byte 0xe9\); convert it"):
        load(path)


def test_parquet_that_is_damaged_is_named(tmp_path, load):
    from mohawk.data.records import first_records

    path = tmp_path / "a.parquet"
    datasets.Dataset.from_list([{"text": word} for word in WORDS]).to_parquet(path)
    packed = path.read_bytes()
    assert load(path) == [f"{word}<eos>" for word in WORDS]
    for damaged in damages(packed):
        path.write_bytes(damaged)
        for read_it in (load, lambda path: list(first_records(path, 999))):
            with pytest.raises(UserError, match="a.parquet") as raised:
                read_it(path)
            assert "\n" not in str(raised.value)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ENOSPC])
def test_what_arrow_may_not_read_or_write_is_named(number, tokenizer, tmp_path, monkeypatch):
    """Its errors have no names: of a text that cannot be read it is the text's, of a full disk the copy's folder."""
    (tmp_path / "text.txt").write_text("some words\n")

    def refused(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(datasets, "load_dataset", refused)
    with pytest.raises(OSError) as caught:
        tokenize(str(tmp_path / "text.txt"), tokenizer, cache=tmp_path / "cache")
    expected = tmp_path / "cache" / "tokens" if number == errno.ENOSPC else tmp_path / "text.txt"
    assert str(caught.value.filename).startswith(str(expected)) and caught.value.errno == number
