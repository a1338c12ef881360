"""Triton kernels in Triton's interpreter, in a process of their own: TRITON_INTERPRET is read when they are defined.

One such process of a test run imports torch and triton, and is forked for each part of the cases."""

import atexit
import functools
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 600  # a part may take


def run_cases(name: str, *arguments: str) -> None:
    """tests/kernels/`name`.py, which has to say that its cases are right."""
    process = interpreter_of_this_run()
    assert process.stdin and process.stdout
    with tempfile.TemporaryDirectory() as folder:
        printed = Path(folder, "printed.txt")
        asked = [str(printed), str(ROOT / "tests" / "kernels" / f"{name}.py"), *arguments]
        print(json.dumps(asked), file=process.stdin, flush=True)
        code = process.stdout.readline().strip()
        text = printed.read_text()
    assert code == "0", f"exit status {code}\n{text[-6000:]}"
    assert text.strip().endswith("cases right"), text[-6000:]


@functools.cache
def interpreter_of_this_run() -> subprocess.Popen[str]:
    """Runs `answer`."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [sys.executable, __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(process.communicate)  # it ends with its input
    return process


def answer() -> None:
    """For each line [file to print to, script, arguments]: run it in a fork, and print its exit status."""
    for line in sys.stdin:
        printed, script, *arguments = json.loads(line)
        pid = os.fork()
        if not pid:
            run(printed, script, arguments)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def run(printed: str, script: str, arguments: list[str]) -> None:
    signal.alarm(SECONDS)
    file = os.open(printed, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.argv, sys.path[0] = [script, *arguments], str(Path(script).parent)
    code = 1
    try:
        runpy.run_path(script, run_name="__main__")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def patch_once_a_launch() -> None:
    """The interpreter puts its own functions into triton.language when a kernel is launched, and looks for what to put
    there again whenever the kernel calls another function, which takes half of its time and finds nothing."""
    from triton import language
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):  # another version, which keeps this in another way
        return
    patch = interpreter._patch_lang
    patched: set[bool] = set()  # since the launch, from a function that sees triton.language.core and from others

    @functools.cache
    def sees_core_of(function):
        return any(x is language.core for x in function.__globals__.values())

    def patch_lang(function):
        sees_core = sees_core_of(function)
        if sees_core in patched:
            return interpreter._LangPatchScope()
        scope = patch(function)
        if not patched:
            restore = scope.restore
            scope.restore = lambda: (patched.clear(), restore())
        patched.add(sees_core)
        return scope

    interpreter._patch_lang = patch_lang


def look_for_overflow_in_numpy() -> None:
    """The interpreter looks whether whole numbers overflow with ten operations of its own for each of a kernel's."""
    import numpy as np
    from triton.language.semantic import TritonSemantic

    functions = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

    def look(semantic, left, right, operation):
        kind = left.type.scalar
        if kind.int_bitwidth < 64 and semantic.builder.options.sanitize_overflow:
            found = functions[operation.__name__](left.handle.data, right.handle.data, dtype=np.int64)
            fits = (kind.get_int_min_value() <= found) & (found <= kind.get_int_max_value())
            assert fits.all(), f"int{kind.int_bitwidth} overflow in {operation.__name__}"

    TritonSemantic.binary_op_sanitize_overflow_impl = look


def remember_types() -> None:
    """The interpreter makes the type and shape of every value anew, a third of its time, and copies what has already
    the shape it is broadcast to."""
    from triton import language
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    in_numpy = interpreter._get_np_dtype
    dtypes: dict[str, Any] = {}

    def numpy_of(dtype):
        name = dtype.scalar.name  # pointers have a name too, but no hash
        if name not in dtypes:
            dtypes[name] = in_numpy(dtype)
        return dtypes[name]

    interpreter._get_np_dtype = numpy_of
    types: dict[tuple, dict] = {}
    block, tensor, broadcast = language.block_type, language.tensor, TritonSemantic.broadcast_impl_value
    make_type, make_tensor = block.__init__, tensor.__init__

    def type_of(self, element_ty, shape):
        try:
            key = (element_ty, tuple(shape))
            known = types.get(key)
        except TypeError:  # of pointers, which have no hash
            return make_type(self, element_ty, shape)
        if known is None:
            make_type(self, element_ty, shape)
            tensor(None, self)
            types[key] = dict(self.__dict__)
        else:
            self.__dict__.update(known)

    def tensor_of(self, handle, type):
        known = type.__dict__.get("of_tensors")
        if known is None:
            make_tensor(self, handle, type)
            type.of_tensors = (self.shape, self.numel, self.dtype)
            return
        self.handle, self.type = handle, type
        self.shape, self.numel, self.dtype = known

    def alike(self, left, right):
        if left.type.is_block() and right.type.is_block() and list(left.type.shape) == list(right.type.shape):
            return left, right
        return broadcast(self, left, right)

    block.__init__, tensor.__init__, TritonSemantic.broadcast_impl_value = type_of, tensor_of, alike


if __name__ == "__main__":
    import torch  # noqa: F401, so that forks have it
    from triton.runtime import interpreter  # noqa: F401

    patch_once_a_launch()
    look_for_overflow_in_numpy()
    remember_types()
    answer()
