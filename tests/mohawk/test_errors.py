"""One line for what a machine refuses, whichever library says it; a bug of ours keeps its traceback."""

import ast
import errno
import json
import os
import re
import resource
import signal
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

import mohawk
from mohawk.cli import main
from mohawk.conversion.recipe import Recipe
from mohawk.distillation.recipe import DistillRecipe
from mohawk.errors import UserError, as_os_error, is_refusal, line_for, machines_own, naming, printable
from mohawk.pruning.recipe import PruneRecipe
from mohawk.schema.check import _is_section, _parts
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


def test_a_read_or_write_that_fails_is_told_with_its_file(tmp_path):
    """Python's errors of these have no name; real ones: a memory that is not mapped, a device without room."""
    lost = "/proc/self/mem: Input/output error; check the disk or the network share, then run the same command"
    lost += "; a file that a disk has lost has to be deleted or put back first"
    assert line_for(raised(lambda: Path("/proc/self/mem").read_bytes())) == lost

    def load():
        with open("/proc/self/mem", "rb") as file:
            return json.load(file)

    assert line_for(raised(load)) == lost
    full = raised(lambda: Path("/dev/full").write_text("x" * 100_000))
    assert line_for(full) == f"/dev/full: {FULL}; free disk space, then run the same command"
    (tmp_path / "other").touch()
    with open(tmp_path / "other") as other:  # noqa: F841 - of somebody further out
        nameless = raised(lambda: raised_within(4, OSError(errno.EIO, "Input/output error")))
    assert line_for(nameless).startswith("a file that was being read or written: Input/output error")


def raised_within(calls, error):
    if calls:
        raised_within(calls - 1, error)
    raise error


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

    class Short(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func is torch.Tensor.copy_:
                raise MemoryError
            return super().__torch_function__(func, types, args, kwargs)

    layer = torch.nn.Linear(2, 2)
    short = raised(lambda: layer.load_state_dict({"weight": torch.ones(2, 2).as_subclass(Short)}, strict=False))
    assert isinstance(short, RuntimeError) and line_for(short) == f"out of memory{hint}"
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


def test_what_libraries_say_of_too_many_open_files(tmp_path):
    """Real ones: nothing more may be opened. To safetensors that is a file that is not there."""
    path = tmp_path / "a"
    save_file({"a": torch.ones(3)}, path)
    words = tmp_path / "b"
    Tokenizer(models.BPE()).save(str(words))
    pq.write_table(pa.table({"a": [1]}), tmp_path / "c")
    limits, lines, held = resource.getrlimit(resource.RLIMIT_NOFILE), [], []
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1, limits[1]))
    try:
        with suppress(OSError):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        for read in (
            lambda: safe_open(path, "pt"),
            lambda: load_file(path),
            lambda: torch.UntypedStorage.from_file(str(path), shared=False, nbytes=4),
            lambda: Tokenizer.from_file(str(words)),
            lambda: pq.ParquetFile(tmp_path / "c"),
        ):
            error = raised(read)
            lines.append((line_for(error), is_refusal(error)))
    finally:
        for handle in held:
            os.close(handle)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert all(refused and "Too many open files; raise the limit of open files" in line for line, refused in lines)
    assert all(str(path) in line for line, _ in lines[:3])
    missing = raised(lambda: load_file(tmp_path / "none"))
    assert machines_own(missing) is None and "No such file or directory" in line_for(missing)
    missing = raised(lambda: torch.UntypedStorage.from_file(str(tmp_path / "none"), shared=False, nbytes=4))
    assert machines_own(missing) is None and line_for(missing) is None
    unmapped = RuntimeError("unable to mmap 24 bytes from file </a b/c>: Cannot allocate memory (12)")  # torch's words
    assert line_for(unmapped).startswith("out of memory; lower batch sizes") and is_refusal(unmapped)


def test_what_safetensors_and_torch_say_of_a_full_disk(tmp_path):
    """Real ones: no file may grow beyond 100 kB."""

    def body():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        tensors = {"a": torch.zeros(1_000_000)}
        long = Tokenizer(models.WordLevel({f"word{i}": i for i in range(10_000)}, unk_token="word0"))
        lines = []
        for write in (
            lambda path: save_file(tensors, path),
            lambda path: torch.save(tensors, path),
            lambda path: np.save(path, tensors["a"].numpy()),
            lambda path: path.write_bytes(bytes(1_000_000)),
            lambda path: long.save(str(path)),
        ):
            try:
                with naming(tmp_path / "there"):
                    write(tmp_path / "x")
            except OSError as error:
                lines.append(line_for(error))
        assert len(lines) == 5 and all(line.startswith(f"{tmp_path}/there: ") for line in lines), lines
        assert "File too large" in lines[0] and all("could not be written whole" in line for line in lines[1:3])
        assert "File too large" in lines[3] and "File too large" in lines[4]

    assert wait(fork(body)) == 0
    assert as_os_error(RuntimeError("another")) is None
    cut = OSError("ZSTD decompress failed: Data corruption detected")  # of Arrow, which gives no number
    with pytest.raises(OSError, match="^ZSTD decompress failed"), naming(tmp_path / "there"):
        raise cut
    # torch.save's last write on a full disk, where closing the archive finds it
    assert as_os_error(RuntimeError("basic_ios::clear: iostream error")).errno == errno.ENOSPC


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


def fields_named(path):
    """The dotted recipe fields in a module's texts, without its docstrings; {} stands for what is filled in."""
    tree, own = ast.parse(path.read_text(encoding="utf-8")), set()
    sections = {name for kind in KINDS.values() for name in kind.model_fields}
    field = re.compile(rf"(?<![\w./{{-])(?:{'|'.join(sections)})(?:\.(?:\w+|{{}}))+(?=[^\w(])")
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            own.add(node.body[0].value)
        elif isinstance(node, ast.JoinedStr):
            own.update(node.values)
        if isinstance(node, ast.JoinedStr):
            text = "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in own:
            text = node.value
        else:
            continue
        if " " not in text:  # a name by itself is given by what knows the recipe's kind
            continue
        # a file's name is none of a recipe's
        yield from (found[0] for found in field.finditer(f"{text} ") if not found[0].endswith((".json", ".png")))


def has_field(kind, name):
    """Whether a recipe kind has the dotted field, as far as the text says it."""
    section = kind
    for key in name.split("."):
        if key == "{}" or key.isdigit():
            continue
        if key not in section.model_fields:
            return False
        inner = [part for part in _parts(section.model_fields[key].annotation) if _is_section(part)]
        if not inner:
            return True
        section = inner[0]
    return True


KINDS = {"conversion": Recipe, "distillation": DistillRecipe, "pruning": PruneRecipe}
# said of a recipe of one kind alone by what serves all
OF_ONE_KIND = {
    ("distillation/cache.py", "phases.end_to_end"),  # of a conversion
    ("evaluation/run.py", "prune.vocabulary"),  # of a pruning
    ("quantization/run.py", "prune.vocabulary"),  # likewise
    ("loading/models.py", "teacher.quantize"),  # where a recipe has it
    ("data/tokenizers/run_tokenizers.py", "student.model"),  # of a distillation, whose student may cut the text
    ("runs/sharding.py", "sharding.stages"),  # of a conversion, which alone has them
    ("training/batches.py", "sharding.stages"),  # likewise
    ("pruning/recipe.py", "student.layers"),  # "as in a distillation's"
    ("schema/arguments.py", "phases.hidden.tokens"),  # an example
}


def test_messages_name_fields_that_the_recipe_at_hand_has():
    """A text in a kind's own folder that kind's, in a folder that all share fields that all have."""
    root, seen, wrong = Path(mohawk.__file__).parent, 0, []
    for path in sorted(root.rglob("*.py")):
        at = str(path.relative_to(root).as_posix())
        owner = KINDS.get(at.split("/")[0])
        for name in fields_named(path):
            seen += 1
            kinds = [] if (at, name) in OF_ONE_KIND else KINDS.values() if owner is None else [owner]
            wrong += [f"{at}: {name} is none of {kind.__name__}" for kind in kinds if not has_field(kind, name)]
    assert seen > 30 and not wrong, "\n".join(wrong)
    assert not has_field(PruneRecipe, "phases.{}.learning_rate") and not has_field(Recipe, "heal.learning_rate")
    assert has_field(DistillRecipe, "stages.{}.learning_rate") and not has_field(Recipe, "phases.hidden.rate")


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
