import errno
import io
import json
import logging
import os
import re
from pathlib import Path

import pytest

from mohawk.core import sums
from mohawk.core.folders import (
    MANIFEST,
    about_of,
    checkpoints,
    is_complete,
    locked,
    newest_complete,
    remove_partial,
    rotate,
    weights_sum,
    why_incomplete,
    write_whole,
)
from mohawk.errors import UserError


def write(path, content=b"weights", **kwargs):
    with write_whole(path, **kwargs) as folder:
        (folder / "model.bin").write_bytes(content)
        (folder / "deep" / "er").mkdir(parents=True)
        (folder / "deep" / "er" / "state.json").write_text("{}")
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "flipped bit": lambda path: flip_bit(path / "model.bin"),
    "flipped bit in a subfolder": lambda path: flip_bit(path / "deep" / "er" / "state.json"),
    "truncated": lambda path: os.truncate(path / "model.bin", 3),
    "emptied": lambda path: os.truncate(path / "model.bin", 0),
    "missing file": lambda path: (path / "model.bin").unlink(),
    "missing manifest": lambda path: (path / MANIFEST).unlink(),
    "truncated manifest": lambda path: os.truncate(path / MANIFEST, 40),
    "empty manifest": lambda path: (path / MANIFEST).write_text("{}"),
    "manifest of nothing": lambda path: (path / MANIFEST).write_text('{"files": {}}'),
    "manifest not an object": lambda path: (path / MANIFEST).write_text('["files"]'),
    "manifest not text": lambda path: (path / MANIFEST).write_bytes(b"\xff\xfe\x00"),
}


def test_whole_folder_appears_at_the_end_with_manifest(tmp_path):
    path = tmp_path / "student"
    with write_whole(path) as folder:
        (folder / "model.bin").write_bytes(b"weights")
        assert not path.exists()
    assert names(tmp_path) == ["student"]
    assert is_complete(path) and why_incomplete(path) is None
    manifest = json.loads((path / MANIFEST).read_text())
    assert manifest["files"]["model.bin"]["bytes"] == 7
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_failed_write_leaves_what_was_there(tmp_path, error):
    path = write(tmp_path / "student", b"old")
    with pytest.raises(type(error)):
        with write_whole(path) as folder:
            (folder / "model.bin").write_bytes(b"new")
            raise error
    assert names(tmp_path) == ["student"]
    assert is_complete(path) and (path / "model.bin").read_bytes() == b"old"


@pytest.mark.parametrize(
    "failing, call", [("os.fsync", 0), ("os.fsync", 1), ("os.fsync", 2), ("os.rename", 0), ("os.rename", 1)]
)
def test_system_error_at_any_call_leaves_what_was_there(tmp_path, monkeypatch, failing, call):
    path = write(tmp_path / "student", b"old")
    real, calls = getattr(os, failing.removeprefix("os.")), []

    def fail(*args):
        calls.append(args)
        if len(calls) == call + 1:
            raise PermissionError(13, "Permission denied")
        return real(*args)

    monkeypatch.setattr(failing, fail)
    with pytest.raises(PermissionError):
        write(path, b"new")
    monkeypatch.undo()
    assert is_complete(path) and (path / "model.bin").read_bytes() == b"old"
    assert names(tmp_path) == ["student"]


def test_own_folder_is_replaced_and_a_foreign_one_is_not(tmp_path):
    path = write(tmp_path / "student", b"old")
    write(path, b"new")
    assert (path / "model.bin").read_bytes() == b"new" and names(tmp_path) == ["student"]
    empty = tmp_path / "empty"
    empty.mkdir()
    write(empty)
    assert is_complete(empty)
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter1.tex").write_text("...")
    with pytest.raises(UserError, match="thesis: exists, not written by mohawk"):
        write(foreign)
    assert names(foreign) == ["chapter1.tex"]
    write(foreign, replace=True)
    assert is_complete(foreign)


def test_folder_into_which_nothing_was_written_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing was written"):
        with write_whole(tmp_path / "student"):
            pass
    assert names(tmp_path) == []


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_is_passed_over_in_one_log_line(tmp_path, caplog, damage):
    write(tmp_path / "checkpoint-90")
    write(tmp_path / "checkpoint-100")
    write(tmp_path / "checkpoint-1000")
    DAMAGE[damage](tmp_path / "checkpoint-1000")
    assert not is_complete(tmp_path / "checkpoint-1000")
    with caplog.at_level(logging.WARNING, "mohawk"):
        assert newest_complete(tmp_path) == tmp_path / "checkpoint-100"
    (record,) = caplog.records
    assert "passed over checkpoint-1000 (" in record.getMessage()
    assert "resuming from checkpoint-100" in record.getMessage()


def test_none_complete(tmp_path, caplog):
    assert newest_complete(tmp_path / "nowhere") is None
    assert newest_complete(tmp_path) is None and not caplog.records
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-final").mkdir()
    assert newest_complete(tmp_path) is None
    assert "checkpoint-3 (no MANIFEST.json); starting from the beginning" in caplog.text
    assert why_incomplete(tmp_path / "checkpoint-4") == "no such folder"


def test_rotation_keeps_the_newest(tmp_path):
    for step in (5, 10, 15, 20):
        write(tmp_path / f"checkpoint-{step}")
    rotate(tmp_path, tmp_path / "checkpoint-20", keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-20", "checkpoint-15"]
    # 20 turned out damaged, the run went on from 15 and wrote 18
    write(tmp_path / "checkpoint-18")
    rotate(tmp_path, tmp_path / "checkpoint-18", keep=1)
    assert names(tmp_path) == ["checkpoint-18"]


def test_half_written_and_half_deleted_folders_go(tmp_path):
    write(tmp_path / "checkpoint-5")
    (tmp_path / ".partial-checkpoint-10-0a").mkdir()
    (tmp_path / ".partial-checkpoint-10-0a" / "model.bin").write_bytes(b"half")
    (tmp_path / ".partial-student-0b").mkdir()
    write(tmp_path / "student")
    assert names(tmp_path) == [".partial-checkpoint-10-0a", "checkpoint-5", "student"]
    remove_partial(tmp_path)
    assert names(tmp_path) == ["checkpoint-5", "student"]


def test_second_holder_of_a_folder_is_refused(tmp_path):
    with locked(tmp_path):
        with pytest.raises(UserError, match="another process is at work here"):
            with locked(tmp_path):
                pass
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.ESTALE, errno.ENOMEM])
def test_what_the_machine_refuses_to_read_is_not_taken_for_damage(tmp_path, monkeypatch, number):
    """Nothing is passed over, made again or deleted for it: the same folder is whole a moment later."""
    write(tmp_path / "checkpoint-1")
    write(tmp_path / "checkpoint-2", about={"run": "this"})
    of, refused = io.open, {MANIFEST}

    def opened(path, *args, **kwargs):
        if Path(path).name in refused:
            raise OSError(number, os.strerror(number), str(path))
        return of(path, *args, **kwargs)

    monkeypatch.setattr(io, "open", opened)
    monkeypatch.setattr("builtins.open", opened)
    newest = tmp_path / "checkpoint-2"
    for read in (about_of, why_incomplete, weights_sum, is_complete):
        with pytest.raises(OSError, match=re.escape(str(newest / MANIFEST))):
            read(newest)
    refused |= {"model.bin"}
    refused -= {MANIFEST}
    for read in (why_incomplete, lambda newest: newest_complete(newest.parent)):
        with pytest.raises(OSError, match=re.escape(str(newest / "model.bin"))):
            read(newest)
    refused.clear()
    assert newest_complete(tmp_path) == newest and about_of(newest) == {"run": "this"}


def test_what_the_disk_has_lost_is_passed_over(tmp_path, monkeypatch, caplog):
    write(tmp_path / "checkpoint-1")
    write(tmp_path / "checkpoint-2")

    hashed = sums.hashed

    def lost(path):
        if path == tmp_path / "checkpoint-2" / "model.bin":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return hashed(path)

    monkeypatch.setattr(sums, "hashed", lost)
    assert newest_complete(tmp_path) == tmp_path / "checkpoint-1"
    assert "passed over checkpoint-2 (model.bin cannot be read (Input/output error))" in caplog.text
