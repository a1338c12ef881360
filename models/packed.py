"""Rows that hold padding or several documents: their tokens' positions and segments."""

import torch
from torch import Tensor


def positions_in(attention_mask: Tensor) -> Tensor:
    """(b, n) positions of a row's tokens, 0, 1, ... from its first one on; padding (0 in the mask) takes none."""
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)


def without_padding(segment_ids: Tensor, mask: Tensor | None) -> tuple[Tensor, None]:
    """Padding as segments of its own, -1, in the place of a mask."""
    if mask is None:
        return segment_ids, None
    if not isinstance(mask, Tensor) or mask.shape != segment_ids.shape:
        raise ValueError(
            f"attention_mask of packed rows must be {tuple(segment_ids.shape)}, as segment_ids, got {tuple(mask.shape)}"
        )
    real, changes = mask.bool(), changes_of(segment_ids)
    goes_on = torch.nn.functional.pad(real[:, :-1], (1, 0)) & ~changes  # from a real token of the same document
    begins = torch.zeros_like(segment_ids).scatter_add_(1, changes.long().cumsum(1), (real & ~goes_on).to(segment_ids))
    if bool((begins > 1).any()):
        raise ValueError("attention_mask of packed rows: padding within a document; put it behind or in front of one")
    padded = torch.where(real, segment_ids, -1)
    return padded, None


def starts_of(position_ids: Tensor) -> Tensor:
    """(b, n) where a document begins after the first: positions do not go on. transformers' own packing rule."""
    return position_ids.diff(dim=-1, prepend=position_ids[:, :1] - 1) != 1


def changes_of(segment_ids: Tensor) -> Tensor:
    return segment_ids.diff(dim=-1, prepend=segment_ids[:, :1]) != 0


def segments_of(position_ids: Tensor) -> Tensor | None:
    """(b, n) segment ids of rows whose positions restart, or None when none does."""
    starts = starts_of(position_ids)
    return starts.cumsum(-1) if bool(starts.any()) else None


def positions_of(segment_ids: Tensor) -> Tensor:
    """(b, n) positions that restart at 0 with each segment."""
    index = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
    starts = segment_ids.diff(dim=-1, prepend=segment_ids[:, :1] - 1) != 0
    return index - torch.where(starts, index, 0).cummax(-1).values
