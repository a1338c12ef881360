"""Triton kernels in Triton's interpreter, in a process of their own: TRITON_INTERPRET is read when they are defined."""

import inspect
import os
import runpy
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_cases(name: str, *arguments: str) -> None:
    """tests/kernels/`name`.py, which has to say that its cases are right."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, __file__, str(ROOT / "tests" / "kernels" / f"{name}.py"), *arguments],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.strip().endswith("cases right")


def patch_once_a_launch() -> None:
    """The interpreter puts its own functions into triton.language when a kernel is launched, and looks for what to put
    there again whenever the kernel calls another function, which takes half of its time and finds nothing."""
    from triton import language
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):  # another version, which keeps this in another way
        return
    patch = interpreter._patch_lang
    patched: set[bool] = set()  # since the launch, from a function that sees triton.language.core and from others

    def patch_lang(function):
        sees_core = any(inspect.ismodule(x) and x is language.core for x in function.__globals__.values())
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


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    patch_once_a_launch()
    look_for_overflow_in_numpy()
    runpy.run_path(sys.argv[0], run_name="__main__")
