"""Signals: which save, which only stop, and that no moment of a command answers Ctrl-C with a traceback."""

import ctypes
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mohawk.cli import main
from mohawk.core.stopping import STOPPING, StopRequest, cleaning_up

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("number", STOPPING, ids=lambda n: n.name)
def test_each_signal_asks_to_save_and_the_second_does_what_it_did_before(number):
    before = {n: signal.getsignal(n) for n in STOPPING}
    request, came = StopRequest(same_signal=0.0, says=False), []
    signal.signal(number, lambda n, frame: came.append(n))
    try:
        with request.caught():
            signal.raise_signal(number)
            assert request.number == number and came == []
            time.sleep(0.01)
            signal.raise_signal(number)
            assert came == [number]
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


def test_what_the_caller_ignores_stays_ignored():
    """As nohup does with SIGHUP."""
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        request = StopRequest(says=False)
        with request.caught(), cleaning_up() as stopped:
            signal.raise_signal(signal.SIGHUP)
        assert request.number is None and stopped.number is None
    finally:
        signal.signal(signal.SIGHUP, old)


@pytest.mark.parametrize("number", STOPPING, ids=lambda n: n.name)
def test_outside_a_phase_each_signal_stops_as_ctrl_c(number, monkeypatch, capsys):
    monkeypatch.setattr("mohawk.inspection.doctor.doctor", lambda: signal.raise_signal(number))
    before = signal.getsignal(number)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "stopped\n" and signal.getsignal(number) is before


def test_what_a_library_makes_of_ctrl_c_is_ctrl_c(monkeypatch, capsys):
    def plot():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise RuntimeError("could not render a glyph") from None

    monkeypatch.setattr("mohawk.inspection.doctor.doctor", plot)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "stopped\n"


def test_ctrl_c_that_a_callback_swallows_comes_again(monkeypatch, capsys):
    """C calls Python, as Qt and image libraries do; an exception there goes no further."""
    callback = ctypes.CFUNCTYPE(None)(lambda: signal.raise_signal(signal.SIGINT))

    def doctor():
        callback()
        end = time.monotonic() + 10
        while time.monotonic() < end:
            time.sleep(0.01)
        raise AssertionError("went on")

    monkeypatch.setattr("mohawk.inspection.doctor.doctor", doctor)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "stopped\n"


def test_ctrl_c_while_arguments_are_parsed(monkeypatch, capsys):
    monkeypatch.setattr("mohawk.cli.parser", lambda: signal.raise_signal(signal.SIGINT))
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "stopped\n"


def test_ctrl_c_at_any_moment_of_a_process():
    """From the first import to the last: one line or none, and no traceback."""
    command = [sys.executable, "-c", "import mohawk.__main__, sys; sys.exit(mohawk.__main__.main())", "doctor"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # only from `main` on: a Ctrl-C before any of our code runs is Python's own
    begun = "import sys; import mohawk.__main__ as m; print('begun', flush=True); sys.exit(m.main())"
    command[2] = begun
    codes = set()
    for pause in (0.0, 0.01, 0.03, 0.1, 0.3, 0.8):
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
        assert child.stdout.readline() == b"begun\n"
        time.sleep(pause)
        child.send_signal(signal.SIGINT)
        _, said = child.communicate(timeout=60)
        assert b"Traceback" not in said and b"Exception ignored" not in said, said.decode()
        codes.add(child.returncode)
        assert child.returncode in (0, 130, -signal.SIGINT)
        assert said in (b"", b"stopped\n")
    assert 130 in codes


def test_nothing_is_imported_before_main_catches_a_ctrl_c():
    """But what Python has by then: each import would be a moment of a traceback."""
    counted = (
        "import os, sys; before = set(sys.modules); import mohawk.__main__; print(sorted(set(sys.modules) - before))"
    )
    ran = subprocess.run([sys.executable, "-S", "-c", counted], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout == "['mohawk', 'mohawk.__main__']\n"


def test_a_mapped_file_that_cannot_be_read_ends_the_process_with_a_word(tmp_path):
    """The kernel's signal comes in the middle of a read that no Python sees."""
    crash = (
        "import os, sys, numpy as np, mohawk.__main__ as m, mohawk.cli as c\n"
        "def read():\n"
        "    rows = np.memmap(sys.argv[1], dtype='u1', mode='r')\n"
        "    os.truncate(sys.argv[1], 0)\n"
        "    return int(rows[100000])\n"
        "c.main = read; sys.exit(m.main())"
    )
    (tmp_path / "rows").write_bytes(bytes(200_000))
    command = [sys.executable, "-c", crash, str(tmp_path / "rows")]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == -signal.SIGBUS and ran.stderr.startswith("Fatal Python error: Bus error"), ran.stderr
    assert "in read" in ran.stderr


def test_a_closed_terminal_does_not_end_the_saving(tmp_path):
    """SIGHUP comes with it, and from then on every print would fail."""
    pid, terminal = pty.fork()
    if pid == 0:
        code = 70
        try:
            request = StopRequest()
            with request.caught():
                (tmp_path / "ready").touch()
                while request.number is None:
                    time.sleep(0.01)
                print("saving", flush=True)
                os.write(2, b"saving\n")
            code = int(request.number != signal.SIGHUP)
        finally:
            os._exit(code)
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
