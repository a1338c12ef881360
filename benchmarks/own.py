"""Kernels of a reader's own beside ours: `--module FILE`, without a change to these files.

A function of the file that is called as one of the names below is a line of that benchmark's tables, checked and timed
as every other line is.
"""

from __future__ import annotations

import importlib.util
import pathlib
import sys
from collections.abc import Callable

# benchmark -> name of a function -> what it is given and gives
KINDS = {
    "kd_loss": {
        "forward_kl": "(hidden, head, teacher_hidden, teacher_head, labels) -> KL(teacher || student), mean of rows",
        "reverse_kl": "(hidden, head, teacher_hidden, teacher_head, labels) -> KL(student || teacher), mean of rows",
        "jsd": "(hidden, head, teacher_hidden, teacher_head, labels) -> Jensen-Shannon divergence, mean of rows",
        "forward_kl_from_logits": "(student, teacher) -> KL(teacher || student), mean of rows",
    },
    "kd_sweeps": {"forward_kl": "as of kd_loss"},
    "mixing_distance": {
        "ssd_distance": "(q, k, C, B, log_decay, input_scale, D) -> Frobenius distance, mean of heads",
    },
    "delta_distance": {
        "delta_distance": "(teacher_q, teacher_k, q, k, beta, log_decay) -> Frobenius distance, mean of heads",
    },
    "ssd": {"ssd": "(x, dt, A, B, C, D) -> y"},
    "delta_rule": {"gated_delta_rule": "(q, k, v, beta, log_decay) -> y"},
}
Own = list[tuple[str, str, Callable]]  # the line's name, the function's, the function


def described() -> str:
    """What a file may define, for --help."""
    lines = [f"  {name}{takes}" for kinds in KINDS.values() for name, takes in kinds.items() if takes[0] == "("]
    return "functions that a --module may define:\n" + "\n".join(lines)


def load(files: list[str]) -> dict[str, Own]:
    """Of each benchmark the functions that the files define. Raises ValueError where a file is none or defines none."""
    found: dict[str, Own] = {}
    for name in files:
        path = pathlib.Path(name).resolve()
        if not path.is_file():
            raise ValueError(f"--module {name}: there is no such file")
        if path.stem in sys.modules:
            raise ValueError(f"--module {name}: {path.stem} is the name of another module; rename the file")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if spec is None or spec.loader is None:
            raise ValueError(f"--module {name}: is no Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module  # Triton reads the source of what it compiles
        spec.loader.exec_module(module)
        mine = [
            (benchmark, kind, getattr(module, kind))
            for benchmark, kinds in KINDS.items()
            for kind in kinds
            if callable(getattr(module, kind, None))
        ]
        if not mine:
            known = ", ".join(dict.fromkeys(kind for kinds in KINDS.values() for kind in kinds))
            raise ValueError(f"--module {name}: defines none of {known}")
        for benchmark, kind, function in mine:
            found.setdefault(benchmark, []).append((f"{path.stem}, {kind.replace('_', ' ')}", kind, function))
    return found
