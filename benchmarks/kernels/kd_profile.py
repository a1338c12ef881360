"""Where the time of forward KL from hidden states goes, on the CPU: the matrix products, the passes over the tiles of
logits, and the rest (new memory, copies, rounding). The problem is kd_loss.py's; CPU seconds of one forward and
backward, the median of several, beside products of the same shape as torch makes them in that dtype.

    python benchmarks/kernels/kd_profile.py
"""

import json
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

from benchmarks.harness import environment  # noqa: E402
from benchmarks.kernels.kd_loss import SHAPES, floor_work, problem  # noqa: E402
from benchmarks.pages import RESULTS, put_in_docs  # noqa: E402
from mohawk.kernels.kd import chunked as kd_chunked
from mohawk.kernels.kd import products as kd_products
from mohawk.kernels.kd.interface import TeacherHidden, linear_kd_loss  # noqa: E402

REPEATS = 15
PARTS = {
    "logits, student and teacher": [(kd_products, "logits_product")],
    "gradient of hidden states": [(kd_products, "hidden_gradient")],
    "gradient of the head": [(kd_products, "add_head_gradient"), (kd_products, "head_gradient")],
    "passes over the tiles": [(kd_chunked, "torch_tile")],
}
spent: dict[str, float] = defaultdict(float)


def timed(part: str, function):
    def call(*args):
        start = time.process_time()
        result = function(*args)
        spent[part] += time.process_time() - start
        return result

    return call


def profile(shape: tuple[int, int, int], dtype: torch.dtype) -> dict[str, float]:
    hidden, head, teacher, teacher_head, _ = problem(shape, dtype, "cpu")
    hidden.requires_grad_(), head.requires_grad_()
    floor, rounds = floor_work(shape, dtype, "cpu"), []
    for _ in range(1 + REPEATS):
        spent.clear()
        hidden.grad = head.grad = None
        start = time.process_time()
        linear_kd_loss(hidden, head, TeacherHidden(teacher, teacher_head)).backward()
        total = time.process_time() - start
        start = time.process_time()
        floor()
        rest = total - sum(spent.values())
        rounds.append({**spent, "rest": rest, "all": total, "torch's four products": time.process_time() - start})
    return {part: statistics.median(one[part] for one in rounds[1:]) for part in rounds[0]}


def main() -> None:
    for part, functions in PARTS.items():
        for module, name in functions:
            setattr(module, name, timed(part, getattr(module, name)))
    shape = SHAPES["cpu"][0]
    result = {str(dtype)[6:]: profile(shape, dtype) for dtype in (torch.float32, torch.bfloat16)}
    lines = [f"| CPU seconds | {' | '.join(result)} |", "|---|---:|---:|"]
    lines += [
        f"| {part} | {' | '.join(f'{one[part]:.2f}' for one in result.values())} |"
        for part in (*PARTS, "rest", "all", "torch's four products")
    ]
    about = environment("cpu")
    lines += ["", f"{about['device']}; torch {about['torch']}; commit {about['commit']}, {about['date']}. "]
    lines[-1] += "`python benchmarks/kernels/kd_profile.py`"
    print("\n".join(lines))
    (RESULTS / "kd_profile.json").write_text(json.dumps({"about": about, "seconds": result}, indent=1) + "\n")
    put_in_docs("kd_profile", lines)


if __name__ == "__main__":
    main()
