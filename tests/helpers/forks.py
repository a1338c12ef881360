"""Scripts, each in a process of its own that begins with what takes long to import.

One process of a test run imports it, listens on a socket, and is forked for every script: a start of torch and what
transformers needs of it takes seconds, for each export that a test makes. A request and its answer are a line of
JSON each.
"""

import functools
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path


def run(
    first: str, source: str, arguments: Sequence[str], cwd: str | Path, environment: Mapping[str, str]
) -> "subprocess.CompletedProcess[str]":
    """`python -c source arguments`, after the script `first`, which is run once for all."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as link:
        out, err = Path(folder, "out"), Path(folder, "err")
        link.connect(listener(first))
        asked = [str(out), str(err), source, list(arguments), str(cwd), dict(environment)]
        with link.makefile("rw") as lines:
            print(json.dumps(asked), file=lines, flush=True)
            code = int(lines.readline())
        said = (path.read_text("utf-8", "replace") for path in (out, err))
        return subprocess.CompletedProcess([sys.executable, "-c", source, *arguments], code, *said)


@functools.cache
def listener(first: str) -> str:
    """The address of a process that has run `first`; it ends with this one."""
    address = str(Path(tempfile.mkdtemp(prefix="forks-"), "socket"))
    process = subprocess.Popen(
        [sys.executable, __file__, address, first],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout and process.stdout.readline() == b"ready\n"
    held.append(process)
    return address


held: list["subprocess.Popen[bytes]"] = []  # with their inputs open


def listen(address: str, first: str) -> None:
    """Answer until the one who started this ends, and its input with it."""
    exec(compile(first, "first", "exec"), {"__name__": "first"})
    with socket.socket(socket.AF_UNIX) as server, selectors.DefaultSelector() as ready:
        server.bind(address)
        server.listen()
        print("ready", flush=True)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        for source in (server, sys.stdin):
            ready.register(source, selectors.EVENT_READ)
        while not any(key.fileobj is sys.stdin for key, _ in ready.select()):
            link = server.accept()[0]
            if not os.fork():
                answer(link)
            link.close()
    shutil.rmtree(Path(address).parent)


def answer(link: socket.socket) -> None:
    """In a fork: run what is asked in another, and say how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with link.makefile("rw") as lines:
        asked = json.loads(lines.readline())
        pid = os.fork()
        if not pid:
            begin(*asked)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=lines, flush=True)
    os._exit(0)


def begin(out: str, err: str, source: str, arguments: list[str], cwd: str, environment: dict[str, str]) -> None:
    for path, stream in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    paths = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    sys.argv, sys.path[0:1] = ["-c", *arguments], ["", *paths]
    code: object = 0
    try:
        exec(compile(source, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    listen(*sys.argv[1:])
