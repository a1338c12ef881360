"""Every metric between two mixing matrices S (the student's) and A (the teacher's).

An entry of `METRICS` is all that a metric needs which is a function of ||S - A||^2, ||A||^2 and the number of real
tokens: recipes, checks and every backend read this table. ("kl", between rows of two attentions, is no such function;
the backends have a sweep of their own for it.)

Importing this module brings no torch, so that recipes can be read without it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Metric:
    """One metric.

    Args:
        text: what it is, for those who choose one.
        definition: from whole matrices S and A (batch, heads, seq, seq), zero in padding, and n, the number of real
            tokens (a number, or (batch, 1)), to (batch, heads); differentiable by autograd.
        of_squares: the same from ||S - A||^2, ||A||^2, each (batch, heads), and n, with its derivative in half of the
            former. A metric that does not read `of_teacher` leaves the sweep for ||A||^2 out.
        of_teacher: whether it reads ||A||^2, which is None otherwise.
    """

    text: str
    definition: Callable[[Tensor, Tensor, Tensor | int], Tensor]
    of_squares: Callable[[Tensor, Tensor | None, Tensor | int], tuple[Tensor, Tensor]]
    of_teacher: bool = False


def _norm(matrix: Tensor) -> Tensor:
    return matrix.norm(dim=(-1, -2))


def _relative(s: Tensor, a: Tensor, n: Tensor | int) -> Tensor:
    size = _norm(a)
    return (_norm(s - a) / size.where(size > 0, 1)).where(size > 0, 0)


def _frobenius_of_squares(total: Tensor, size: Tensor | None, n: Tensor | int) -> tuple[Tensor, Tensor]:
    norm = total.sqrt()
    return norm, (1 / norm).where(norm > 0, 0)


def _relative_of_squares(total: Tensor, size: Tensor | None, n: Tensor | int) -> tuple[Tensor, Tensor]:
    assert size is not None  # as `of_teacher` says
    norm, size = total.sqrt(), size.sqrt()
    return (norm / size).where(size > 0, 0), (1 / (norm * size)).where((size > 0) & (norm > 0), 0)


METRICS: dict[str, Metric] = {
    "frobenius": Metric(
        "||S - A||_F (MOHAWK's, arXiv 2408.10189); its gradient is 0 where the distance is 0",
        lambda s, a, n: _norm(s - a),
        _frobenius_of_squares,
    ),
    "squared": Metric(
        "||S - A||_F^2",
        lambda s, a, n: (s - a).square().sum((-1, -2)),
        lambda total, size, n: (total, total.new_full(total.shape, 2.0)),
    ),
    "mse": Metric(
        "||S - A||_F^2 over the square of the number of real tokens",
        lambda s, a, n: (s - a).square().sum((-1, -2)) / n**2,
        lambda total, size, n: (total / n**2, total.new_full(total.shape, 2.0) / n**2),
    ),
    "relative": Metric("||S - A||_F / ||A||_F (0 where A is 0)", _relative, _relative_of_squares, of_teacher=True),
}
# Between means over heads (`head_mean_distance`); kl and scores, the mse of what the softmax takes, of attention alone.
OF_MEANS = ("mse", "scores", "kl", "frobenius")


def reads_teacher(metric: str) -> bool:
    """Whether the backends have to find ||A||^2."""
    return metric in METRICS and METRICS[metric].of_teacher


def described() -> str:
    """One line for each: its name and what it is."""
    return "\n".join(f"{name}: {one.text}" for name, one in METRICS.items())
