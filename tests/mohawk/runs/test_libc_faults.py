"""Commands with a fault in a call of libc, whichever library makes it: Rust, C++ and Arrow too, and not Python alone.

The faults are made by a small library that is preloaded, so these tests run in a process of their own. It is built
here; without a C compiler, or elsewhere than on Linux, they are skipped. `MOHAWK_FAULTS=all` tries hundreds of calls of
every command, not a few of three.
"""

import errno
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.faults import contents
from tests.helpers.tiny_phase import cheap_training  # noqa: F401
from tests.mohawk.runs.test_faults import COMMANDS, check_line, place, spread  # noqa: F401

PRELOADED = "libc_faults" in os.environ.get("LD_PRELOAD", "")
SOURCE = Path(__file__).resolve().parents[2] / "helpers" / "libc_faults.c"
TRIED = ("cache", "generate-data", "distill")
NUMBERS = (errno.ENOSPC, errno.EIO, errno.EACCES)

if PRELOADED:

    @pytest.mark.usefixtures("cheap_training")
    @pytest.mark.parametrize("name", COMMANDS if os.environ.get("MOHAWK_FAULTS") == "all" else TRIED)
    def test_a_call_of_libc_that_fails(place, name):  # noqa: F811
        expected, _ = place.undisturbed(name)
        place.fresh(name)
        code, said, done = place.run(name, libc_at=0)
        assert code == 0, said
        place.fresh(name)
        for i, at in enumerate(spread(done.libc, name, 200)):
            number = NUMBERS[i % len(NUMBERS)]
            code, said, seen = place.run(name, libc_at=at, number=number)
            where = f"{seen.struck}, {errno.errorcode[number]}:\n{said}"
            if code == 0:  # a library can do without, or there was less left to do
                for left in re.findall(r"could not delete (\S+): ", said):
                    shutil.rmtree(left) if Path(left).is_dir() else Path(left).unlink(missing_ok=True)
                assert contents(place.work) == expected, where
                place.fresh(name)
                continue
            check_line(code, said, place.work, None)
            last = said.splitlines()[-1]
            assert last.startswith("error:") and (str(place.work) in last or "out of memory" in last), where
        code, said, _ = place.run(name)
        assert code == 0 and contents(place.work) == expected, said

else:

    @pytest.mark.skipif(sys.platform != "linux", reason="preloads a library as Linux does")
    def test_calls_of_libc_that_fail(tmp_path):
        compiler = shutil.which("cc") or shutil.which("gcc") or pytest.skip("needs a C compiler")
        library = tmp_path / "libc_faults.so"
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl"], check=True)
        around = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        ran = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
            env={**around, "LD_PRELOAD": str(library)}, capture_output=True, text=True,
        )  # fmt: skip
        assert ran.returncode == 0 and " passed" in ran.stdout, ran.stdout[-6000:] + ran.stderr[-2000:]
