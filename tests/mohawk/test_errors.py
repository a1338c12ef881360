"""One line for what a machine refuses, whichever library says it; a bug of ours keeps its traceback."""

import errno
import os
import resource
import signal
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mohawk.cli import main
from mohawk.errors import UserError, as_os_error, line_for, machines_own, naming, printable
from tests.helpers.tiny_phase import fork, wait

FULL = os.strerror(errno.ENOSPC)


def raised(work):
    with pytest.raises(BaseException) as caught:  # noqa: B017 - whatever it is
        work()
    return caught.value


def test_file_calls_say_path_reason_and_what_to_do(tmp_path):
    full = OSError(errno.ENOSPC, FULL, "/data/run")
    assert line_for(full) == f"/data/run: {FULL}; free disk space, then run the same command"
    missing = raised(lambda: open(tmp_path / "a" / "b"))
    assert line_for(missing) == f"{tmp_path}/a/b: No such file or directory"
    long = raised(lambda: (tmp_path / ("x" * 5000)).stat())
    assert "File name too long; choose a shorter name" in line_for(long) and len(line_for(long)) < 400
    both = OSError(errno.EXDEV, "Invalid cross-device link", "a", None, "b")
    assert line_for(both) == "a -> b: Invalid cross-device link"
    assert line_for(raised(lambda: open("a\0b"))) == "a file name holds a NUL character, which none can; leave it out"
    half = raised(lambda: (tmp_path / "\ud800").mkdir())
    assert line_for(half) == "a text or a file name holds \\ud800, which utf-8 cannot write; leave it out"


def test_too_little_memory_says_how_much_was_asked_for():
    hint = "; lower batch sizes, sequence lengths or contexts, take a smaller model, or free memory"
    cpu = raised(lambda: torch.empty(1 << 50))
    assert line_for(cpu) == f"out of memory ({4 << 50} bytes more were asked for){hint}"
    array = raised(lambda: np.empty(1 << 50))
    assert line_for(array) == f"out of memory (8.00 PiB more were asked for){hint}"
    assert line_for(MemoryError()) == f"out of memory{hint}"
    gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 7 GiB")
    assert line_for(gpu) == f"out of memory on the GPU (20.00 GiB more were asked for){hint}"
    assert "out of memory on the GPU" in line_for(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling x"))
    for text in ("CUDA error: out of memory\nCUDA kernel", "HIP error: out of memory", "MPS backend out of memory (M"):
        assert line_for(RuntimeError(text)) == f"out of memory on the GPU{hint}"
    assert line_for(RuntimeError("std::bad_alloc")) == f"out of memory{hint}"
    assert line_for(RuntimeError("shapes do not fit")) is None and line_for(ValueError("out of memory")) is None


def test_bugs_are_none_of_it():
    for bug in (ValueError("x"), RuntimeError("shapes differ"), TypeError(), KeyError("a"), RecursionError()):
        assert line_for(bug) is None


def test_a_full_disk_inside_another_librarys_error_is_the_full_disk():
    try:
        try:
            raise OSError(errno.ENOSPC, FULL, "/cache/x.arrow")
        except OSError as error:
            raise RuntimeError("the dataset could not be generated") from error
    except RuntimeError as error:
        assert line_for(error).startswith(f"/cache/x.arrow: {FULL}") and machines_own(error).errno == errno.ENOSPC
    try:
        try:
            open("/nowhere/at/all")
        except OSError:
            raise RuntimeError("a bug while a missing file is dealt with") from None
    except RuntimeError as error:
        assert line_for(error) is None and machines_own(error) is None


def test_what_safetensors_and_torch_say_of_a_full_disk(tmp_path):
    """Real ones: no file may grow beyond 100 kB."""

    def body():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        tensors = {"a": torch.zeros(1_000_000)}
        lines = []
        for write in (
            lambda path: save_file(tensors, path),
            lambda path: torch.save(tensors, path),
            lambda path: np.save(path, tensors["a"].numpy()),
            lambda path: path.write_bytes(bytes(1_000_000)),
        ):
            try:
                with naming(tmp_path / "there"):
                    write(tmp_path / "x")
            except OSError as error:
                lines.append(line_for(error))
        assert len(lines) == 4 and all(line.startswith(f"{tmp_path}/there: ") for line in lines), lines
        assert "File too large" in lines[0] and "could not be written whole" in lines[1]
        assert "File too large" in lines[3]

    assert wait(fork(body)) == 0
    assert as_os_error(RuntimeError("another")) is None


@pytest.fixture
def failing(monkeypatch):
    """Makes `mohawk doctor` do something else."""

    def make(work):
        monkeypatch.setattr("mohawk.inspection.doctor.doctor", work)
        return main(["doctor"])

    return make


def test_the_command_line_prints_it_and_exits_with_2(failing, capsys):
    def full():
        raise OSError(errno.ENOSPC, FULL, "/data/\x1b[2Jrun")

    assert failing(full) == 2
    said = capsys.readouterr().err
    assert said == f"error: /data/\\x1b[2Jrun: {FULL}; free disk space, then run the same command\n"
    assert failing(lambda: torch.empty(1 << 50)) == 2
    assert capsys.readouterr().err.startswith("error: out of memory (")

    def mistaken():
        raise UserError("one\ntwo\x07")

    assert failing(mistaken) == 2
    assert capsys.readouterr().err == "error: one\nerror: two\\x07\n"
    with pytest.raises(ZeroDivisionError):
        failing(lambda: 1 / 0)


def test_a_full_standard_output(tmp_path):
    def body():
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
        os.dup2(os.open(tmp_path / "said", os.O_WRONLY | os.O_CREAT), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        return main(["doctor"])

    assert wait(fork(body)) == 2
    assert (
        (tmp_path / "said").read_text().splitlines()[-1].endswith(f"{FULL}; free disk space, then run the same command")
    )


def test_printable():
    assert printable("tab\tand\x1b[0m\x9b, ü 漢 \ud800") == "tab\\tand\\x1b[0m\\x9b, ü 漢 \\ud800"


def test_what_is_quoted_is_short():
    from mohawk.errors import shortened

    assert shortened("ab" * 100) == "ab" * 100 and shortened("abcdefgh", 5) == "abc...gh"


@pytest.mark.parametrize(
    "argv",
    [
        ["generate", "m", "--prompt", "x", "--max-new-tokens", "9" * 5000],
        ["generate", "m", "--prompt", "x", "--" + "x" * 5000],
        ["generate", "m" * 5000, "--prompt", "x"],
        ["recipes", "x" * 5000],
    ],
)
def test_overlong_arguments_are_not_echoed_whole(argv, capsys):
    try:
        code = main(argv)
    except SystemExit as stopped:
        code = stopped.code
    said = capsys.readouterr().err
    assert code == 2 and 0 < len(said) < 3000 and "error: " in said


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        (["generate", "no-model", "--prompt", "caf\udce9"], "--prompt"),
        (["generate-data", "p", "--model", "m", "--output", "o", "--field", "\udce9"], "--field"),
        (["convert", "no.yaml", "--set", "a=1", "--set", "a=\udce9"], "--set"),
        (["purify", "f", "--by", "vote", "--output", "o", "--template", "\udce9"], "--template"),
    ],
)
def test_a_text_argument_that_is_not_utf_8(argv, name, capsys):
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {name}: holds \\udce9, a byte that is not UTF-8; ") and said.count("\n") == 1


@pytest.mark.parametrize(
    "text",
    [
        "output: " + "x" * 5000,
        "output: run\nphases: {hidden: {tokens: " + "9" * 5000 + "}}",
        "output: run\nphases: {hidden: {metric: " + "y" * 5000 + "}}",
        "output: run\n" + "z" * 5000 + ": 1",
    ],
)
def test_overlong_values_of_a_recipe_are_not_echoed_whole(tmp_path, text, capsys):
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "r.yaml").write_text(f"teacher: {{model: {tmp_path}}}\ndata: {{train: [{tmp_path}/a.txt]}}\n{text}\n")
    assert main(["convert", str(tmp_path / "r.yaml"), "--dry-run"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(line.startswith("error: ") and len(line) < 800 for line in lines)
