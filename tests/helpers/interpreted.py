"""Triton kernels in Triton's interpreter, in a process of their own: TRITON_INTERPRET is read when they are defined."""

import functools
import os
from pathlib import Path
from typing import Any

from tests.helpers import forks

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 600  # a part may take
FIRST = f"""
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, {str(ROOT)!r})
import torch
from triton.runtime import interpreter
from tests.helpers import interpreted
interpreted.patch_once_a_launch()
interpreted.look_for_overflow_in_numpy()
interpreted.remember_types()
"""


def run_cases(name: str, *arguments: str) -> None:
    """tests/kernels/`name`.py, which has to say that its cases are right."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    path = str(ROOT / "tests" / "kernels" / f"{name}.py")
    source = f"import runpy, signal, sys; signal.alarm({SECONDS}); sys.path[0] = {str(Path(path).parent)!r}; "
    source += f"sys.argv[0] = {path!r}; runpy.run_path({path!r}, run_name='__main__')"
    done = forks.run(FIRST, source, arguments, ROOT, {**os.environ, **own})
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
