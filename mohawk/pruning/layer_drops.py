"""What each layer is worth by leaving it out: rise of perplexity and KL from the whole model.

One forward for every layer, so as many times what block importance costs (`mohawk.pruning.importance`), and
the better score where much depth is cut (arXiv 2408.11796).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mohawk.core.processes import from_all
from mohawk.data.next_tokens import IGNORED, next_labels
from mohawk.kernels.kd.interface import linear_kd_loss
from mohawk.losses.heads import Head
from mohawk.models.cutting.sizes import sizes_of
from mohawk.models.families import decoder_layers
from mohawk.models.sharding import is_sharded, reshard
from mohawk.models.teacher_forcing import StandIn
from mohawk.pruning.importance import run_decoder


@dataclass(frozen=True)
class LayerDrops:
    """What leaving out one layer does, float64, one entry a layer; more matters more.

    kl: mean KL(whole model || without the layer), nats a token. perplexity: its rise. whole: the whole model's.
    """

    kl: Tensor
    perplexity: Tensor
    whole: float


class _Skip(StandIn):
    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        return hidden_states


@contextmanager
def without_layer(model: PreTrainedModel, index: int) -> Iterator[None]:
    """Within it a decoder layer passes on what it gets."""
    layers = decoder_layers(model)
    layer = layers[index]
    layers[index] = _Skip(layer)
    try:
        yield
    finally:
        layers[index] = layer


@torch.no_grad()
def measure_layer_drops(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]], *, dealt: bool = False
) -> LayerDrops:
    """Each layer left out in turn, on packed batches with labels (see `mohawk.data.packing`); the model is left as it
    was.

    dealt: each of several processes gives batches of its own, equally many of them, whose figures are added up; all of
    them must ask.

    Raises:
        ValueError: an unsupported model, or batches in which nothing is predicted.
    """
    count, training = sizes_of(model.config).layers, model.training
    kl, ce = torch.zeros(count, dtype=torch.float64), torch.zeros(count + 1, dtype=torch.float64)
    reshard(model)
    head, tokens = Head.of(model).frozen(), 0
    model.eval()
    try:
        for batch in batches:
            labels = next_labels(batch).to(model.device)[:, :-1]
            real = labels != IGNORED
            found = int(real.sum())
            if not (found or is_sharded(model)):  # whose layers other processes come to
                continue
            tokens += found
            whole = run_decoder(model, batch)[:, :-1][real].float()
            for i in range(count):
                with without_layer(model, i):
                    less = run_decoder(model, batch)[:, :-1][real].float()
                if not found:
                    continue
                parts = linear_kd_loss(
                    **head.student(less), teacher=head.teacher(whole), labels=labels[real],
                    reduction="sum", return_parts=True,
                )[1]  # fmt: skip
                kl[i] += parts.kd.double().cpu()
                ce[i] += parts.ce.double().cpu()
            if not found:
                continue
            parts = linear_kd_loss(
                **head.student(whole), teacher=head.teacher(whole), labels=labels[real],
                reduction="sum", return_parts=True,
            )[1]  # fmt: skip
            ce[count] += parts.ce.double().cpu()
    finally:
        model.train(training)
        reshard(model)
    if dealt:
        found = from_all((kl, ce, tokens))
        kl = torch.stack([of_kl for of_kl, _, _ in found]).sum(0)
        ce = torch.stack([of_ce for _, of_ce, _ in found]).sum(0)
        tokens = sum(counted for _, _, counted in found)
    if not tokens:
        raise ValueError("nothing is predicted in the calibration text; give batches whose labels are not all -100")
    perplexity = torch.exp(ce / tokens)
    return LayerDrops(kl / tokens, perplexity[:count] - perplexity[count], math.exp(float(ce[count]) / tokens))
