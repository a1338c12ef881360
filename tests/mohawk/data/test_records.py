import gzip
import json
import re

import datasets
import pytest

from mohawk.data.records import read_prompts, read_records
from mohawk.data.source_files import Source
from mohawk.errors import UserError
from tests.helpers.compressed import COMPRESS, damages, flips


def contents(*sources, **options):
    return [p.content for p in read_prompts(sources, **options)]


def test_every_kind_of_source(tmp_path):
    texts = ["one", "two words", "naïve ✓"]
    lines = "".join(json.dumps({"prompt": t}) + "\n" for t in texts)
    (tmp_path / "a.txt").write_text("\ufeffone\r\n\n two words\nnaïve ✓", encoding="utf-8")
    (tmp_path / "blocks").write_text("one\nmore\n\n \ntwo\n", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text("\n" + lines, encoding="utf-8")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(lines)
    datasets.Dataset.from_list([{"prompt": t} for t in texts]).to_parquet(tmp_path / "a.parquet")
    assert contents(tmp_path / "a.txt") == ["one", " two words", "naïve ✓"]
    assert contents(Source(str(tmp_path / "blocks"), format="paragraphs")) == ["one\nmore", "two"]
    for name in ("a.jsonl", "b.jsonl.gz", "a.parquet"):
        assert contents(Source(str(tmp_path / name), field="prompt")) == texts, name
    assert contents(tmp_path / "a.txt", tmp_path / "a.txt", limit=4) == ["one", " two words", "naïve ✓", "one"]
    assert [where for where, _ in read_records(tmp_path / "a.txt")] == [f"{tmp_path}/a.txt:{i}" for i in (1, 3, 4)]


def test_ids_are_of_the_content_and_unique(tmp_path):
    (tmp_path / "a.txt").write_text("x\ny\nx\nx\n")
    (tmp_path / "b.txt").write_text("y\nx\n")
    a, b = read_prompts([tmp_path / "a.txt"]), read_prompts([tmp_path / "b.txt"])
    assert [p.id for p in b] == [a[1].id, a[0].id]
    assert [p.id for p in a[2:]] == [a[0].id + "-2", a[0].id + "-3"]
    assert a[0].sha256 == a[2].sha256 and a[0].id == a[0].sha256[:16]


def test_messages_are_prompts_too(tmp_path):
    chat = [{"role": "user", "content": "hi"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": chat}))
    assert contents(Source(str(tmp_path / "a.jsonl"), field="prompt")) == [chat]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"prompt": "a"}\n{"prompt"\n',
            "{}:2: not JSON (Expecting ':' delimiter: line 2 column 1 (char 10)); each line",
        ),
        ('{"prompt": "a"}\n[1]\n', "{}:2: a JSON list, not an object; each line is one object"),
        ('{"text": "a"}\n', "{}:1: has no field 'prompt'; its fields: text"),
        ('{"prompt": " "}\n', "{}:1: field 'prompt' is empty; a prompt needs some words"),
        ('{"prompt": 3}\n', "{}:1: field 'prompt' is no chat: got int; give a text, or messages"),
        ('{"prompt": []}\n', "{}:1: field 'prompt' is no chat: got an empty list; give a text, or messages"),
        (
            '{"prompt": [{"role": "user"}]}\n',
            "{}:1: field 'prompt' is no chat: message 0 (user) has",
        ),
        ("\n\n", "prompts: {} holds none"),
    ],
)
def test_a_bad_line_is_named(tmp_path, text, message):
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read_prompts([Source(str(path), field="prompt")])
    assert str(error.value).startswith(message.format(path)) and "\n" not in str(error.value)


def test_damaged_files_are_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo \xff\n")
    with pytest.raises(UserError, match=r"a.txt:\d+: not UTF-8"):
        read_prompts([tmp_path / "a.txt"])
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 9)[:-12])
    with pytest.raises(UserError, match="lines of a file have no splits, got 'test'"):
        read_prompts([Source(str(tmp_path / "a.jsonl.gz"), split="test")])


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_prompts_that_are_damaged_are_named(tmp_path, suffix):
    lines = [f"{i} {i * i} {i**3}" for i in range(2000)]
    packed = COMPRESS[suffix]("".join(f'{{"prompt": "{line}"}}\n' for line in lines).encode())
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(packed)
    assert contents(Source(str(path), field="prompt")) == lines
    words = rf"a.jsonl{suffix}:\d+: (cannot be read|not UTF-8|not JSON|has no field)"
    for damaged in damages(packed):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=words) as raised:
            read_prompts([path])
        assert "\n" not in str(raised.value)
    for damaged in flips(packed):
        path.write_bytes(damaged)
        try:
            found = contents(Source(str(path), field="prompt"))
        except UserError as error:
            assert re.search(rf"a.jsonl{suffix}:\d+: ", str(error)) and "\n" not in str(error)
        else:  # in a header; a Zstandard file may come without a checksum
            assert found == lines or suffix == ".zst"
    path.write_bytes(COMPRESS[suffix](b'{"prompt": "caf\xe9"}\n'))
    with pytest.raises(UserError, match=rf"a.jsonl{suffix}:1: not UTF-8"):
        read_prompts([path])
