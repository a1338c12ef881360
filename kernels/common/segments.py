"""Packed documents: what the scan, the convolution and the mixing matrices all read from `segment_ids`.

A segment is a run of equal ids along the sequence. Nothing crosses from one run into the next: attention
does not look back over the border, the state of a scan starts anew, the convolution sees zeros. Padding has
the id -1 and is a run like any other, except that `mixing_distance` leaves it out.
"""

import torch
from torch import Tensor

from mohawk.kernels.common.tensors import check_tensors

# Added to log_decay at the first token of a segment. exp of it is 0 in float64 as in float32, so a border
# needs no mask, and it is finite, so differences of cumulative sums across a border stay numbers.
RESET = -2000.0


def segment_runs(segment_ids: Tensor) -> Tensor:
    """(batch, seq) ids -> (batch, seq) int64 number of the run each token lies in, counted from 0."""
    runs = torch.zeros(segment_ids.shape, dtype=torch.int64, device=segment_ids.device)
    if segment_ids.shape[1] > 1:
        torch.cumsum(segment_ids[:, 1:] != segment_ids[:, :-1], dim=1, out=runs[:, 1:])
    return runs


def segment_starts(segment_ids: Tensor) -> Tensor:
    """(batch, seq) ids -> (batch, seq) int64 index of the first token of the run each token lies in."""
    seq = segment_ids.shape[1]
    index = torch.arange(seq, device=segment_ids.device).expand(segment_ids.shape)
    first = torch.zeros(segment_ids.shape, dtype=torch.bool, device=segment_ids.device)
    first[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return torch.where(first, index, 0).cummax(dim=1).values if seq else index.clone()


def segment_ends(segment_ids: Tensor) -> Tensor:
    """(batch, seq) ids -> (batch, seq) int64 index of the last token of the run each token lies in."""
    return segment_ids.shape[1] - 1 - segment_starts(segment_ids.flip(1)).flip(1)


def decays_with_resets(log_decay: Tensor, segment_ids: Tensor | None) -> Tensor:
    """(batch, seq, heads, ...) log decays in float64, with the border of each segment a decay to exactly 0.

    Float64 because all scans take differences of cumulative sums, and after a strong decay (or a border) a
    float32 sum has lost the weak ones. Values below RESET (-inf too) already decay to 0 and are cut off
    there.
    """
    decays = log_decay.to(torch.float64).clamp(min=RESET)
    if segment_ids is not None and segment_ids.shape[1] > 1:
        border = segment_ids[:, 1:] != segment_ids[:, :-1]
        decays = decays.clone() if decays is log_decay else decays
        decays[:, 1:] += border.view(*border.shape, *(1,) * (decays.dim() - 2)) * RESET
    return decays


def check_segment_ids(segment_ids: Tensor | None, batch: int, seq: int, where: str) -> None:
    """Raise ValueError unless segment_ids is None or an integer tensor (batch, seq)."""
    if segment_ids is None:
        return
    check_tensors(where, segment_ids=segment_ids)
    if tuple(segment_ids.shape) != (batch, seq):
        raise ValueError(
            f"{where}: segment_ids must be (batch, seq) = ({batch}, {seq}), got {tuple(segment_ids.shape)}"
        )
    if segment_ids.is_floating_point() or segment_ids.is_complex():
        raise ValueError(f"{where}: segment_ids must be integers, got {segment_ids.dtype}")


def head_blocks(heads: int, groups: tuple[int, ...], most: int) -> list[tuple[int, int]]:
    """Cut 0..heads into ranges of at most `most` heads that either lie inside a group or hold whole ones.

    `groups` are the group counts of the operands; each divides `heads`. So every range reads a plain slice of
    groups from each operand, whatever the mixture.
    """
    sizes = [heads // count for count in groups]
    for width in range(max(1, min(most, heads)), 0, -1):
        if heads % width == 0 and all(width % size == 0 or size % width == 0 for size in sizes):
            break
    return [(start, start + width) for start in range(0, heads, width)]


def group_slice(start: int, stop: int, heads: int, groups: int) -> slice:
    """The groups that heads start..stop read, for a range that `head_blocks` made."""
    size = heads // groups
    return slice(start // size, (stop - 1) // size + 1)
