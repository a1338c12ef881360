"""A mixing matrix written out, strip by strip."""

from collections.abc import Iterable, Sequence

from torch import Tensor

from mohawk.kernels.common.tensors import whole_number
from mohawk.kernels.mixing.chunked import write_matrix
from mohawk.kernels.mixing.definition import KINDS, Mixing


def mixing_matrix(
    mixing: Mixing,
    rows: tuple[int, int] | None = None,
    *,
    heads: Sequence[int] | None = None,
    mean_heads: bool = False,
) -> Tensor:
    """The matrix of a mixing, (batch, heads, rows, seq), written strip by strip; not differentiable.

    rows: the range (i0, i1) of rows, all if None. heads: which heads, all if None. mean_heads: their mean,
    (batch, rows, seq), summed strip by strip. Besides the result, one head's operands and one strip of 64
    rows are held, so some rows of a long context cost little. float64 inputs give float64, all others
    float32. Padding (segment -1) is a segment like any other here. Raises ValueError for rows or heads that
    do not exist.
    """
    if not isinstance(mixing, Mixing):
        raise ValueError(f"mixing_matrix: takes {KINDS}, got {type(mixing).__name__}")
    batch, count, seq = mixing.shape
    first, last = rows if isinstance(rows, (tuple, list)) and len(rows) == 2 else (0, seq if rows is None else -1)
    first, last = _place(first), _place(last)
    if not 0 <= first <= last <= seq:
        raise ValueError(f"mixing_matrix: rows must be (i0, i1) with 0 <= i0 <= i1 <= {seq}, got {rows}")
    if heads is not None and not isinstance(heads, Iterable):
        raise ValueError(f"mixing_matrix: heads must be a list of heads, got {heads!r}")
    given = list(range(count)) if heads is None else heads.tolist() if isinstance(heads, Tensor) else list(heads)
    chosen = [_place(head) for head in given]
    if not all(0 <= head < count for head in chosen):
        raise ValueError(f"mixing_matrix: heads must be whole numbers between 0 and {count - 1}, got {given}")
    if mean_heads and not chosen:
        raise ValueError("mixing_matrix: the mean over heads needs at least one head, got none")
    return write_matrix(mixing, first, last, chosen, mean_heads)


def _place(value: object) -> int:
    """-1, which is nowhere, for what is no whole number."""
    whole = whole_number(value)
    return -1 if whole is None else whole
