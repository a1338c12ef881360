"""The start of phase 2: each mixer's output projection solved by least squares instead of learned from afar.

Given the teacher's hidden states, a mixer's output is linear in its output projection, so the best one for everything
before it as it stands has a closed form. A few thousand tokens suffice, and gradient steps go on from there.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mohawk.models.families import decoder_layers, mixer_input_norm
from mohawk.models.hybrid import HybridForCausalLM
from mohawk.models.sharding import fill, reshard, run_in, whole
from mohawk.models.state_mixer import StateMixer
from mohawk.models.teacher_forcing import layer_calls, record

RIDGE = 1e-2  # pull towards the projection there was, as a share of the features' mean square


class Readout:
    """Sums over tokens out of which the best projection of features to targets follows, in float64."""

    def __init__(self) -> None:
        self.gram: Tensor | float = 0
        self.moment: Tensor | float = 0
        self.square = 0.0  # of the targets

    def add(self, mixer: StateMixer, features: Tensor, target: Tensor) -> None:
        """features: (tokens, h*p) input of the mixer's output projection; target: (tokens, D) what it is to make."""
        features, target = features.float(), target.float()
        if mixer.output.bias is not None:
            features = torch.cat([features, features.new_ones(len(features), 1)], 1)
        with torch.autocast(features.device.type, enabled=False):
            self.gram = self.gram + (features.T @ features).double()
            self.moment = self.moment + (features.T @ target).double()
            self.square += float(target.double().square().sum())

    def solve(self, mixer: StateMixer) -> float:
        """Sets the projection, and its bias if it has one, to the ridge solution; what is left of the targets' square,
        as a share of it. Features that are no numbers have no solution: the projection stays, and nan is returned."""
        output = mixer.output
        assert isinstance(self.gram, Tensor) and isinstance(self.moment, Tensor)  # tokens were added
        if not bool(self.gram.isfinite().all()):
            return math.nan
        rows = [whole(output.weight).T] + ([] if output.bias is None else [whole(output.bias)[None]])
        start = torch.cat(rows).double()
        ridge = RIDGE * self.gram.diagonal().mean() * torch.eye(len(start), dtype=torch.float64, device=start.device)
        solved = torch.linalg.solve(self.gram + ridge, self.moment + ridge @ start)
        fill(output.weight, solved[: output.in_features].T.contiguous())
        if output.bias is not None:
            fill(output.bias, solved[-1])
        left = self.square + float((solved * (self.gram @ solved - 2 * self.moment)).sum())
        return left / self.square if self.square else 0.0


def readout_features(mixer: StateMixer, inputs: Tensor, segment_ids: Tensor) -> Tensor:
    """(b, n, h*p) input of the projection out of a mixer, for its normalised input (b, n, D)."""
    seen = []
    hook = mixer.output.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        mixer(inputs, segment_ids=segment_ids)
    finally:
        hook.remove()
    return seen[0]


@torch.no_grad()
def solve_output_projections(
    student: HybridForCausalLM,
    teacher: PreTrainedModel,
    batches: Iterable[dict[str, Tensor]],
    *,
    autocast: torch.dtype | None = None,
) -> None:
    """Sets every replaced layer's output projection, and its bias if it has one, to the ridge solution of
    projection(features) ~ the teacher's attention output, over the real tokens of `batches`.

    Args:
        student, teacher: on one device. The teacher is left as it was, the student's projections are overwritten.
        batches: packed batches as `mohawk.data.packing.collate` makes them; at least as many tokens as the inner width,
            better ten times as many.
        autocast: dtype of the models' matrix products; the normal equations are summed in float64.
    """
    layers, own, replaced = decoder_layers(teacher), decoder_layers(student), student.config.ssm_layers
    sums: dict[int, Readout] = defaultdict(Readout)

    def features(layer, hidden: Tensor, segment_ids: Tensor) -> Tensor:
        return readout_features(layer.self_attn, mixer_input_norm(layer)(hidden), segment_ids)

    for batch in batches:
        batch = {name: value.to(teacher.device) for name, value in batch.items()}
        real = batch["segment_ids"] >= 0
        with torch.autocast(teacher.device.type, dtype=autocast, enabled=autocast is not None):
            hidden, calls = run_in(teacher, layer_calls, teacher, batch["input_ids"], batch["position_ids"])
            for i, call in enumerate(calls[: replaced[-1] + 1]):
                with record(layers[i].self_attn) as attention:
                    after = layers[i](hidden, *call.args, **call.kwargs)
                if i in replaced:
                    seen = run_in(own[i], features, own[i], hidden, batch["segment_ids"])
                    assert attention.output is not None  # the layer has run
                    sums[i].add(own[i].self_attn, seen[real], attention.output[real])
                hidden = after
    reshard(student)
    reshard(teacher)
    for i, readout in sums.items():
        readout.solve(own[i].self_attn)
