"""Weights as products of two thinner ones, by singular value decomposition.

No class of transformers holds a projection in two factors, so a factored model is not a checkpoint. It is one while it
trains: `factorise` a model's projections, heal it, `merge_factors`, and the stock class holds the products, which have
the rank that was trained. `reduce_rank` does the first and the last step alone. None of it makes a stock checkpoint
smaller; what it gives is weights that a runtime with factored projections, or a later cut, can take apart.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.no_grad()
def low_rank_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """left (rows, rank) and right (rank, columns) whose product is the closest matrix of that rank.

    Closest in the Frobenius and the spectral norm (Eckart-Young). The singular values are shared out evenly, half of
    each in either factor, so that both train alike. Made in float64, returned in the weight's dtype.

    Raises:
        ValueError: weight is no matrix, or has no such rank.
    """
    if weight.dim() != 2:
        raise ValueError(f"weight: got a tensor of shape {tuple(weight.shape)}, allowed: a matrix")
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(f"rank: got {rank}, allowed: 1 to {min(weight.shape)} for a weight of {tuple(weight.shape)}")
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    root = values[:rank].sqrt()
    return (left[:, :rank] * root).to(weight.dtype), (root[:, None] * right[:rank]).to(weight.dtype)


class LowRankLinear(nn.Module):
    """A linear map in two factors: x -> left (right x) + bias.

    right: (rank, in_features), left: (out_features, rank), bias (out_features) or None.
    """

    def __init__(self, left: Tensor, right: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.left, self.right = nn.Parameter(left), nn.Parameter(right)
        self.bias = None if bias is None else nn.Parameter(bias)

    @classmethod
    def of(cls, linear: nn.Linear, rank: int) -> "LowRankLinear":
        """The best factors of a linear map; the map is left as it was. ValueError: it has no such rank."""
        bias = None if linear.bias is None else linear.bias.detach().clone()
        return cls(*low_rank_factors(linear.weight, rank), bias)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The map as one projection again."""
        rows, columns = self.left.shape[0], self.right.shape[1]
        linear = nn.Linear(columns, rows, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter((self.left.double() @ self.right.double()).to(self.left.dtype))
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone())
        return linear

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.right), self.left, self.bias)

    def extra_repr(self) -> str:
        return f"{self.right.shape[1]} -> {self.left.shape[1]} -> {self.left.shape[0]}, bias={self.bias is not None}"


def in_layers(name: str) -> bool:
    """Whether a module is in a decoder layer: all projections but the head."""
    return ".layers." in f".{name}"


@torch.no_grad()
def reduce_rank(model: nn.Module, rank: int, which: Callable[[str], bool] = in_layers) -> nn.Module:
    """Replaces weights by the closest ones of a rank, in place; the model stays an ordinary checkpoint.

    Args:
        model: anything with nn.Linear in it. rank: at most that of the largest chosen projection; smaller ones stay.
        which: by a module's name, whether its weight is replaced.

    Returns:
        The model.

    Raises:
        ValueError: nothing chosen, or nothing that has a higher rank.
    """
    for _, linear in _chosen(model, rank, which):
        left, right = low_rank_factors(linear.weight, rank)
        linear.weight.copy_((left.double() @ right.double()).to(left.dtype))
    return model


def factorise(model: nn.Module, rank: int, which: Callable[[str], bool] = in_layers) -> nn.Module:
    """Replaces projections by their best factors, in place, where that saves parameters; see `reduce_rank`.

    Not a checkpoint until `merge_factors`.
    """
    for name, linear in _chosen(model, rank, which):
        if rank * (linear.in_features + linear.out_features) < linear.weight.numel():
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, LowRankLinear.of(linear, rank))
    return model


def merge_factors(model: nn.Module) -> nn.Module:
    """Undoes `factorise`, in place: every pair of factors becomes one projection, which has their rank."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LowRankLinear):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module.merged())
    return model


def _chosen(model: nn.Module, rank: int, which: Callable[[str], bool]) -> Iterator[tuple[str, nn.Linear]]:
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    chosen = [(name, module) for name, module in linears if which(name)]
    if not chosen:
        raise ValueError(f"which: none of the model's {len(linears)} projections was chosen")
    largest = max(min(module.weight.shape) for _, module in chosen)
    if not 1 <= rank < largest:
        raise ValueError(f"rank: got {rank}, allowed: 1 to {largest - 1}, below the rank of the largest projection")
    yield from ((name, module) for name, module in chosen if rank < min(module.weight.shape))
