"""The exception that means: the input was wrong, and here is what to do about it; and one line for what a machine does.

Nothing heavy is imported: the kinds of other libraries are told by their names.
"""

import errno
import io
import os
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A mistake in what the user gave. The command line prints its text alone and exits with code 2.

    The text is one clear line: what is wrong, where, what was found, what is allowed, what to do. Several
    mistakes found together are several such lines.
    """


class SaidElsewhere(UserError):
    """A UserError that the first of several processes prints: this one ends without a word."""


class Alarm(Exception):
    """What a command was asked to watch is not as it should be. The command line prints its text, a line for each thing
    found, and exits with code 3."""


# What to do about a file call that failed, by its number; strerror says what it was.
ADVICE = {
    errno.ENOSPC: "free disk space, then run the same command",
    errno.EDQUOT: "free some of the quota, then run the same command",
    errno.EACCES: "check who may read and write it and its folder",
    errno.EPERM: "check who may read and write it and its folder",
    errno.EROFS: "choose a folder that can be written",
    errno.EIO: "check the disk or the network share, then run the same command; a file that a disk has lost has to be "
    "deleted or put back first",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f), or choose another disk",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the limit of open files",
    errno.ENAMETOOLONG: "choose a shorter name",
}
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of what only a write meets
MACHINE = (*ADVICE, errno.ENOMEM, errno.ESTALE)  # of a file call: the machine's doing whatever was made of it since


def line_for(error: BaseException) -> str | None:
    """One line for an error that is the machine's or the input's, as `main` prints it; None for a bug of ours.

    A file call that failed, and memory that does not suffice, whichever library noticed it. What another error was
    made of is looked at too, where it says more: a full disk may arrive as "the data set could not be generated".
    """
    if isinstance(error, UnicodeEncodeError):
        bad = error.object[error.start : error.start + 1]
        return f"a text or a file name holds {printable(bad)}, which {error.encoding} cannot write; leave it out"
    if isinstance(error, ValueError) and str(error).startswith("embedded null"):
        return "a file name holds a NUL character, which none can; leave it out"
    for cause in causes(error):
        if (line := _out_of_memory(cause) or _out_of_memory(as_os_error(cause))) is not None:
            return line
        if (again := as_os_error(cause)) is not None:
            return _file_line(again, file_at(cause))
        if isinstance(cause, OSError) and (cause is error or cause.errno in MACHINE):
            return _file_line(cause, file_at(cause))
        if (line := _silent_process(cause)) is not None:
            return line
    return None


def machines_own(error: BaseException) -> BaseException | None:
    """The error, among this one and what it was made of, that is the machine's own: a full disk, a refused file or too
    little memory, which is not to be blamed on what was being read; None where there is none."""
    for cause in causes(error):
        refused = isinstance(cause, OSError) and cause.errno in MACHINE
        if refused or _out_of_memory(cause) is not None or as_os_error(cause) is not None:
            return cause
    return None


def file_at(error: BaseException) -> str | None:
    """The file that was open where an error was raised: a read or a write that fails knows no name. None where the
    innermost functions hold none; those further out may hold others."""
    found = None
    for frame, _ in list(traceback.walk_tb(error.__traceback__))[-3:]:
        for value in list(frame.f_locals.values()):
            if isinstance(value, io.IOBase) and isinstance(name := getattr(value, "name", None), str):
                found = name
    return found


def is_refusal(error: BaseException) -> bool:
    """Whether something could not be read for the machine's own reasons, which say nothing of what is in it: no
    permission, a disk or a network share that does not answer, too many open files, too little memory."""
    return machines_own(error) is not None


def causes(error: BaseException) -> list[BaseException]:
    """The error and what it came of, outermost first."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    return chain


@contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Within the block a file call that fails without a name (a write, a flush, safetensors', torch.save's) has this
    one. Raises OSError."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # with a name its text would be lost
            if (made := as_os_error(error)) is not None:
                made.filename = made.filename or os.fspath(path)
                raise made from error
        elif error.filename is None:
            error.filename = os.fspath(path)
        raise
    except Exception as error:
        if (made := as_os_error(error)) is None:
            raise
        made.filename = os.fspath(path)
        raise made from error


def as_os_error(error: BaseException) -> OSError | None:
    """The OSError in what safetensors, tokenizers, numpy and torch.save raise when they cannot read or write; None for
    anything else."""
    kind = f"{type(error).__module__.partition('.')[0]}.{type(error).__name__}"
    # Rust's words for it, in an exception of safetensors' own and in tokenizers' bare one
    if kind in ("safetensors.SafetensorError", "builtins.Exception"):
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            return OSError(int(found[1]), os.strerror(int(found[1])))
    # safetensors says so of any file that it could not open
    if type(error) is FileNotFoundError and error.errno is None:
        if found := re.fullmatch(r"No such file or directory: (.+)", str(error)):
            return _why_not_opened(found[1])
    # numpy's of an array: "1000 requested and 24 written"
    if type(error) is OSError and error.errno is None and re.search(r"\d+ requested and \d+ written", str(error)):
        return OSError(errno.ENOSPC, "could not be written whole")
    # torch's of a file that it maps: "unable to mmap 24 bytes from file <x>: Cannot allocate memory (12)"
    if type(error) is RuntimeError and (
        found := re.search(r"unable to (?:mmap|open)\b.*? file <(.+?)>.*: [^:]+ \((\d+)\)", str(error))
    ):
        return OSError(number, os.strerror(number), found[1]) if (number := int(found[2])) in MACHINE else None
    # torch's archive writer says only that fewer bytes arrived than it wrote, or that its stream has failed
    if type(error) is RuntimeError and re.search(
        r"PytorchStreamWriter failed|inline_container.*unexpected pos|iostream error", str(error)
    ):
        return OSError(errno.ENOSPC, "could not be written whole")
    return None


def _why_not_opened(path: str) -> OSError | None:
    """What the machine has against opening a file; None where it opens, or is not there."""
    try:
        open(path, "rb").close()
    except OSError as error:
        return error if error.errno in MACHINE else None
    return None


def printable(text: str) -> str:
    """The text with control characters and what is no character escaped: what others sent must not steer a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def shortened(text: str, most: int = 200) -> str:
    """The beginning and end of a text, at most so many characters and three dots: for what a line quotes of others."""
    return text if len(text) <= most else f"{text[: most - most // 2]}...{text[-(most // 2) :]}"


def _file_line(error: OSError, at: str | None = None) -> str:
    reason = error.strerror or next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes))]
    if at is not None and error.errno is not None:
        names = names or [at]
    where = " -> ".join(shortened(name) if len(name) >= 250 else name for name in names)
    advice = ADVICE.get(error.errno or 0)
    return f"{where or 'a file that was being read or written'}: {reason}" + (f"; {advice}" if advice else "")


def _out_of_memory(error: BaseException | None) -> str | None:
    text = str(error)
    runtime = text if isinstance(error, RuntimeError) else ""  # torch's, for whatever device
    gpu = type(error).__name__ == "OutOfMemoryError" or bool(re.search("out of memory|ALLOC_FAILED", runtime))
    cpu = isinstance(error, MemoryError) or isinstance(error, OSError) and error.errno == errno.ENOMEM
    # torch's load_state_dict keeps the arguments alone of what fails in it, and a MemoryError has none
    told = re.search(r"DefaultCPUAllocator|not enough memory|std::bad_alloc|an exception occurred : \(\)", runtime)
    if not (gpu or cpu or told):
        return None
    wanted = re.search(r"(?:allocate|[Uu]nable to allocate) ([\d.]+ ?(?:bytes|[KMGTPE]iB|B))", text)
    size = f" ({wanted[1]} more were asked for)" if wanted else ""
    return (
        f"out of memory{' on the GPU' if gpu else ''}{size}; lower batch sizes, sequence lengths or contexts, take a "
        "smaller model, or free memory"
    )


def _silent_process(error: BaseException) -> str | None:
    """The line about a run in several processes of which one has ended or answers no more; None for other errors."""
    text = str(error)
    gone = re.search(r"Timed out waiting \d+ms for \w+|Connection closed by peer|Connection reset by peer", text)
    distributed = type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError")
    if not (distributed or type(error) is RuntimeError and "gloo" in text and gone):
        return None
    first = gone[0] if gone else text.strip().splitlines()[0][:200]
    return f"another process of this run has ended or answers no more ({first}); see what it said, then run again"
